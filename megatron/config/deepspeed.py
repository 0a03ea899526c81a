"""DeepSpeed's JSON file: how it and the flags say the same, and what DeepSpeed is given in the end.

A value in the file fills a setting whose flag was not given, "auto" takes the value of the setting, and a flag and a
file that differ are refused with both places named.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.parser import shown

if TYPE_CHECKING:
    from megatron.config.run import RunConfig

AUTO = "auto"
_SILENT = 10**9  # steps between DeepSpeed's own log lines


class DocumentError(ValueError):
    """A DeepSpeed file that cannot be read."""


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a number")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _stage(value: Any) -> int:
    if isinstance(value, bool) or value not in (0, 1, 2, 3):
        raise ValueError("one of 0, 1, 2, 3")
    return int(value)


def _word(words: Mapping[str, Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, str) or value.lower() not in words:
            raise ValueError("one of " + ", ".join(words))
        return words[value.lower()]

    return read


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Link:
    """A key of the file (a path with dots) and the setting that says the same."""

    key: str
    setting: str
    read: Callable[[Any], Any]  # value in the file -> value of the setting; raises ValueError with what is allowed
    write: Callable[[Any], Any] = _same


_ADAM = ("adam", "adamw", "fusedadamw")
LINKS: tuple[Link, ...] = (
    Link("train_batch_size", "global_batch_size", _whole),
    Link("train_micro_batch_size_per_gpu", "micro_batch_size", _whole),
    Link("gradient_clipping", "clip_grad", _number),
    Link("bf16.enabled", "bf16", _truth),
    Link("fp16.enabled", "fp16", _truth),
    Link("zero_optimization.stage", "zero_stage", _stage),
)
# Written only where the setting says something that the file does not: it may say more (nvme), or how.
OPTIONAL_LINKS: tuple[Link, ...] = (
    Link(
        "zero_optimization.offload_optimizer.device",
        "cpu_optimizer",
        _word({"cpu": True, "nvme": True, "none": False}),
        lambda on_host: "cpu" if on_host else "none",
    ),
    Link(
        "zero_optimization.offload_param.device",
        "remote_device",
        _word({device: device for device in ("cpu", "nvme", "none")}),
    ),
    Link("zero_optimization.overlap_comm", "overlap_grad_reduce", _truth),
)
FLOAT16_LINKS: tuple[Link, ...] = (
    Link("fp16.loss_scale", "loss_scale", lambda value: _number(value) or None, lambda value: value or 0),
    Link(
        "fp16.initial_scale_power",
        "initial_loss_scale",
        lambda power: 2.0 ** _whole(power),
        lambda scale: round(math.log2(scale)),
    ),
    Link("fp16.loss_scale_window", "loss_scale_window", _number, int),
    Link("fp16.hysteresis", "hysteresis", _whole),
    Link("fp16.min_loss_scale", "min_loss_scale", _number),
)
OPTIMIZER_LINKS: tuple[Link, ...] = (
    Link("optimizer.type", "optimizer", _word(dict.fromkeys((*_ADAM, "fusedadam"), "adam") | {"sgd": "sgd"})),
    Link("optimizer.params.lr", "lr", _number),
    Link("optimizer.params.betas.0", "adam_beta1", _number),
    Link("optimizer.params.betas.1", "adam_beta2", _number),
    Link("optimizer.params.eps", "adam_eps", _number),
    Link("optimizer.params.weight_decay", "weight_decay", _number),
)
# Recomputation is this project's own, for both engines.
ACTIVATION_LINKS = (Link("activation_checkpointing.cpu_checkpointing", "checkpoint_in_cpu", _truth),)
REFUSED_SECTIONS: Mapping[str, str] = {
    "scheduler": "the learning rate follows --lr, --lr-decay-style and their family",
    "amp": "use --fp16 or --bf16",
    "bfloat16": "call it bf16",
    "curriculum_learning": "every step trains on full sequences",
    "data_efficiency": "every step trains on full sequences",
}


def read_document(path: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DocumentError: it is missing, is no JSON object, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise DocumentError(f"--deepspeed_config {path}: {twice[0]} occurs twice")
        return dict(pairs)

    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise DocumentError(f"--deepspeed_config {path}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError(f"--deepspeed_config {path}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise DocumentError(f"--deepspeed_config {path}: must be a JSON object")
    return document


def settings_of(document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings that a file gives, and one sentence for each value that cannot be understood."""
    settings: dict[str, Any] = {}
    problems = list(_refused(document))
    for link in _links(document):
        value = _lookup(document, link.key)
        if value in (None, AUTO):
            continue
        try:
            settings[link.setting] = link.read(value)
        except ValueError as allowed:
            problems.append(f"{link.key} = {json.dumps(value)} in DeepSpeed's JSON: must be {allowed}")
    return settings, problems


def _links(document: Mapping[str, Any]) -> tuple[Link, ...]:
    """The links that mean something in this file: a loss scale does only beside float16."""
    float16 = FLOAT16_LINKS if _lookup(document, "fp16.enabled") in (True, AUTO) else ()
    return LINKS + OPTIONAL_LINKS + float16 + OPTIMIZER_LINKS + ACTIVATION_LINKS


