#!/usr/bin/env bash
# From text to a trained LLaMA on a CPU, with two processes: environment, corpus, tokenizer, training, resume, sample.
# Every setting can be given in the environment; flags go to the training runs. See tools/quickstart.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(python3 tools/environment.py --extras plot)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

export OUTPUT_DIR=${OUTPUT_DIR:-runs/cpu_llama}
export PRESET=${PRESET:-llama-mini} DEVICE=cpu PRECISION=${PRECISION:-bf16}
export SEQ_LENGTH=${SEQ_LENGTH:-256} MICRO_BATCH=${MICRO_BATCH:-4} GLOBAL_BATCH=${GLOBAL_BATCH:-16}
export TRAIN_ITERS=${TRAIN_ITERS:-200} LR=${LR:-1e-3} MIN_LR=${MIN_LR:-1e-4} LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-20}
export EVAL_INTERVAL=${EVAL_INTERVAL:-50} EVAL_ITERS=${EVAL_ITERS:-4} LOG_INTERVAL=${LOG_INTERVAL:-10}
exec "$python" tools/quickstart.py --lr-decay-style cosine "$@"
