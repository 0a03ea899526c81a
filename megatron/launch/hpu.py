"""The HL_* variables of Intel's `run_llama.sh` for Gaudi: every name of it, and what became of it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron.config.presets import preset
from megatron.launch import hpu_models, hpu_rows
from megatron.launch.env import Family, Values, Variable, choice, value, words
from megatron.launch.hpu_models import Recipe
from megatron.launch.hpu_rows import absent, row, silent, truth, whole

_SENTENCEPIECE, _GPT2, _LLAMA3, _FOLDER = (
    *("GPTSentencePieceTokenizer", "GPT2BPETokenizer", "Llama3Tokenizer", "HFTokenizer"),
)
_TOKENIZERS = (_SENTENCEPIECE, _GPT2, _LLAMA3, _FOLDER)
_GPT2_FLAGS = ("--vocab-file", "--merge-file")


def _recipe(values: Values) -> Recipe:
    return hpu_models.llama(values["HL_LLAMA_VER"], values["HL_LLAMA_MODEL_SIZE"])[1]


def _of_model(flag: str, field: str, replaced_by: Sequence[str] = ()) -> Variable:
    """A row that gives `flag` what the table of models says."""

    def flags(text: str, values: Values) -> tuple[str, ...]:
        return (flag, getattr(_recipe(values), field))

    return row("HL_LLAMA_MODEL_SIZE", flags, (flag,), "", replaced_by=replaced_by)


def _positions(text: str, values: Values) -> tuple[str, ...]:
    """Room for samples that are longer than the published model's."""
    room = preset(_recipe(values).preset).settings["max_position_embeddings"]
    return ("--max-position-embeddings", text) if whole(values, "HL_SEQ_LEN") > room else ()


def _tokenizer_files(text: str, values: Values) -> tuple[str, ...]:
    if text != _GPT2:
        return ()
    folder = values["HL_DATA_DIR_ROOT"].rstrip("/")
    return ("--vocab-file", f"{folder}/gpt2-vocab.json", "--merge-file", f"{folder}/gpt2-merges.txt")


def _tokenizer_model(text: str, values: Values) -> tuple[str, ...]:
    if values["HL_TOKENIZER_TYPE"] == _GPT2:
        raise ValueError(f"is of no use: HL_TOKENIZER_TYPE={_GPT2} reads gpt2-vocab.json and gpt2-merges.txt")
    return ("--tokenizer-model", text)


def _data(text: str, values: Values) -> tuple[str, ...]:
    return ("--data-path", f"{values['HL_DATA_DIR_ROOT'].rstrip('/')}/{text}")


def _profile_steps(text: str, values: Values) -> tuple[str, ...]:
    if "HL_PROFILE" not in values:
        raise ValueError("says nothing without HL_PROFILE")
    return ("--profile-steps", text)


def _is_on(values: Values, name: str) -> bool:
    return values.get(name, "0").lower() in ("1", "true")


