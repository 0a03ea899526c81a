#!/usr/bin/env bash
# From text to a trained LLaMA on a CPU, with two processes: environment, corpus, tokenizer, training, resume, sample.
# Every setting can be given in the environment; flags go to the training runs. See tools/quickstart.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(python3 tools/environment.py --extras plot)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

export OUTPUT_DIR=${OUTPUT_DIR:-runs/cpu_llama}
export PRESET=${PRESET:-llama-mini} DEVICE=cpu
export SEQ_LENGTH=${SEQ_LENGTH:-256} MICRO_BATCH=${MICRO_BATCH:-4} GLOBAL_BATCH=${GLOBAL_BATCH:-8}
export TRAIN_ITERS=${TRAIN_ITERS:-400} LR=${LR:-2e-3} MIN_LR=${MIN_LR:-1e-4} LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-40}
export EVAL_INTERVAL=${EVAL_INTERVAL:-100} EVAL_ITERS=${EVAL_ITERS:-8} LOG_INTERVAL=${LOG_INTERVAL:-10}
exec "$python" tools/quickstart.py --lr-decay-style cosine "$@"
