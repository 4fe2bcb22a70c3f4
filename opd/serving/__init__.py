"""SGLang servers: start, watch, stop, talk to. Importing this package imports no engine."""
