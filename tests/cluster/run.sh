#!/usr/bin/env bash
# Usage: bash tests/cluster/run.sh [pytest's options]. Runs the launchers with the real Slurm, MPI, pdsh and ssh on two
# nodes that are namespaces of this machine. Needs root, and installs Debian's packages where they are missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec </dev/null
packages=(slurm-wlm munge openmpi-bin pdsh openssh-server openssh-client iproute2 procps)
if ! dpkg --status "${packages[@]}" >/dev/null 2>&1; then
  policy=/usr/sbin/policy-rc.d  # Debian asks it before it starts what it has installed; nothing is to run on this machine
  if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
  fi
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${packages[@]}"
fi
python=$(python3 tools/environment.py --extras test,hf,plot,data)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
TEST_CLUSTER=1 "$python" -m pytest tests/cluster "$@"
