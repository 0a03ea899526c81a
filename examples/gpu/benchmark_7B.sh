#!/usr/bin/env bash
# Throughput of LLaMA 2 7B on NVIDIA GPUs, fully sharded (ZERO_STAGE=3), 16 sequences of 4096 tokens per GPU.
# Made-up data, a few steps. On several machines, start it on each with HOSTFILE=hosts.txt, one name per line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(python3 tools/environment.py --extras plot)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

export PRESET=${PRESET:-llama2-7b} DEVICE=${DEVICE:-cuda} PRECISION=${PRECISION:-bf16} NPROC=${NPROC:-8}
export SEQ_LENGTH=${SEQ_LENGTH:-4096} MICRO_BATCH=${MICRO_BATCH:-16} TRAIN_ITERS=${TRAIN_ITERS:-20} LR=${LR:-3e-4}
export ZERO_STAGE=${ZERO_STAGE:-3} TP=${TP:-1} PP=${PP:-1} LOG_INTERVAL=${LOG_INTERVAL:-1} EVAL_ITERS=${EVAL_ITERS:-0}
exec "$python" -m megatron.launch --mock-data --tokenizer-type NullTokenizer --vocab-size 31999 \
  --recompute-granularity full --recompute-method uniform --log-throughput "$@"
