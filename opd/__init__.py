"""opd: on-policy distillation of language models on Megatron-core and SGLang.

Importing this package imports neither torch nor any engine; each submodule imports what it needs.
"""

__version__ = "0.1.0"