def _refused(document: Mapping[str, Any]) -> Iterator[str]:
    for key, reason in REFUSED_SECTIONS.items():
        section = document.get(key)
        if section and not (isinstance(section, dict) and section.get("enabled") is False):
            yield f"{key} in DeepSpeed's JSON: {reason}; remove the section"
    if _lookup(document, "activation_checkpointing.partition_activations") is True:
        yield (
            "activation_checkpointing.partition_activations = true in DeepSpeed's JSON: recomputed layers keep their "
            "input on every rank, or on its host (cpu_checkpointing); set it to false"
        )


def contradictions(document: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each setting that the file and the flags give different values."""
    values, _ = settings_of(document)
    keys = {link.setting: link.key for link in _links(document)}
    for name, value in values.items():
        if name in settings and _differs(name, settings[name], value):
            there = json.dumps(_lookup(document, keys[name]))
            yield f"{shown(name, settings[name])} and {keys[name]} = {there} in DeepSpeed's JSON: must agree"


def _differs(name: str, flag: Any, file: Any) -> bool:
    if name == "optimizer":
        return (flag in _ADAM) != (file in _ADAM)
    return bool(flag != file)


def accumulation_differs(document: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """One sentence if the file counts other micro-batches than the batch sizes give."""
    steps = document.get("gradient_accumulation_steps", AUTO)
    batch, micro, ranks = (settings[name] for name in ("global_batch_size", "micro_batch_size", "data_parallel_size"))
    if steps != AUTO and batch and micro and steps * micro * ranks != batch:
        yield (
            f"gradient_accumulation_steps = {steps} in DeepSpeed's JSON: must be --global-batch-size {batch} / "
            f"(--micro-batch-size {micro} x data-parallel size {ranks})"
        )


def offload_problems(document: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each thing that cannot be moved off the device as the file and the flags say."""
    stage = settings["zero_stage"]
    for part in ("offload_optimizer", "offload_param"):
        key = f"zero_optimization.{part}"
        device = settings["remote_device"] if part == "offload_param" else _lookup(document, f"{key}.device")
        if device == "nvme" and stage != 3:
            yield f'{key}.device = "nvme": only with --zero-stage 3, which is {stage}; take "cpu"'
        elif device == "nvme" and not _lookup(document, f"{key}.nvme_path"):
            yield f'{key}.device = "nvme": give {key}.nvme_path in DeepSpeed\'s JSON, a folder on that drive'


def merge(document: Mapping[str, Any], run: RunConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for a run: the file, with what the settings say filled in.

    The optimizer section goes, because the engine is given an optimizer that is made from the settings.

    Raises:
        ValueError: the file contradicts the settings, or holds "auto" where no setting says the same.
    """
    settings = run.values()
    problems = [*contradictions(document, settings), *accumulation_differs(document, settings)]
    result = copy.deepcopy({key: value for key, value in document.items() if key != "optimizer"})
    for link in LINKS + (FLOAT16_LINKS if run.precision.fp16 else ()):
        _store(result, link.key, link.write(settings[link.setting]))
    for link in OPTIONAL_LINKS:
        says, value = _lookup(result, link.key), settings[link.setting]
        if says == AUTO or (says is None and value not in (False, "none")):
            _store(result, link.key, link.write(value))
    if not run.precision.fp16:
        result["fp16"] = {"enabled": False}
    micro_batches = run.training.global_batch_size // (run.training.micro_batch_size * run.parallel.data_parallel_size)
    result["gradient_accumulation_steps"] = micro_batches
    for key, value in _defaults(run).items():
        if _lookup(result, key) in (None, AUTO):
            _store(result, key, value)
    for key, value in _sizes(run.model.hidden_size).items():
        if _lookup(result, key) == AUTO:
            _store(result, key, value)
    problems += [f'{key} = "auto" in DeepSpeed\'s JSON: no flag says the same; give a value' for key in _autos(result)]
    if problems:
        raise ValueError("\n".join(problems))
    return result


def _defaults(run: RunConfig) -> dict[str, Any]:
    """Keys that the file may leave out or set to "auto", and that DeepSpeed would not choose as this project needs."""
    defaults: dict[str, Any] = {"steps_per_print": _SILENT, "zero_allow_untested_optimizer": True}
    if run.optimizer.cpu_optimizer:
        defaults["zero_force_ds_cpu_optimizer"] = not run.optimizer.cpu_torch_adam
    if run.precision.bf16 and run.precision.accumulate_allreduce_grads_in_fp32:
        defaults |= {"data_types.grad_accum_dtype": "fp32", "communication_data_type": "fp32"}
    return defaults


def _sizes(hidden: int) -> dict[str, int]:
    """Buffer sizes, in elements, that "auto" stands for in files made for Hugging Face's trainer."""
    return {
        "zero_optimization.reduce_bucket_size": hidden * hidden,
        "zero_optimization.stage3_prefetch_bucket_size": 9 * hidden * hidden // 10,
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden,
    }


def _lookup(document: Any, key: str) -> Any:
    """The value at a path with dots; numbers index lists. None where there is none."""
    for part in key.split("."):
        if isinstance(document, Mapping):
            document = document.get(part)
        elif isinstance(document, list) and part.isdigit() and int(part) < len(document):
            document = document[int(part)]
        else:
            return None
    return document


def _store(document: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        document = document.setdefault(part, {})
    document[last] = value


def _autos(document: Any, path: str = "") -> Iterator[str]:
    """The paths of all values that are still "auto"."""
    if document == AUTO:
        yield path
    items = (
        document.items() if isinstance(document, Mapping) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from _autos(value, f"{path}.{key}" if path else str(key))
