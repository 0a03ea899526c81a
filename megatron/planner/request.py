"""From a command line to settings for any layout.

The trainer's own parser, defaults and rules are used. What does not bear on a plan (data, tokenizer, checkpoints,
reports) is left out, so that the flags of a real run can be planned on a machine that has none of its files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config import deepspeed, equivalents, rules
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.derive import derive
from megatron.config.logging import LoggingConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.parser import ConfigError, all_options, defaults, read, shown
from megatron.config.presets import PRESETS
from megatron.config.run import parse

_LONGEST_ASSUMED = 8192
_TOKENS_ASSUMED = 4 * 2**20
_SOURCES = (
    *("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "data_path", "train_data_path"),
    *("valid_data_path", "test_data_path", "data_args_path", "per_split_data_args_path", "mock_data", "split"),
)
_LENGTHS = ("train_iters", "train_samples", "train_tokens")
_FILLED: tuple[str, ...] = ("--mock-data", "--tokenizer-type", "NullTokenizer")


def _names(section: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(section))


LAYOUT = _names(ParallelConfig) | {
    *("micro_batch_size", "global_batch_size", "eval_micro_batch_size"),
    *("moe_expert_parallel_size", "expert_tensor_parallel_size"),
}
_UNUSED = _names(CheckpointConfig) | _names(LoggingConfig) | frozenset((*_SOURCES, "deepspeed_config", "dry_run"))


@dataclass(frozen=True, kw_only=True)
class Request:
    """A model and a run, for which any layout can be tried."""

    world_size: int
    values: Mapping[str, Any]
    """Every setting, as on one rank."""
    given: frozenset[str]
    """Settings that a flag gave, those of the layout included."""
    layout: Mapping[str, Any]
    """Settings of the layout that a flag gave."""
    vocab_size: int
    """Tokens the tokenizer can produce."""
    assumed: tuple[str, ...]
    """Flags that the trainer needs and that were not given."""
    document: Mapping[str, Any]
    """Content of --deepspeed_config."""
    rounds_batch: bool
    """Nobody gave a batch size: what is assumed is rounded up to what a layout can do."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Settings of one layout, and what speaks against them."""

    settings: Mapping[str, Any]
    impossible: tuple[str, ...]
    """Rules that the layout breaks."""
    missing: tuple[str, ...]
    """Features that training lacks, so that it refuses the layout today."""


def read_request(argv: Sequence[str], world_size: int) -> Request:
    """What the flags ask for.

    Args:
        argv: the trainer's flags; --preset or the sizes of a model, and any layout.
        world_size: ranks.

    Raises:
        ConfigError: with every problem that has nothing to do with the layout.
    """
    flags, unreadable = read(argv)
    given, contradictory = equivalents.expand(flags)
    path = given.get("deepspeed_config")
    document = deepspeed.read_document(path) if path else {}
    filled, not_understood = deepspeed.settings_of(document)
    if unreadable or contradictory or not_understood:
        raise ConfigError([*unreadable, *contradictory, *not_understood])
    kept = {name: value for name, value in (filled | given).items() if name not in _UNUSED}
    layout = {name: kept.pop(name) for name in LAYOUT & kept.keys()}
    assumed, silent = _fill(kept, given)
    options = all_options()
    words = [word for name, value in kept.items() if name in options for word in options[name].words(value)]
    config = parse([*words, *silent, *assumed, "--micro-batch-size", "1"], {})
    preset = PRESETS.get(config.model.preset or "")
    sizes = (given.get("vocab_size"), preset.vocab_size if preset else None, config.tokenizer.vocab_size)
    rounds_batch = "global_batch_size" not in layout
    if rounds_batch:
        layout["global_batch_size"] = max(1, _TOKENS_ASSUMED // config.data.seq_length)
        assumed += ("--global-batch-size", str(layout["global_batch_size"]))
    if "micro_batch_size" not in layout:
        layout["micro_batch_size"] = 1
        assumed += ("--micro-batch-size", "1")
    return Request(
        world_size=world_size,
        values=config.values(),
        given=frozenset(config.given | layout.keys()) - {"micro_batch_size"},
        layout=layout,
        vocab_size=next(size for size in sizes if size),
        assumed=assumed,
        document=document,
        rounds_batch=rounds_batch,
    )


def _fill(kept: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Flags that the parser needs: those that matter to a plan and are said, and those that do not."""
    preset = PRESETS.get(kept.get("preset", ""))
    assumed: tuple[str, ...] = ()
    if "seq_length" not in kept and preset is not None:
        longest = given.get("max_position_embeddings") or preset.settings["max_position_embeddings"]
        assumed = ("--seq-length", str(min(longest, _LONGEST_ASSUMED)))
    silent = _FILLED
    if "lr" not in kept:
        silent += ("--lr", "1e-4")
    if not any(name in kept for name in _LENGTHS):
        silent += ("--train-iters", "1")
    return assumed, silent


def resolve(request: Request, changes: Mapping[str, Any] | None = None) -> Resolved:
    """Complete settings of the request with some settings of the layout (or others) changed."""
    layout = {**request.layout, **(changes or {})}
    start = defaults()
    unset = {name: start[name] for name in LAYOUT}
    settings = {**request.values, **unset, **layout, "world_size": request.world_size}
    given = request.given | {name for name, value in layout.items() if value is not None and value is not False}
    if layout.get("recompute_granularity", "full") != "full":
        given -= {"recompute_method", "recompute_num_layers", "recomputation_layer_num"}
    settings, _ = derive(settings, given)
    if request.rounds_batch:
        share = settings["micro_batch_size"] * settings["data_parallel_size"]
        settings["global_batch_size"] = -(-settings["global_batch_size"] // share) * share
    missing = tuple(rules.not_yet(settings, shown))
    return Resolved(settings=settings, impossible=tuple(rules.violations(settings, given)), missing=missing)
