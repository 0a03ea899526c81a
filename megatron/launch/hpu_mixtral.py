"""The HL_* variables of Intel's `run_mixtral.sh` for Gaudi: those of the LLaMA script, and the experts."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.launch import hpu, hpu_rows
from megatron.launch.env import Family, Values, Variable, choice, value
from megatron.launch.hpu_rows import absent, row, truth, whole

_TOKENS_PER_STEP = 2**22
_MODELS: Mapping[str, tuple[str, ...]] = {
    model: ("--preset", f"mixtral-{model}") for model in ("8x7b", "small")
}
_EXPERTS = {"8x7b": "8", "small": "4"}
_LENGTHS = {"8x7b": "32768", "small": "256"}
_TAKEN_AWAY = ("HL_LLAMA_VER", "HL_LLAMA_MODEL_SIZE", "HL_NO_PIPELINE_PARALLEL", "HL_UNIV_CP")


def _experts(text: str, values: Values) -> tuple[str, ...]:
    tensor_parallel = values.get("HL_MOE_ENABLE_EXPERT_TP", "0")
    if whole(values, "HL_TP") > 1 and tensor_parallel not in ("1", "true"):
        raise ValueError(f"with HL_TP={values['HL_TP']} needs HL_MOE_ENABLE_EXPERT_TP=1")
    return ("--num-experts", text, "--topk", "2", "--moe-loss-coeff", "0.02", "--expert-interval", "1")


_BINS, _FITTED = "HL_MOE_NUM_CAPACITY_BINS", "HL_MOE_CAPACITY_BINS_OPTIMIZE"


def _of_bins(name: str, flag: str, help: str) -> Variable:
    """A variable that says more about bins; the script reads it only if there are any."""

    def flags(text: str, values: Values) -> tuple[str, ...]:
        return (flag, *text.split()) if text and values.get(_BINS, "0") != "0" else ()

    return row(name, flags, (flag,), help, note=f"{_BINS} is 0, or it says nothing")


MODEL: tuple[Variable, ...] = (
    choice("HL_MIXTRAL_MODEL", _MODELS, "8x7b or small"),
    row(
        "HL_MOE_NUM_EXPERTS", _experts, ("--num-experts", "--topk", "--moe-loss-coeff", "--expert-interval"), "experts"
    ),
    value("HL_MOE_EP", "--moe-expert-parallel-size", "ranks that share the experts"),
    truth("HL_MOE_ENABLE_EXPERT_TP", ("--enable-expert-tensor-parallelism",), (), "1 shares each expert over TP"),
    value("HL_MOE_MIN_CAP", "--moe-min-capacity", "tokens that every expert can take at least"),
    value("HL_LR_WARMUP_ITERS", "--lr-warmup-iters", "steps over which the learning rate rises"),
    value("HL_SEQ_LEN", "--seq-length", "tokens per sample"),
    hpu_rows.nonzero(_BINS, "--moe-num-capacity-bins", "numbers that the tokens of experts are rounded up to"),
    _of_bins("HL_MOE_CAPACITY_BINS", "--moe-capacity-bins", "these numbers: experts,number,number,..."),
    _of_bins("HL_CAPACITY_BINS_EXP_BASE", "--moe-capacity-bins-exp-base", "how much each of them grows"),
    _of_bins("HL_MOE_CAPACITY_BINS_ALIGNMENT", "--moe-capacity-bins-alignment", "what they are multiples of"),
    _of_bins(f"{_FITTED}_INTERVAL", "--moe-capacity-bins-optimize-interval", "only 0: the bins of a run stay"),
    _of_bins(f"{_FITTED}_MAX_GROUP", "--moe-capacity-bins-optimize-max-group", "layers fitted together"),
    absent("HL_MOE_USE_DATA_BEFORE_EXPERT_PARALLEL", "0", "the layout of the ranks is one and the same for all models"),
    absent("HL_PARTITIONED_MODE", "false", "a pipeline passes on whole activations"),
    truth("HL_VERIFY_CP", (), (), "without effect: every checkpoint is verified", note="every checkpoint is verified"),
    value("HL_CHECKPOINT_LOAD_TAG", "--ckpt-step", "iteration whose checkpoint is loaded"),
    absent("HL_RUN_EVAL_HARNESS", "0", "there is no harness of tasks"),
    absent("HL_EVAL_TASKS", "", "there is no harness of tasks"),
)


def defaults(chosen: Values) -> Values:
    """The values of unset variables: those of the script, but with a layout that it accepts."""
    model = chosen.get("HL_MIXTRAL_MODEL", "8x7b")
    if model not in _MODELS:
        raise ValueError(f"HL_MIXTRAL_MODEL={model} is none of {', '.join(_MODELS)}")
    values = {
        **hpu_rows.layout(tp="1", pp="1"),
        "HL_MIXTRAL_MODEL": model,
        "HL_MOE_NUM_EXPERTS": _EXPERTS[model],
        "HL_MOE_MIN_CAP": "64",
        "HL_CAPACITY_BINS_EXP_BASE": "1.5",
        "HL_MOE_CAPACITY_BINS_ALIGNMENT": "64",
        "HL_SEQ_LEN": _LENGTHS[model],
        "HL_MICRO_BATCH": "1",
        "HL_TRAIN_ITERS": "250000",
        "HL_EVAL_ITERS": "100",
        "HL_EVAL_INTERVAL": "1000",
        "HL_LR_WARMUP_ITERS": "2000",
        "HL_OPTIMIZER": "adamw",
        "HL_ZERO_STAGE": "0",
        "HL_SEQ_PARALLEL": "0",
        "HL_DATA_DIR_ROOT": "/data/datasets/oscar",
        "HL_DATA_FILE_PREFIX": "oscar",
        "HL_TOKENIZER_TYPE": "GPTSentencePieceTokenizer",
        **chosen,
    }
    values.setdefault("HL_GBS", str(_TOKENS_PER_STEP // whole(values, "HL_SEQ_LEN")))
    ranks = hpu_rows.copies(values) * whole(values, "HL_TP") * whole(values, "HL_PP")
    values.setdefault("HL_MOE_EP", str(min(whole(values, "HL_MOE_NUM_EXPERTS"), ranks)))
    if values["HL_TOKENIZER_TYPE"] == "GPTSentencePieceTokenizer":
        values.setdefault("HL_TOKENIZER_MODEL", f"{values['HL_DATA_DIR_ROOT'].rstrip('/')}/tokenizer.model")
    folder = (
        f"mixtral_{model}/{values.get('EXP_NAME', 'default')}_e{values['HL_MOE_NUM_EXPERTS']}"
        f"_D{hpu_rows.copies(values)}_T{values['HL_TP']}_P{values['HL_PP']}_E{values['HL_MOE_EP']}"
    )
    return {**values, **hpu_rows.output(values, folder)}


def _shared() -> tuple[Variable, ...]:
    """The rows of the LLaMA script that this one has, too."""
    rows = (*hpu_rows.LAUNCH, *hpu_rows.LAYOUT, *hpu.MODEL, *hpu.DATA, *hpu.TRAINING, *hpu.KERNELS, *hpu.EIGHT_BIT)
    other = {one.name for one in MODEL} | set(_TAKEN_AWAY)
    return tuple(one for one in (*rows, *hpu_rows.OUTPUT) if one.name not in other)


MIXTRAL = Family(prefix=hpu_rows.PREFIX, variables=(*_shared(), *MODEL), defaults=defaults)
