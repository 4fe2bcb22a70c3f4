# Qwen3-14B: 14,768,307,200 parameters.
MODEL_ARGS=(
   --num-layers 40
   --hidden-size 5120
   --ffn-hidden-size 17408
   --num-attention-heads 40
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --vocab-size 151936
   --use-rotary-position-embeddings
   --rotary-base 1000000
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --swiglu
   --disable-bias-linear
   --qk-layernorm
   --untie-embeddings-and-output-weights
)
