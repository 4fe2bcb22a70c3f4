# Qwen2.5-7B and its instruct model: 7,615,616,512 parameters.
MODEL_ARGS=(
   --num-layers 28
   --hidden-size 3584
   --ffn-hidden-size 18944
   --num-attention-heads 28
   --group-query-attention
   --num-query-groups 4
   --kv-channels 128
   --vocab-size 152064
   --use-rotary-position-embeddings
   --rotary-base 1000000
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --swiglu
   --disable-bias-linear
   --add-qkv-bias
   --untie-embeddings-and-output-weights
)
