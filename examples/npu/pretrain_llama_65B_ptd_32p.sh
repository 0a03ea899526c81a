#!/usr/bin/env bash
# LLaMA 65B on 32 Ascend NPUs: 4 machines, TP 8, PP 4. Start it on every machine:
#   MASTER_ADDR=<first machine> NODE_RANK=<0 to 3> bash examples/npu/pretrain_llama_65B_ptd_32p.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(python3 tools/environment.py --extras plot)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

export DEVICE=${DEVICE:-npu} HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200} COMBINED_ENABLE=${COMBINED_ENABLE:-1}
export DATA_PATH=${DATA_PATH:-${DATA:-./dataset/llama_text_document}} TOKENIZER_TYPE=${TOKENIZER_TYPE:-PretrainedFromHF}
export TOKENIZER_MODEL=${TOKENIZER_MODEL:-${TOKENIZER_PATH:-./dataset/llama}} SAVE=${SAVE:-./ckpt}
export PRESET=${PRESET:-llama1-65b} TP=${TP:-8} PP=${PP:-4} PRECISION=${PRECISION:-bf16} SEQ_LENGTH=${SEQ_LENGTH:-2048}
export MICRO_BATCH=${MICRO_BATCH:-${MBS:-2}} GLOBAL_BATCH=${GLOBAL_BATCH:-${GBS:-512}}
export TRAIN_ITERS=${TRAIN_ITERS:-50000} LR=${LR:-1.5e-4} MIN_LR=${MIN_LR:-1e-5}
export NNODES=${NNODES:-4} NPUS_PER_NODE=${NPUS_PER_NODE:-8} MASTER_PORT=${MASTER_PORT:-6001}
export SPLIT=${SPLIT:-949,50,1} LOG_INTERVAL=${LOG_INTERVAL:-1} SAVE_INTERVAL=${SAVE_INTERVAL:-10000}
export EVAL_INTERVAL=${EVAL_INTERVAL:-1000} EVAL_ITERS=${EVAL_ITERS:-10}
exec "$python" -m megatron.launch --family ascend --tokenizer-not-use-fast --lr-decay-style cosine \
  --lr-warmup-fraction .01 --weight-decay 1e-2 --clip-grad 1.0 --lr-decay-iters 320000 --sequence-parallel \
  --recompute-granularity full --recompute-method uniform "$@"
