#!/usr/bin/env bash
# HL_LATEST_CHECKPOINT=checkpoints/global_step100 tools/ckpt_convert/convert_ds_to_universal.sh [further arguments]
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/convert_ds_to_universal.py" "$@"
