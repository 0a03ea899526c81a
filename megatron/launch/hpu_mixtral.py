"""The HL_* variables of Intel's `run_mixtral.sh` for Gaudi: those of the LLaMA script, and the experts."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.launch import hpu, hpu_rows
from megatron.launch.env import Family, Values, Variable, choice, value
from megatron.launch.hpu_rows import absent, row, truth, whole

_TOKENS_PER_STEP = 2**22
# The sizes of a layer of Mixtral 8x7B are those of LLaMA 3 8B; it reads longer texts.
_LARGE = ("--preset", "llama3-8b", "--rotary-base", "1000000", "--max-position-embeddings", "32768")
_SMALL = (
    *(*_LARGE[:4], "--num-layers", "8", "--hidden-size", "768", "--ffn-hidden-size", "3072"),
    *("--num-attention-heads", "16", "--num-key-value-heads", "8"),
)
_MODELS: Mapping[str, tuple[str, ...]] = {"8x7b": _LARGE, "small": _SMALL}
_EXPERTS = {"8x7b": "8", "small": "4"}
_LENGTHS = {"8x7b": "32768", "small": "256"}
_TAKEN_AWAY = ("HL_LLAMA_VER", "HL_LLAMA_MODEL_SIZE", "HL_CKP_ACT", "HL_NO_PIPELINE_PARALLEL", "HL_UNIV_CP")


def _experts(text: str, values: Values) -> tuple[str, ...]:
    tensor_parallel = values.get("HL_MOE_ENABLE_EXPERT_TP", "0")
    if whole(values, "HL_TP") > 1 and tensor_parallel not in ("1", "true"):
        raise ValueError(f"with HL_TP={values['HL_TP']} needs HL_MOE_ENABLE_EXPERT_TP=1")
    return ("--num-experts", text, "--topk", "2", "--moe-loss-coeff", "0.02", "--expert-interval", "1")


_NO_BINS = "experts take any number of tokens, without bins"
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
    choice("HL_CKP_ACT", hpu_rows.RECOMPUTE, "recompute in the backward pass: 0 nothing, 1 and 4 layers, 2 attention"),
    absent("HL_MOE_NUM_CAPACITY_BINS", "0", _NO_BINS),
    absent("HL_MOE_CAPACITY_BINS", "", _NO_BINS),
    absent("HL_CAPACITY_BINS_EXP_BASE", "1.5", _NO_BINS),
    absent("HL_MOE_CAPACITY_BINS_ALIGNMENT", "64", _NO_BINS),
    absent("HL_MOE_CAPACITY_BINS_OPTIMIZE_INTERVAL", "300", _NO_BINS),
    absent("HL_MOE_CAPACITY_BINS_OPTIMIZE_MAX_GROUP", "4", _NO_BINS),
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
