"""Flags that stand for a value of another setting, such as `--swiglu` for `--activation swiglu`.

They have no field of their own. A saved record holds them too, because tools written for Megatron look for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.plugins import PLUGINS
from megatron.config.schema import Kind, Option

SAME = object()  # the setting takes the value of the flag


@dataclass(frozen=True)
class Equivalent:
    """`option` given as `value` stands for `changes` (setting -> value)."""

    option: Option
    value: Any  # SAME: any value but the default
    changes: Mapping[str, Any]
    yields: bool = False  # the setting's own flag wins without being a contradiction


def _flag(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def _switch(*names: str, yields: bool = False, default: bool = False, dest: str = "", **changes: Any) -> Equivalent:
    meaning = " ".join(_flag(target) + ("" if value is True else f" {value}") for target, value in changes.items())
    option = Option(
        dest=dest or names[0].lstrip("-").replace("-", "_"),
        names=names,
        kind="switch",
        default=default,
        help=f"Same as {meaning}" + (", unless that flag is given." if yields else "."),
    )
    return Equivalent(option, not default, changes, yields)


def _value(name: str, kind: Kind, default: Any, target: str, choices: tuple[Any, ...] = ()) -> Equivalent:
    dest = name.lstrip("-").replace("-", "_")
    synonyms = {str(choice).lower(): choice for choice in choices}
    help = f"Same as {_flag(target)} with this value."
    option = Option(dest=dest, names=(name,), kind=kind, default=default, help=help, choices=choices, synonyms=synonyms)
    return Equivalent(option, SAME, {target: SAME})


_FUSED_SDPA = Option(
    dest="use_fused_sdpa",
    names=("--use-fused-sdpa",),
    kind="word",
    default=None,
    help="true is the same as --attention-backend fused, false as --attention-backend unfused.",
)
_FORMS: tuple[tuple[Option, str], ...] = (
    (
        Option(
            dest="use_fast_softmax",
            names=("--use-fast-softmax",),
            kind="switch",
            default=False,
            help="The fused attention of Gaudi with its approximate softmax: --op attention=fused_sdpa_fast.",
        ),
        "_fast",
    ),
    (
        Option(
            dest="use_fused_sdpa_with_recompute",
            names=("--use-fused-sdpa-with-recompute",),
            kind="word",
            default=False,
            help="The fused attention of Gaudi, which computes its weights again in backward: "
            "--op attention=fused_sdpa_recompute.",
        ),
        "_recompute",
    ),
)
"""Forms of an attention kernel, alone or together, and what they add to its name."""
_CACHE_FORWARD = Option(
    dest="cache_fp8_weight_fwd",
    names=("--cache-fp8-weight-fwd",),
    kind="word",
    default=None,
    help="Same as --cache-fp8-weight: a weight is cast once per step.",
)
_CHECKPOINT_POLICY = Option(
    dest="checkpoint_policy",
    names=("--checkpoint-policy",),
    kind="str",
    default=None,
    help="With --checkpoint-activations in AscendSpeed's scripts: all layers (full), those of --checkpoint_block_layer "
    "(block) or those of --recomputation-layer-num (custom).",
    choices=("full", "block", "custom"),
)
EQUIVALENTS: tuple[Equivalent, ...] = (
    _switch("--use-rotary-position-embeddings", position_embedding_type="rope"),
    _switch("--use-alibi-position-embeddings", position_embedding_type="alibi"),
    _switch(
        "--no-position-embedding",
        dest="add_position_embedding",
        default=True,
        yields=True,
        position_embedding_type="none",
    ),
    _switch("--swiglu", activation="swiglu"),
    _value("--glu-activation", "str", None, "activation", ("geglu", "swiglu")),
    _switch("--squared-relu", activation="squared_relu"),
    _switch("--openai-gelu", activation="gelu_tanh"),
    _switch("--recompute-activations", recompute_granularity="selective"),
    _switch("--checkpoint-activations", recompute_granularity="full"),
    _value("--checkpoint-num-layers", "int", 1, "recompute_num_layers"),
    _value("--checkpoint_block_layer", "int", None, "recompute_num_layers"),
    *(
        Equivalent(_CHECKPOINT_POLICY, policy, {"recompute_granularity": "full", "recompute_method": method})
        for policy, method in (("full", "uniform"), ("block", "block"), ("custom", "block"))
    ),
    _switch("--dataloader-inter-document-masking", reset_attention_mask=True),
    _switch("--full-validation", eval_iters=-1),
    _switch("--enable-zbh1-pipeline", pipeline_schedule="zero-bubble"),
    _switch("--use-distributed-optimizer", yields=True, zero_stage=1),
    _switch("--use-torch-fsdp2", zero_stage=3),
    _switch("--use-flash-attn", "--use-flash-attn-v1", dest="use_flash_attn_v1", attention_backend="flash"),
    _switch("--use-flash-attn-v2", attention_backend="flash"),
    _switch("--use-flash-attn-triton", attention_backend="flash"),
    _switch("--use-flash-attn-builder", attention_backend="flash"),
    _switch("--fp8-e4m3", fp8_format="e4m3"),
    _switch("--fp8-e5m2", fp8_format="e5m2"),
    _switch("--fp8-hybrid", fp8_format="hybrid"),
    Equivalent(_CACHE_FORWARD, True, {"cache_fp8_weight": True}),
    Equivalent(_CACHE_FORWARD, False, {"cache_fp8_weight": False}),
    Equivalent(_FUSED_SDPA, True, {"attention_backend": "fused"}),
    Equivalent(_FUSED_SDPA, False, {"attention_backend": "unfused"}),
)
PLUGIN = Option(
    dest="plugin",
    names=("--plugin",),
    kind="str",
    default=None,
    help="Settings that one of Colossal-AI's plugins stands for, listed below; flags of these settings win.",
    choices=tuple(PLUGINS),
)
_PLUGINS = tuple(Equivalent(PLUGIN, name, plugin.settings, yields=True) for name, plugin in PLUGINS.items())
OPTIONS: tuple[Option, ...] = (
    *{row.option.dest: row.option for row in EQUIVALENTS}.values(),
    *(option for option, _ in _FORMS),
    PLUGIN,
)
"""Every flag that stands for values of other settings."""


def expand(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Add the settings that given flags stand for.

    Returns:
        `given` and what follows from it, and one sentence per contradiction.
    """
    settings, problems = _with_form(given)
    source: dict[str, str] = {}
    for row in sorted((*EQUIVALENTS, *_PLUGINS), key=lambda row: row.yields):
        option = row.option
        if option.dest not in settings or not _applies(row, given[option.dest]):
            continue
        for target, value in row.changes.items():
            wanted = given[option.dest] if value is SAME else value
            if settings.setdefault(target, wanted) != wanted and not row.yields:
                other = source.get(target, _flag(target))
                problems.append(f"{option.main} stands for {target} = {wanted}, but {other} says {settings[target]}")
            source.setdefault(target, option.main)
    return settings, problems


