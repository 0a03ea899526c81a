"""What must hold between settings. Every rule is a function of the settings its parameters are named after.

A rule returns a sentence for a violation (value, what is allowed, flag to change), or None. `violations` runs all of
them, so that a user sees every mistake at once; a rule is left out while a setting it needs is unknown. `given` is the
set of names that were given explicitly.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from megatron.config import (
    fp8_rules,
    model_rules,
    moe_rules,
    phase_rules,
    pipeline_rules,
    probe_rules,
    run_rules,
    sequence_rules,
)
from megatron.config.moe import MoeConfig


class NotYet(NamedTuple):
    """A setting that can only have one value until `feature` is there."""

    setting: str
    allowed: Any
    feature: str


# To lift a refusal, delete its row.
NOT_YET: tuple[NotYet, ...] = (NotYet("mlp_type", "standard", "experts that are added to a dense block"),)
# They belong to experts and say nothing without them; scripts pass them to every model.
EXPERTS_ONLY = tuple(
    field.name
    for field in dataclasses.fields(MoeConfig)
    if field.name not in ("num_experts", "mlp_type", "moe_expert_parallel_size")
)


RULES: tuple[Callable[..., str | None], ...] = tuple(
    rule
    for module in (
        model_rules,
        sequence_rules,
        moe_rules,
        pipeline_rules,
        run_rules,
        phase_rules,
        fp8_rules,
        probe_rules,
    )
    for rule in module.RULES
)


def violations(settings: Mapping[str, Any], given: frozenset[str]) -> Iterator[str]:
    """One sentence for every rule that does not hold."""
    known = {**settings, "given": given}
    for rule in RULES:
        arguments = {name: known[name] for name, _ in parameters(rule)}
        unknown = [name for name, optional in parameters(rule) if arguments[name] is None and not optional]
        if unknown:
            continue
        sentence = rule(**arguments)
        if sentence is not None:
            yield sentence


def not_yet(settings: Mapping[str, Any], shown: Callable[[str, Any], str]) -> Iterator[str]:
    """One sentence for every setting whose feature is not there yet; `shown` writes a setting as its flag."""
    for row in NOT_YET:
        value = settings[row.setting]
        if value != row.allowed:
            yield f"{shown(row.setting, value)}: not implemented yet ({row.feature}); leave it out"


@functools.cache
def parameters(rule: Callable[..., str | None]) -> tuple[tuple[str, bool], ...]:
    """The settings a rule needs, and whether it can do without a value of each."""
    hints = typing.get_type_hints(rule)
    return tuple((name, type(None) in typing.get_args(hints[name])) for name in inspect.signature(rule).parameters)
