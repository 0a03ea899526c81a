#!/usr/bin/env bash
# LLaMA 13B on 8 Ascend NPUs, a pipeline of 8 stages. CHECKPOINT=folder starts from weights. See docs/ascend.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(python3 tools/environment.py --extras plot)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

export DEVICE=${DEVICE:-npu} HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200} COMBINED_ENABLE=${COMBINED_ENABLE:-1}
export DATA_PATH=${DATA_PATH:-${DATA:-./dataset/llama_text_document}} TOKENIZER_TYPE=${TOKENIZER_TYPE:-PretrainedFromHF}
export TOKENIZER_MODEL=${TOKENIZER_MODEL:-${TOKENIZER_PATH:-./dataset/llama}} SAVE=${SAVE:-./ckpt}
export PRESET=${PRESET:-llama1-13b} TP=${TP:-1} PP=${PP:-8} PRECISION=${PRECISION:-fp16} SEQ_LENGTH=${SEQ_LENGTH:-2048}
export MICRO_BATCH=${MICRO_BATCH:-${MBS:-1}} GLOBAL_BATCH=${GLOBAL_BATCH:-${GBS:-128}}
export TRAIN_ITERS=${TRAIN_ITERS:-1000} LR=${LR:-1e-6} MIN_LR=${MIN_LR:-1e-7}
export INITIAL_LOSS_SCALE=${INITIAL_LOSS_SCALE:-4096}
export NNODES=${NNODES:-1} NPUS_PER_NODE=${NPUS_PER_NODE:-8} MASTER_PORT=${MASTER_PORT:-6001}
export SPLIT=${SPLIT:-949,50,1} LOG_INTERVAL=${LOG_INTERVAL:-1} SAVE_INTERVAL=${SAVE_INTERVAL:-10000}
export EVAL_INTERVAL=${EVAL_INTERVAL:-1000} EVAL_ITERS=${EVAL_ITERS:-10}
exec "$python" -m megatron.launch --family ascend --tokenizer-not-use-fast --lr-decay-style cosine \
  --lr-warmup-fraction .01 --weight-decay 1e-2 --clip-grad 1.0 --lr-decay-iters 640 \
  --recompute-granularity full --recompute-method block --recompute-num-layers 3 "$@"
