"""Teachers: an SGLang server asked over HTTP, or a Megatron model co-loaded with the student."""
