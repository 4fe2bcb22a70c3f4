# Qwen2.5-14B and its instruct model: 14,770,033,664 parameters.
# The norm's epsilon is 1e-5 in the base model and 1e-6 in the instruct one: it comes from --hf-checkpoint.
MODEL_ARGS=(
   --num-layers 48
   --hidden-size 5120
   --ffn-hidden-size 13824
   --num-attention-heads 40
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --vocab-size 152064
   --use-rotary-position-embeddings
   --rotary-base 1000000
   --normalization RMSNorm
   --swiglu
   --disable-bias-linear
   --add-qkv-bias
   --untie-embeddings-and-output-weights
)
