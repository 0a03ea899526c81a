#!/usr/bin/env bash
# LLaMA on NVIDIA GPUs: all of this machine's, or those of HOSTFILE. Every setting can be given in the environment.
#   DATA_PATH=/data/my_text_document TOKENIZER_MODEL=/data/tokenizer bash examples/gpu/run_llama.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${DATA_PATH:?set it to the prefix of the .bin and .idx files that tools/preprocess_data.py wrote}"
: "${TOKENIZER_MODEL:?set it to the folder or file of the tokenizer that the data was made with}"
python=$(python3 tools/environment.py --extras plot)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

export PRESET=${PRESET:-llama3.2-1b} TOKENIZER_TYPE=${TOKENIZER_TYPE:-HFTokenizer} DEVICE=cuda
export PRECISION=${PRECISION:-bf16} OUTPUT_DIR=${OUTPUT_DIR:-runs/gpu_llama}
export SEQ_LENGTH=${SEQ_LENGTH:-4096} MICRO_BATCH=${MICRO_BATCH:-1} GLOBAL_BATCH=${GLOBAL_BATCH:-64}
export TRAIN_ITERS=${TRAIN_ITERS:-1000} LR=${LR:-3e-4} MIN_LR=${MIN_LR:-3e-5} LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-50}
export SAVE_INTERVAL=${SAVE_INTERVAL:-500} EVAL_INTERVAL=${EVAL_INTERVAL:-500} EVAL_ITERS=${EVAL_ITERS:-10}
exec "$python" -m megatron.launch --lr-decay-style cosine --use-distributed-optimizer "$@"
