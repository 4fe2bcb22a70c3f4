# SmolLM2-135M and its instruct model: 134,515,008 parameters.
MODEL_ARGS=(
   --num-layers 30
   --hidden-size 576
   --ffn-hidden-size 1536
   --num-attention-heads 9
   --group-query-attention
   --num-query-groups 3
   --kv-channels 64
   --vocab-size 49152
   --use-rotary-position-embeddings
   --rotary-base 100000
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --swiglu
   --disable-bias-linear
)
