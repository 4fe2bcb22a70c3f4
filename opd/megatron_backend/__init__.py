"""The trainer's model side: megatron-core on CPU (gloo) and GPU (NCCL) alike.

Reading order: ``device`` (make megatron-core run where we are), ``groups`` (process groups), ``layers`` (attention and
norm), ``hf_bridge`` (Hugging Face <-> Megatron), ``checkpoint`` (Megatron's layout on disk).
"""