MODEL: tuple[Variable, ...] = (
    silent("HL_LLAMA_VER", "1, 2 or 3.1", "see HL_LLAMA_MODEL_SIZE"),
    row(
        *("HL_LLAMA_MODEL_SIZE", lambda text, values: ("--preset", _recipe(values).preset), ("--preset",)),
        "7, 13 or 65; 7, 13, 34 or 70; 8, 70 or 405: the model, its learning rate, warm-up and epsilon of Adam",
    ),
    _of_model("--lr", "lr"),
    _of_model("--min-lr", "min_lr"),
    _of_model("--lr-warmup-iters", "warmup_iters", ("--lr-warmup-samples", "--lr-warmup-fraction")),
    _of_model("--adam-eps", "adam_eps"),
    value("HL_NUM_LAYERS", "--num-layers", "layers, instead of the model's"),
    value("HL_SEQ_LEN", "--seq-length", "tokens per sample"),
    row("HL_SEQ_LEN", _positions, ("--max-position-embeddings",), "", note="the model has room for it"),
    choice(
        *("HL_POSITION_EMBEDDING_TYPE", {"rotary": (), "alibi": ("--position-embedding-type", "alibi")}),
        "rotary or alibi",
    ),
    value("HL_DROPOUT", "--attention-dropout", "dropout probability of attention and of hidden states"),
    value("HL_DROPOUT", "--hidden-dropout", ""),
)
DATA: tuple[Variable, ...] = (
    silent("HL_DATA_DIR_ROOT", "folder of the data and of the tokenizer", "see HL_DATA_FILE_PREFIX"),
    row("HL_DATA_FILE_PREFIX", _data, hpu_rows.DATA_FLAGS, "name of the .bin and .idx files, without the ending"),
    value("HL_DATA_CACHE_DIR", "--data-cache-path", "folder for the sample indices, where that of the data is shut"),
    choice(
        *("HL_TOKENIZER_TYPE", {name: ("--tokenizer-type", name) for name in _TOKENIZERS}),
        ", ".join(_TOKENIZERS),
    ),
    row(
        *("HL_TOKENIZER_TYPE", _tokenizer_files, _GPT2_FLAGS, ""),
        note="see HL_TOKENIZER_MODEL",
        replaced_by=("--tokenizer-type",),
    ),
    row(
        *("HL_TOKENIZER_MODEL", _tokenizer_model, ("--tokenizer-model",)),
        "its file or folder; tokenizer.model beside the data unless given",
        replaced_by=("--tokenizer-type", *_GPT2_FLAGS),
    ),
    truth("HL_TRUST_REMOTE_CODE", ("--trust-remote-code",), (), "without effect: code from a folder is never run"),
)
TRAINING: tuple[Variable, ...] = (
    value("HL_MICRO_BATCH", "--micro-batch-size", "samples per card at once"),
    row(
        *("HL_GBS", lambda text, values: ("--global-batch-size", text), ("--global-batch-size",)),
        "samples per step over all cards",
        replaced_by=("--scheduler-batch-size",),
    ),
    row(
        *("HL_TRAIN_ITERS", lambda text, values: ("--train-iters", text), ("--train-iters",), "steps"),
        replaced_by=("--train-samples",),
    ),
    value("HL_EVAL_ITERS", "--eval-iters", "batches per evaluation; -1 is the whole set"),
    value("HL_EVAL_INTERVAL", "--eval-interval", "steps between evaluations"),
    choice(
        *("HL_OPTIMIZER", {name: ("--optimizer", name) for name in ("adam", "sgd", "adamw", "fusedadamw")}),
        "adam, sgd, adamw, or fusedadamw to insist on the fused one",
    ),
    value("HL_ZERO_STAGE", "--zero-stage", "what is sharded over the data-parallel ranks: 0 to 3"),
    truth("HL_SEQ_PARALLEL", ("--sequence-parallel",), (), "1 shards activations between layers over the TP ranks"),
    hpu_rows.CKP_ACT,
    choice(
        "HL_GRAD_ACCUM_DTYPE",
        {"fp32": ("--accumulate-allreduce-grads-in-fp32",), "bf16": ("--grad-reduce-in-bf16",)},
        "format that gradients are summed in: fp32 or bf16",
    ),
    truth(
        *("HL_IMMEDIATE_GRAD_UPDATE", (), (), "without effect: gradients are always added up as they are computed"),
        note="gradients are always added up as they are computed",
    ),
    truth("HL_NO_PIPELINE_PARALLEL", ("--no-pipeline-parallel",), (), "1 refuses HL_PP above 1"),
)
SCHEDULE: tuple[Variable, ...] = (
    words("HL_SCHEDULER_BATCH_SIZE", "--scheduler-batch-size", "samples per step of every part of the run"),
    words("HL_BATCH_SCHED_SAMPLES", "--batch-sched-samples", "where every part begins, in samples: 0 61524 350311035"),
    words("HL_SCHEDULER_SEQ_LEN", "--scheduler-seq-length", "tokens per sample of every part; an addition of ours"),
    value("HL_STOP_AFTER_NUM_SAMPLES", "--stop-after-num-samples", "save and stop after so many samples"),
)
KERNELS: tuple[Variable, ...] = (
    truth(
        *("HL_USE_FUSED_SDPA", ("--use-fused-sdpa", "true"), ("--use-fused-sdpa", "false")),
        "1 insists on the fused attention, 0 does without; the device's best unless given",
    ),
    truth(
        *("HL_USE_FUSED_RMSNORM", ("--use-fused-rmsnorm", "true"), ("--use-fused-rmsnorm", "false")),
        "1 insists on the fused RMSNorm, 0 does without; the device's best unless given",
    ),
    truth(
        *("HL_USE_FUSED_SDPA_WITH_RECOMPUTE", ("--use-fused-sdpa-with-recompute", "true"), ()),
        "1 lets the fused attention compute its weights again in backward, not keep them",
    ),
    truth("HL_USE_FAST_SOFTMAX", ("--use-fast-softmax",), (), "1 takes the fused attention's approximate softmax"),
    row("HL_USE_LAZY_MODE", hpu_rows.lazily, (), "PT_HPU_LAZY_MODE; what this build of torch can do unless given"),
    row("HL_USE_TORCH_COMPILE", hpu_rows.compiled, ("--use-torch-compile",), "1 compiles each layer, in eager mode"),
    absent("HL_USE_TORCH_COMPILED_AUTOGRAD", "0", "HL_USE_TORCH_COMPILE=1 compiles the backward pass as well"),
    absent("HL_COMPILED_AUTOGRAD_FALLBACK_MODE", "nothing", "there is no compiled autograd to fall back from"),
    row(
        *("HL_PROFILE", lambda text, values: ("--profile", text), ("--profile",)),
        "pt, pt-full, or hltv for Synapse's own profiler",
    ),
    row("HL_PROFILE", hpu_rows.profiled, (), "", note="only hltv needs a variable"),
    row("HL_PROFILE_STEPS", _profile_steps, ("--profile-steps",), "first and last step that is profiled: 3,4"),
)


