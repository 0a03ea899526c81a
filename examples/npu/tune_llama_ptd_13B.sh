#!/usr/bin/env bash
# Fine-tunes all weights of LLaMA 13B on instructions, on 8 Ascend NPUs with TP 4 and PP 2. See docs/ascend.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(python3 tools/environment.py --extras plot)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

export DEVICE=${DEVICE:-npu} HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200} COMBINED_ENABLE=${COMBINED_ENABLE:-1}
export DATA_PATH=${DATA_PATH:-${DATA:-./dataset/llama_text_document}} TOKENIZER_TYPE=${TOKENIZER_TYPE:-PretrainedFromHF}
export TOKENIZER_MODEL=${TOKENIZER_MODEL:-${TOKENIZER_PATH:-./dataset/llama}} SAVE=${SAVE:-./ckpt}
: "${CHECKPOINT:?set it to the folder of the converted LLaMA 13B weights}"
export PRESET=${PRESET:-llama1-13b} TP=${TP:-4} PP=${PP:-2} PRECISION=${PRECISION:-fp16} SEQ_LENGTH=${SEQ_LENGTH:-256}
export MICRO_BATCH=${MICRO_BATCH:-${MBS:-4}} GLOBAL_BATCH=${GLOBAL_BATCH:-${GBS:-128}}
export TRAIN_ITERS=${TRAIN_ITERS:-2030} LR=${LR:-1e-6} MIN_LR=${MIN_LR:-0}
export SAVE_INTERVAL=${SAVE_INTERVAL:-507} INITIAL_LOSS_SCALE=${INITIAL_LOSS_SCALE:-4096} SCRIPT=finetune_gpt.py
export NNODES=${NNODES:-1} NPUS_PER_NODE=${NPUS_PER_NODE:-8} MASTER_PORT=${MASTER_PORT:-6001}
export SPLIT=${SPLIT:-949,50,1} LOG_INTERVAL=${LOG_INTERVAL:-1} LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-200}
export EVAL_INTERVAL=${EVAL_INTERVAL:-1000} EVAL_ITERS=${EVAL_ITERS:-10}
exec "$python" -m megatron.launch --family ascend --tokenizer-not-use-fast --lr-decay-style cosine \
  --weight-decay 0 --clip-grad 1.0 --recompute-granularity full --recompute-method uniform --finetune "$@"
