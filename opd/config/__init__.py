"""Flags and their rules. ``parse_config`` turns a command line into a validated ``Config``."""
