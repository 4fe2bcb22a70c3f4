"""The models that a CPU server knows from its start; any other makes SGLang import all of its own.

SGLang looks for ``EntryClass`` in each module of the package that ``SGLANG_EXTERNAL_MODEL_PACKAGE`` names.
"""
