# Llama-3.2-1B and its instruct model: 1,235,814,400 parameters.
MODEL_ARGS=(
   --num-layers 16
   --hidden-size 2048
   --ffn-hidden-size 8192
   --num-attention-heads 32
   --group-query-attention
   --num-query-groups 8
   --kv-channels 64
   --vocab-size 128256
   --use-rotary-position-embeddings
   --rotary-base 500000
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --swiglu
   --disable-bias-linear
   --use-rope-scaling
)
