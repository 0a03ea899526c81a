"""All settings of a run: `parse` turns a command line into a frozen `RunConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config import deepspeed, equivalents, record, rules
from megatron.config.architecture import Architecture
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.derive import architecture, derive
from megatron.config.device import DeviceConfig
from megatron.config.engine import DeepSpeedConfig
from megatron.config.legacy import LEGACY
from megatron.config.logging import LoggingConfig
from megatron.config.model import ModelConfig
from megatron.config.moe import MoeConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.parser import SECTIONS, ConfigError, all_options, defaults, flag_of, read, shown
from megatron.config.plugins import PLUGINS
from megatron.config.precision import PrecisionConfig
from megatron.config.presets import preset
from megatron.config.tokenizer import TokenizerConfig
from megatron.config.training import TrainingConfig

RecordReader = Callable[[Mapping[str, Any]], Mapping[str, Any]]

# What --use-checkpoint-args takes from a checkpoint.
CHECKPOINT_ARGS = (
    *(field.name for field in dataclasses.fields(ModelConfig) if not field.name.endswith("dropout")),
    *("seq_length", "padded_vocab_size", "vocab_size", "pad_vocab_size", "tokenizer_type", "tokenizer_model"),
    *("num_experts", "topk", "expert_interval", "moe_layer_freq", "moe_ffn_hidden_size", "moe_router_pre_softmax"),
    *("moe_shared_expert_intermediate_size", "moe_token_dropping", "moe_top2_2nd_expert_sampling"),
)
_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "lr")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every setting of a run, complete and free of contradictions."""

    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    precision: PrecisionConfig
    parallel: ParallelConfig
    moe: MoeConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    device: DeviceConfig
    deepspeed: DeepSpeedConfig
    dry_run: bool = False
    deepspeed_document: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # content of --deepspeed_config
    given: frozenset[str] = frozenset()  # settings that a flag or DeepSpeed's file gave
    without_effect: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # given options of old scripts
    notes: tuple[str, ...] = ()  # what the user should know; said once at the start

    def values(self) -> dict[str, Any]:
        """All settings in one dictionary."""
        return {
            field.name: getattr(getattr(self, section), field.name)
            for section, kind in SECTIONS.items()
            for field in dataclasses.fields(kind)
        }

    def architecture(self, vocab_size: int) -> Architecture:
        """The model, for a tokenizer that can produce `vocab_size` tokens.

        Raises:
            ValueError: --padded-vocab-size is smaller.
        """
        return architecture(self.values(), vocab_size)

    def as_namespace(self) -> dict[str, Any]:
        """The record of the run, the same on all ranks; see `megatron.config.record`."""
        return record.as_namespace(self.values(), self.without_effect)

    def to_flags(self) -> list[str]:
        """A command line that gives the same settings, without what the environment adds."""
        settings = self.values() | {"dry_run": self.dry_run or None} | dict(self.without_effect)
        names = (self.given - {"local_rank"} | {"dry_run"} | self.without_effect.keys()) & settings.keys()
        return [word for name in sorted(names) for word in all_options()[name].words(settings[name])]


