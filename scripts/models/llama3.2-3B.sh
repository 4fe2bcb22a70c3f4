# Llama-3.2-3B and its instruct model: 3,212,749,824 parameters.
MODEL_ARGS=(
   --num-layers 28
   --hidden-size 3072
   --ffn-hidden-size 8192
   --num-attention-heads 24
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
)
