# Llama-3.1-8B and its instruct model: 8,030,261,248 parameters.
MODEL_ARGS=(
   --num-layers 32
   --hidden-size 4096
   --ffn-hidden-size 14336
   --num-attention-heads 32
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --vocab-size 128256
   --use-rotary-position-embeddings
   --rotary-base 500000
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --swiglu
   --disable-bias-linear
   --use-rope-scaling
   --untie-embeddings-and-output-weights
)