def _is_eight_bit(values: Values) -> bool:
    return _is_on(values, "HL_USE_TRANSFORMER_ENGINE")


_Flags = Callable[[str, Values], tuple[str, ...]]


def _with_engine(flags: _Flags) -> _Flags:
    """The flags of something that there is with 8-bit numbers only."""

    def checked(text: str, values: Values) -> tuple[str, ...]:
        found = flags(text, values)
        if found and not _is_eight_bit(values):
            raise ValueError("says nothing without HL_USE_TRANSFORMER_ENGINE=1")
        return found

    return checked


def _eight_bit(name: str, flag: str, help: str) -> Variable:
    """A number or word of the 8-bit formats."""
    return row(name, _with_engine(lambda text, values: (flag, text)), (flag,), help)


def _format(text: str, values: Values) -> tuple[str, ...]:
    if text not in ("hybrid", "e5m2"):
        raise ValueError("is none of hybrid, e5m2")
    return (f"--fp8-{text}",)


def _reduces(text: str, values: Values) -> tuple[str, ...]:
    if text not in ("0", "1"):
        raise ValueError("is none of 0, 1")
    return ("--fp8-amax-reduce",) if text == "1" else ("--no-fp8-amax-reduce",)


def _caches(name: str, flag: str, *words: str) -> Variable:
    def flags(text: str, values: Values) -> tuple[str, ...]:
        return (flag, *words) if hpu_rows.is_true(text) else ()

    help = "1 makes the 8-bit form of a weight once per step and keeps it"
    return row(name, _with_engine(flags), (flag,), help, note="it is off")


def _passes(values: Values) -> int:
    """Forward passes of a rank in a step."""
    return whole(values, "HL_GBS") // (whole(values, "HL_MICRO_BATCH") * hpu_rows.copies(values))


