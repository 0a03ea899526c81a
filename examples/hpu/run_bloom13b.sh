#!/usr/bin/env bash
# BLOOM 13B on Intel Gaudi, driven by the HL_* variables of Intel's script: docs/gaudi.md lists them all.
#   HL_NUM_NODES=1 HL_PP=2 HL_TP=4 HL_DP=1 bash examples/hpu/run_bloom13b.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(python3 tools/environment.py --extras plot)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

export DEVICE=${DEVICE:-hpu} PRECISION=${PRECISION:-bf16} PRESET=${PRESET:-bloom-13b} SEED=${SEED:-42}
exec "$python" -m megatron.launch --family gaudi-bloom --seq-length 2048 --global-batch-size 1024 \
  --train-samples 300000000 --lr-decay-samples 126953125 --lr-warmup-samples 216320 --lr-decay-style cosine \
  --optimizer adamw --lr 1e-4 --min-lr 1e-5 --adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-8 --weight-decay 0.1 \
  --clip-grad 1.0 --split 949,50,1 --eval-interval 100 --eval-iters 5 "$@"
