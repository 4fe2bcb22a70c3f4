"""Decoding of transformers models in this process: ragged caches, draws, continuous batching."""