def _with_form(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Forms of the fused attention as an `--op`, which then says that there is one."""
    flags = {option.main: ending for option, ending in _FORMS if given.get(option.dest)}
    if not flags:
        return dict(given), []
    if given.get(_FUSED_SDPA.dest) is False:
        return dict(given), [f"{', '.join(flags)}: only with {_FUSED_SDPA.main} true; leave one of them out"]
    rest = {name: value for name, value in given.items() if name != _FUSED_SDPA.dest}
    return rest | {"op": (*given.get("op", ()), f"attention=fused_sdpa{''.join(flags.values())}")}, []


def _applies(row: Equivalent, value: Any) -> bool:
    return bool(value != row.option.default if row.value is SAME else value == row.value)


def mirrors(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values that these flags would have: what Megatron's tools find under their names."""
    values: dict[str, Any] = {}
    for row in EQUIVALENTS:
        option = row.option
        if row.value is SAME:
            (target,) = row.changes
            allowed = not option.choices or settings[target] in option.choices
            values[option.dest] = settings[target] if allowed else option.default
        else:
            holds = all(settings[target] == value for target, value in row.changes.items())
            if holds or option.dest not in values:
                values[option.dest] = row.value if holds else option.default
    # The stage has a default that only DeepSpeed uses.
    return values | {"use_distributed_optimizer": settings["zero_stage_native"] == 1}
