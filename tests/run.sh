#!/usr/bin/env bash
# Usage: bash tests/run.sh [quick|all]. Sets up what it needs, then runs lint, types and tests; `quick` leaves the slow
# tests out. Where there is an NVIDIA GPU, the tests that need one run after the others, which do not see it.
# The tests show how many percent of them are done, and at the end the 15 slowest.
# See tools/environment.py for which Python it takes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null
case "${1:-all}" in
  all) selection=() ;;
  quick) selection=(-m "not slow") ;;
  *) echo "usage: bash tests/run.sh [quick|all]" >&2; exit 2 ;;
esac
python=$(python3 tools/environment.py --extras test,hf,plot,data)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
echo "== ruff" && "$python" -m ruff check .
echo "== mypy" && "$python" -m mypy
echo "== pytest" && "$python" -m pytest --numprocesses=2 --dist=loadfile --durations=15 --durations-min=1 \
  ${selection[@]+"${selection[@]}"} "${@:2}"
if compgen -G "/dev/nvidia[0-9]*" >/dev/null; then
  echo "== pytest, on the GPU" && "$python" -m pytest -m gpu --durations=15
fi
