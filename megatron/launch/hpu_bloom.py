"""The HL_* variables of Intel's `run_bloom13b.sh` for Gaudi."""

from __future__ import annotations

from megatron.launch import hpu_rows
from megatron.launch.env import Family, Values, Variable, choice, value
from megatron.launch.hpu_rows import absent, row

_CORPUS = "meg-gpt2_text_document"
_RAMPUP = ("--rampup-batch-size", "16", "16", "5000000")


def _data(text: str, values: Values) -> tuple[str, ...]:
    return ("--data-path", f"{text.rstrip('/')}/{_CORPUS}")


def _tokenizer(text: str, values: Values) -> tuple[str, ...]:
    folder = text.rstrip("/")
    files = ("--vocab-file", f"{folder}/gpt2-vocab.json", "--merge-file", f"{folder}/gpt2-merges.txt")
    return ("--tokenizer-type", "GPT2BPETokenizer", *files)


VARIABLES: tuple[Variable, ...] = (
    row("HL_DATA_DIR_ROOT", _data, hpu_rows.DATA_FLAGS, f"folder of {_CORPUS}.bin and .idx and of GPT-2's vocabulary"),
    row("HL_DATA_DIR_ROOT", _tokenizer, ("--tokenizer-type", "--vocab-file", "--merge-file"), ""),
    value("HL_NUM_LAYERS", "--num-layers", "layers, instead of the model's 40"),
    value("HL_MICRO_BATCH", "--micro-batch-size", "samples per card at once"),
    choice("HL_RAMPUP_BS", {"0": (), "1": _RAMPUP}, "1 grows the batch from 16 by 16 over 5 million samples"),
    hpu_rows.CKP_ACT,
)
ABSENT: tuple[Variable, ...] = (
    absent("HL_USE_HPU", "1", "DEVICE chooses another device"),
    absent("HL_NGPU_PER_NODE", "", "call it HL_DEVICES_PER_NODE"),
    absent("HL_QNPU_DIR", "", "activate that environment before the launch"),
)


def defaults(chosen: Values) -> Values:
    """The values of unset variables: those of the script."""
    values = {
        **hpu_rows.layout(tp="4", pp="1"),
        "HL_DATA_DIR_ROOT": "/data/bigscience/oscar-en",
        "HL_MICRO_BATCH": "1",
        "HL_RAMPUP_BS": "1",
        **chosen,
    }
    folder = (
        f"bloom13b/{values.get('EXP_NAME', 'default')}_mb{values['HL_MICRO_BATCH']}"
        f"_D{hpu_rows.copies(values)}_T{values['HL_TP']}_P{values['HL_PP']}"
    )
    return {**values, **hpu_rows.output(values, folder)}


BLOOM = Family(
    prefix=hpu_rows.PREFIX,
    variables=(*hpu_rows.LAUNCH, *hpu_rows.LAYOUT, *VARIABLES, *hpu_rows.OUTPUT, *ABSENT),
    defaults=defaults,
)