def _interval(text: str, values: Values) -> tuple[str, ...]:
    """Scales are measured over whole steps: at least as often as asked for."""
    passes, interval = _passes(values), whole(values, "HL_FP8_MEASURE_INTERVAL")
    if interval > passes and interval % passes:
        raise ValueError(f"must be a multiple of {passes}, the forward passes of a step, or less")
    return ("--fp8-interval", str(max(1, interval // passes)))


EIGHT_BIT: tuple[Variable, ...] = (
    truth(
        *("HL_USE_TRANSFORMER_ENGINE", ("--transformer-impl", "transformer_engine"), ()),
        "1 computes linear layers in 8 bits",
    ),
    row("HL_FP8_FORMAT", _with_engine(_format), ("--fp8-hybrid", "--fp8-e5m2"), "hybrid or e5m2"),
    _eight_bit("HL_FP8_MARGIN", "--fp8-margin", "margin of the scale, a power of 2"),
    _eight_bit("HL_FP8_AMAX_RECOMPUTE_ALGO", "--fp8-amax-compute-algo", "max or most_recent"),
    row(
        *("HL_FP8_MEASURE_INTERVAL", _with_engine(_interval), ("--fp8-interval",)),
        "forward passes per measurement, which are made over whole steps: at most once, or every so many",
    ),
    _eight_bit("HL_FP8_AMAX_HISTORY_LEN", "--fp8-amax-history-len", "measurements a scale follows from; as many"),
    row(
        *("HL_FP8_AMAX_REDUCE", _with_engine(_reduces), ("--fp8-amax-reduce", "--no-fp8-amax-reduce")),
        "1 takes the maximum over ranks",
    ),
    truth(
        *("HL_FP8_MANUAL_MODE", (), ()),
        "without effect: measurements follow HL_FP8_MEASURE_INTERVAL",
        note="measurements follow HL_FP8_MEASURE_INTERVAL",
    ),
    _caches("HL_USE_CACHE_FP8_WEIGHT", "--cache-fp8-weight"),
    _caches("HL_USE_CACHE_FP8_WEIGHT_FWD", "--cache-fp8-weight-fwd", "true"),
)
_LOGGED = ("--log-model-inputs", "--log-fwd-activations", "--log-bwd-grads")


def _with(switch: str, name: str, off: str, flag: str, help: str) -> Variable:
    """A variable that says more about what another one turns on; without that only `off`, its value in the script."""

    def flags(text: str, values: Values) -> tuple[str, ...]:
        if _is_on(values, switch):
            return (flag, text)
        if text != off:
            raise ValueError(f"says nothing without {switch}=1")
        return ()

    return row(name, flags, (flag,), help, note=f"{switch} is off")


PROBES: tuple[Variable, ...] = (
    truth("HL_TENSOR_LOGGER", _LOGGED, (), "1 writes what passes through the modules in some iterations"),
    _with("HL_TENSOR_LOGGER", "HL_TENSOR_LOGGER_DIR", "", "--tensor-logger-path", "folder for it"),
    _with("HL_TENSOR_LOGGER", "HL_TENSOR_LOGGER_START_ITER", "0", "--tensor-logger-start-iter", "first of them"),
    _with("HL_TENSOR_LOGGER", "HL_TENSOR_LOGGER_END_ITER", "0", "--tensor-logger-end-iter", "last of them"),
    truth("HL_CHECK_TP_NORM", ("--check-tp-norm",), (), "1 compares what TP ranks hold alike"),
    _with("HL_CHECK_TP_NORM", "HL_CHECK_TP_NORM_TYPE", "all", "--check-tp-norm-type", "all, io or wb"),
    _with("HL_CHECK_TP_NORM", "HL_START_CHECK_TP_NORM_ITER", "-1", "--start-check-tp-norm-iter", "first iteration"),
    _with("HL_CHECK_TP_NORM", "HL_END_CHECK_TP_NORM_ITER", "-1", "--end-check-tp-norm-iter", "last iteration"),
)
ABSENT: tuple[Variable, ...] = (
    absent("HL_QNPU_DIR", "", "activate that environment before the launch"),
    absent("HL_LATEST_CHECKPOINT", "", "HL_CHECKPOINTS_DIR holds it, and nothing is converted"),
    absent("HL_DATASET_NAME", "", "since 1.16 it is HL_DATA_FILE_PREFIX and HL_TOKENIZER_TYPE"),
    absent("HL_TORCH_COMPILE_BACKEND", "", "HL_USE_TORCH_COMPILE=1 takes that of the device"),
)


def _eight_bit_defaults(values: Values) -> Values:
    if not _is_eight_bit(values):
        return {}
    passes = str(_passes(values))
    return {
        "HL_FP8_FORMAT": "hybrid",
        "HL_FP8_MARGIN": "0",
        "HL_FP8_AMAX_RECOMPUTE_ALGO": "max",
        "HL_FP8_MEASURE_INTERVAL": passes,
        "HL_FP8_AMAX_HISTORY_LEN": passes,
    }


def llama_defaults(chosen: Values) -> Values:
    """The values of unset variables: those of the script of Intel's release 1.15, in which LLaMA 13B is the default."""
    version = chosen.get("HL_LLAMA_VER", "1")
    size, recipe = hpu_models.llama(version, chosen.get("HL_LLAMA_MODEL_SIZE"))
    root = chosen.get("HL_DATA_DIR_ROOT", "/data/datasets/red_pajama")
    values = {
        **hpu_rows.layout(tp="2", pp="2"),
        "HL_LLAMA_VER": version,
        "HL_LLAMA_MODEL_SIZE": size,
        "HL_SEQ_LEN": recipe.seq_length,
        "HL_GBS": recipe.global_batch,
        "HL_MICRO_BATCH": "1",
        "HL_TRAIN_ITERS": recipe.train_iters,
        "HL_EVAL_ITERS": "100",
        "HL_EVAL_INTERVAL": "1000",
        "HL_OPTIMIZER": "adamw",
        "HL_ZERO_STAGE": "0",
        "HL_SEQ_PARALLEL": "1",
        "HL_DATA_DIR_ROOT": root,
        "HL_DATA_FILE_PREFIX": "redpajama",
        "HL_TOKENIZER_TYPE": recipe.tokenizer,
        **chosen,
    }
    if values["HL_TOKENIZER_TYPE"] in (_SENTENCEPIECE, _LLAMA3):
        values.setdefault("HL_TOKENIZER_MODEL", f"{root.rstrip('/')}/tokenizer.model")
    folder = (
        f"llama{version}_{size}b/{values.get('EXP_NAME', 'default')}_z{values['HL_ZERO_STAGE']}_gb{values['HL_GBS']}"
        f"_mb{values['HL_MICRO_BATCH']}_sp{values['HL_SEQ_PARALLEL']}"
        f"_D{hpu_rows.copies(values)}_T{values['HL_TP']}_P{values['HL_PP']}"
    )
    output = hpu_rows.output(values, folder)
    if _is_on(values, "HL_TENSOR_LOGGER"):
        output["HL_TENSOR_LOGGER_DIR"] = f"{output['HL_RESULTS_DIR']}/tensordumps"
    return {**values, **output, **_eight_bit_defaults(values)}


LLAMA = Family(
    prefix=hpu_rows.PREFIX,
    variables=(
        *(
            *hpu_rows.LAUNCH,
            *hpu_rows.LAYOUT,
            *MODEL,
            *DATA,
            *TRAINING,
            *SCHEDULE,
            *KERNELS,
            *EIGHT_BIT,
            *hpu_rows.OUTPUT,
        ),
        *PROBES,
        *ABSENT,
    ),
    defaults=llama_defaults,
)
