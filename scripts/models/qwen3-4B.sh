# Qwen3-4B: 4,022,468,096 parameters.
# Qwen3-4B-Instruct-2507 and -Thinking-2507 have another RoPE base: MODEL_ARGS_ROTARY_BASE=5000000.
MODEL_ARGS=(
   --num-layers 36
   --hidden-size 2560
   --ffn-hidden-size 9728
   --num-attention-heads 32
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --vocab-size 151936
   --use-rotary-position-embeddings
   --rotary-base "${MODEL_ARGS_ROTARY_BASE:-1000000}"
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --swiglu
   --disable-bias-linear
   --qk-layernorm
)
