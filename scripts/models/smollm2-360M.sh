# SmolLM2-360M and its instruct model: 361,821,120 parameters.
MODEL_ARGS=(
   --num-layers 32
   --hidden-size 960
   --ffn-hidden-size 2560
   --num-attention-heads 15
   --group-query-attention
   --num-query-groups 5
   --kv-channels 64
   --vocab-size 49152
   --use-rotary-position-embeddings
   --rotary-base 100000
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --swiglu
   --disable-bias-linear
)
