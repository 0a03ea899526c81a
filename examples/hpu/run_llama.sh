#!/usr/bin/env bash
# LLaMA 1, 2 and 3.1 on Intel Gaudi, driven by the HL_* variables of Intel's script: docs/gaudi.md lists them all.
#   HL_NUM_NODES=1 HL_PP=2 HL_TP=2 HL_DP=2 bash examples/hpu/run_llama.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(python3 tools/environment.py --extras plot)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

export DEVICE=${DEVICE:-hpu} PRECISION=${PRECISION:-bf16}
exec "$python" -m megatron.launch --family gaudi-llama \
  --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --lr-decay-style cosine \
  --log-validation-ppl-to-tensorboard --log-batch-size-to-tensorboard --log-timers-to-tensorboard "$@"
