"""Prompts in, token batches out."""
