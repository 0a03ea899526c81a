#!/usr/bin/env bash
# Mixtral on Intel Gaudi, driven by the HL_* variables of Intel's script: docs/gaudi.md lists them all.
#   HL_DP=8 bash examples/hpu/run_mixtral.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(python3 tools/environment.py --extras plot)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

export DEVICE=${DEVICE:-hpu} PRECISION=${PRECISION:-bf16}
exec "$python" -m megatron.launch --family gaudi-mixtral --disable-moe-token-dropping --lr 3e-4 --min-lr 3e-6 \
  --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --weight-decay 0.1 --clip-grad 1.0 --lr-decay-style cosine \
  --log-validation-ppl-to-tensorboard --log-batch-size-to-tensorboard --log-timers-to-tensorboard "$@"
