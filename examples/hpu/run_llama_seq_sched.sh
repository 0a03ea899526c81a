#!/usr/bin/env bash
# LLaMA 3.1 on Intel Gaudi as published: samples get longer, then the batch grows, in one process. 15e12 tokens.
#   bash examples/hpu/run_llama_seq_sched.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(python3 tools/environment.py --extras plot)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

export DEVICE=${DEVICE:-hpu} PRECISION=${PRECISION:-bf16} HL_LLAMA_VER=${HL_LLAMA_VER:-3.1} HL_SEQ_LEN=${HL_SEQ_LEN:-8192}
export HL_SCHEDULER_SEQ_LEN=${HL_SCHEDULER_SEQ_LEN:-4096 8192 8192}
export HL_SCHEDULER_BATCH_SIZE=${HL_SCHEDULER_BATCH_SIZE:-1024 1024 2048}
export HL_BATCH_SCHED_SAMPLES=${HL_BATCH_SCHED_SAMPLES:-0 61524 350311035}
exec "$python" -m megatron.launch --family gaudi-llama --train-samples 1831085920 --lr-warmup-samples 8192000 \
  --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --lr-decay-style cosine \
  --log-validation-ppl-to-tensorboard --log-batch-size-to-tensorboard --log-timers-to-tensorboard "$@"
