#!/usr/bin/env bash
# LLaMA 2 70B on AWS Trainium with TP 8 and PP 8.
#   sbatch --exclusive --nodes 32 --wrap="srun --ntasks-per-node=1 bash examples/neuron/run_llama2_70B_tp_pp.sh"
# COMPILE_ONLY=1 runs ten steps to fill the compiler's cache. See docs/trainium.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(python3 tools/environment.py --extras plot)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

export DEVICE=${DEVICE:-neuron} FI_PROVIDER=${FI_PROVIDER:-efa} FI_EFA_USE_DEVICE_RDMA=${FI_EFA_USE_DEVICE_RDMA:-1}
export FI_EFA_FORK_SAFE=${FI_EFA_FORK_SAFE:-1} MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-128}
export DATA_PATH=${DATA_PATH:-$HOME/examples_datasets/wikicorpus_text_document}
export TOKENIZER_TYPE=${TOKENIZER_TYPE:-Llama2Tokenizer} TOKENIZER_MODEL=${TOKENIZER_MODEL:-.}
export CHECKPOINT_DIR=${CHECKPOINT_DIR:-runs/neuron_llama2-70b}
export PRESET=${PRESET:-llama2-70b} TP_DEGREE=${TP_DEGREE:-8} PP_DEGREE=${PP_DEGREE:-8}
export VPP_DEGREE=${VPP_DEGREE:-1} PRECISION=${PRECISION:-bf16} SEQ_LENGTH=${SEQ_LENGTH:-4096}
export MICRO_BATCH=${MICRO_BATCH:-1} GBS=${GBS:-1024} TRAIN_ITERS=${TRAIN_ITERS:-30000}
export LR=${LR:-1.5e-4} MIN_LR=${MIN_LR:-1e-5} LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-2000}
export NPROC=${NPROC:-32} MASTER_PORT=${MASTER_PORT:-44000} SAVE_INTERVAL=${SAVE_INTERVAL:-1000}
export LOG_INTERVAL=${LOG_INTERVAL:-1}
exec "$python" -m megatron.launch --family neuron --sequence-parallel --use-distributed-optimizer \
  --recompute-granularity selective --lr-decay-style cosine --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 "$@"