def parse(argv: Sequence[str], env: Mapping[str, str], *, read_record: RecordReader | None = None) -> RunConfig:
    """The settings that a command line and the launcher's environment give.

    A flag wins over DeepSpeed's JSON (unless they contradict each other), that over a preset, that over a default.

    Args:
        argv: the words of the command line, without the program.
        env: WORLD_SIZE and LOCAL_RANK are read.
        read_record: for --use-checkpoint-args: given all settings, returns the record (`as_namespace`) that is saved
            in the checkpoint they say to load.

    Raises:
        ConfigError: with every problem that was found.
    """
    flags, unreadable = read(argv)
    given, contradictory = equivalents.expand(flags)
    document, no_document = _document(given)
    filled, wrong_values = deepspeed.settings_of(document)
    explicit, outside_limits = _within_limits(filled | {name: given[name] for name in given if name in defaults()})
    base, no_preset = _preset(given)
    ranks, no_ranks = _ranks(env)
    settings = defaults() | base | ranks | explicit
    recorded, other_in_checkpoint = _from_checkpoint(settings, base | explicit, read_record)
    settings, notes = derive(settings | recorded, frozenset(explicit))
    problems = unreadable + outside_limits + contradictory + no_document + wrong_values
    problems += no_preset + no_ranks + other_in_checkpoint
    problems += [
        *_legacy_problems(flags),
        *_missing(settings, problems),
        *deepspeed.contradictions(document, given),
        *deepspeed.accumulation_differs(document, settings),
        *deepspeed.offload_problems(document, settings),
        *rules.not_yet(settings, shown),
        *rules.violations(settings, frozenset(explicit) | given.keys()),
    ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    sections = {
        section: kind(**{field.name: settings[field.name] for field in dataclasses.fields(kind)})
        for section, kind in SECTIONS.items()
    }
    return RunConfig(
        **sections,
        dry_run=given.get("dry_run", False),
        deepspeed_document=document,
        given=frozenset(explicit),
        without_effect={row.option.dest: flags[row.option.dest] for row in LEGACY if row.option.dest in flags},
        notes=(*_plugin_notes(flags, given), *_legacy_notes(flags), *_expert_notes(flags, settings), *notes),
    )


def _document(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    path = given.get("deepspeed_config")
    try:
        return deepspeed.read_document(path) if path else {}, []
    except deepspeed.DocumentError as error:
        return {}, [str(error)]


def _preset(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    name = given.get("preset")
    try:
        return dict(preset(name).settings) if name else {}, []
    except ValueError as error:
        return {}, [str(error)]


def _ranks(env: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """World size and local rank as the launcher exports them."""
    ranks, problems = {"world_size": 1, "local_rank": 0}, []
    for variable, name, minimum in (("WORLD_SIZE", "world_size", 1), ("LOCAL_RANK", "local_rank", 0)):
        text = env.get(variable, str(minimum))
        if text.isdigit() and int(text) >= minimum:
            ranks[name] = int(text)
        else:
            problems.append(f"{variable}={text} in the environment: must be a whole number of at least {minimum}")
    return ranks, problems


def _from_checkpoint(
    settings: Mapping[str, Any], asked: Mapping[str, Any], read_record: RecordReader | None
) -> tuple[dict[str, Any], list[str]]:
    """What --use-checkpoint-args takes over, and one sentence for each flag that says something else."""
    if not settings["use_checkpoint_args"] or settings["load"] is None:
        return {}, []
    if read_record is None:
        return {}, ["--use-checkpoint-args: this program does not read checkpoints"]
    try:
        recorded = record.from_namespace(read_record(settings))
    except (OSError, ValueError) as error:
        return {}, [f"--use-checkpoint-args: {error}"]
    taken = {name: value for name, value in recorded.items() if name in CHECKPOINT_ARGS}
    problems = [
        f"{flag_of(name)} {asked[name]}: the checkpoint in --load {settings['load']} has {value}, which "
        "--use-checkpoint-args takes; leave one of the flags out"
        for name, value in taken.items()
        if name in asked and asked[name] != value
    ]
    return taken, problems


def _plugin_notes(flags: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What --plugin sets, and what other flags say instead."""
    if "plugin" not in flags:
        return []
    settings = PLUGINS[flags["plugin"]].settings
    taken = [shown(name, value) for name, value in settings.items() if given[name] == value]
    instead = [shown(name, given[name]) for name, value in settings.items() if given[name] != value]
    text = f"--plugin {flags['plugin']} sets {' '.join(taken) or 'nothing'}"
    return [text + (f"; other flags win: {' '.join(instead)}" if instead else "")]


def _legacy_problems(flags: Mapping[str, Any]) -> list[str]:
    problems = []
    for row in LEGACY:
        name = row.option.dest
        if name not in flags:
            continue
        text = shown(name, flags[name])
        if row.effect == "renamed":
            problems.append(f"{text}: has a new name; use {row.reason}")
        elif row.effect == "refused" and flags[name] != row.option.default:
            problems.append(f"{text}: {row.reason}; leave it out")
    return problems


def _legacy_notes(flags: Mapping[str, Any]) -> list[str]:
    return [
        f"{row.option.main} has no effect: {row.reason}"
        for row in LEGACY
        if row.effect == "none" and row.option.dest in flags
    ]


def _expert_notes(flags: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    names = [flag_of(name) for name in rules.EXPERTS_ONLY if name in flags]
    if names and settings["num_experts"] == (1,):
        return [f"{', '.join(names)}: no effect, the model has no experts"]
    return []


def _within_limits(explicit: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings whose numbers are neither too small nor too large, and one sentence for each of the others."""
    wrong = {name: all_options()[name].outside_limits(value) for name, value in explicit.items()}
    within = {name: value for name, value in explicit.items() if wrong[name] is None}
    return within, [problem for problem in wrong.values() if problem is not None]


def _missing(settings: Mapping[str, Any], problems: Sequence[str]) -> list[str]:
    """One sentence for each setting that a run cannot do without; a value that was refused is not missing, too."""
    flags = [flag_of(name) for name in _REQUIRED if settings[name] is None]
    return [f"{flag} is missing" for flag in flags if not any(problem.startswith(f"{flag} ") for problem in problems)]
