"""Numerical core. Imports torch and the standard library only; a collective takes its ``group`` and ``None`` means
one rank. Shape legend: T response tokens, V vocabulary, N samples. Log-probs and divergences are in nats."""
