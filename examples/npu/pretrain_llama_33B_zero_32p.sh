#!/usr/bin/env bash
# The name that AscendSpeed gave to pretrain_llama_33B_ptd_32p.sh: ZeRO 1 in it is the sharded optimizer.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain_llama_33B_ptd_32p.sh" "$@"
