"""Which implementation of each operation a run uses: decided once at start-up, written down, passed as an argument."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron import accelerators
from megatron.accelerators import Accelerator
from megatron.ops import checks, reference
from megatron.ops.block_rules import BlockRules
from megatron.ops.float8 import Formats, Product

REFERENCE = "reference"

TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
)
"""Largest error allowed, relative to the largest value of the float64 result: rounding of a few operations."""


ADAMW_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {dtype: error for dtype, error in TOLERANCE.items() if dtype != torch.float16}
)
"""The second moment of a float16 parameter underflows: such parameters need float32 copies to be updated."""


class AttentionFunction(Protocol):
    """Signature of `reference.attention`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        alibi_slopes: Tensor | None = None,
        document_ids: Tensor | None = None,
        window: int | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """See `reference.attention`."""


class CachedAttentionFunction(Protocol):
    """Signature of `reference.cached_attention`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        *,
        scale: float,
        alibi_slopes: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        """See `reference.cached_attention`."""


class AdamWFunction(Protocol):
    """Signature of `reference.adamw`."""

    def __call__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> torch.optim.Optimizer:
        """See `reference.adamw`."""


class ClipFunction(Protocol):
    """Signature of `reference.clip_grad_norm`."""

    def __call__(
        self,
        gradients: Mapping[int, Sequence[Tensor]],
        device: torch.device,
        *,
        limit: float,
        scale: float = 1.0,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """See `reference.clip_grad_norm`."""


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The chosen function for each operation; `megatron.ops.reference` documents them under the same names."""

    embedding: Callable[[Tensor, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    attention: AttentionFunction
    cached_attention: CachedAttentionFunction
    attention_block: Callable[[Tensor, Tensor, Tensor, BlockRules], tuple[Tensor, Tensor]]
    attention_block_backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, BlockRules], tuple[Tensor, Tensor, Tensor]
    ]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    geglu: Callable[[Tensor, Tensor], Tensor]
    bias_gelu: Callable[[Tensor, Tensor | None, Literal["none", "tanh"]], Tensor]
    grouped_matmul: Callable[[Tensor, Tensor, Tensor], Tensor]
    matmul_all_reduce: Callable[[Tensor, Tensor, dist.ProcessGroup | None], Tensor]
    squared_relu: Callable[[Tensor], Tensor]
    relu: Callable[[Tensor], Tensor]
    bias_dropout_add: Callable[[Tensor, Tensor | None, Tensor, float, bool], Tensor]
    cross_entropy: Callable[[Tensor, Tensor], Tensor]
    make_linear: Callable[[int, int, Formats], Product]
    clip_grad_norm: ClipFunction
    adamw: AdamWFunction
    linear_cross_entropy: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None
    """None: logits are computed, then their `cross_entropy`."""


OPERATIONS: tuple[str, ...] = tuple(entry.name for entry in fields(Ops))
"""Names of all operations: those `--op name=implementation` accepts."""


ON_REQUEST: Mapping[str, str] = MappingProxyType({"linear_cross_entropy": "cross_entropy of all logits instead"})
"""Operations that take the place of others, and are in the table only when asked for; what is done otherwise."""


class UnavailableOpError(ValueError):
    """An operation or implementation was asked for that does not exist, or not on this device."""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute an operation on a device."""

    op: str
    name: str
    function: Callable[..., Any]
    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCE)
    """Per dtype: largest error of result and gradients against float64, relative to the largest true value.

    Dtypes that are not listed are not supported.
    """
    why_unavailable: Callable[[], str] = field(default=lambda: "")
    """The reason why it cannot run on this machine; empty when it can."""


def implements(
    definition: Callable[..., Any],
    *,
    name: str,
    tolerance: Mapping[torch.dtype, float] = TOLERANCE,
    why_unavailable: Callable[[], str] = lambda: "",
) -> Callable[[Callable[..., Any]], Implementation]:
    """Decorator that turns a function into an `Implementation` of an operation, behind the operation's argument checks.

    The device's ops module lists it in its tuple `IMPLEMENTATIONS`; within one operation the first available one is
    the default, and the reference stands behind all of them.

    Args:
        definition: the function of `megatron.ops.reference` whose signature and meaning it shares.
        name: what `--op` calls it.
        tolerance: see `Implementation.tolerance`.
        why_unavailable: see `Implementation.why_unavailable`; called when a table is built, not at import.
    """
    check = getattr(checks, definition.__name__)

    def register(function: Callable[..., Any]) -> Implementation:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return function(*args, **kwargs)

        return Implementation(
            op=definition.__name__, name=name, function=checked, tolerance=tolerance, why_unavailable=why_unavailable
        )

    return register


def implementations(accelerator: Accelerator, op: str) -> tuple[Implementation, ...]:
    """All implementations of `op` this device knows, best first, the reference last."""
    module = importlib.import_module(accelerator.ops_module)
    own = tuple(candidate for candidate in module.IMPLEMENTATIONS if candidate.op == op)
    tolerance = ADAMW_TOLERANCE if op == "adamw" else TOLERANCE
    return (*own, Implementation(op=op, name=REFERENCE, function=getattr(reference, op), tolerance=tolerance))


def reference_ops() -> Ops:
    """The table of references: slow, and right by definition."""
    return Ops(**{op: getattr(reference, op) for op in OPERATIONS if op not in ON_REQUEST})


def build_table(accelerator: Accelerator, asked: Mapping[str, str]) -> tuple[Ops, list[str]]:
    """Choose one implementation per operation.

    Args:
        accelerator: the device of this run.
        asked: operation -> implementation name, from `--op` and the flags that stand for one.

    Returns:
        The table, and one line per operation for the start-up log that says what was chosen and why.

    Raises:
        UnavailableOpError: an operation is unknown, or what was asked for is unknown or unavailable on this device.
    """
    for op in asked:
        if op not in OPERATIONS:
            raise UnavailableOpError(f"--op {op}={asked[op]}: unknown operation. Operations: {', '.join(OPERATIONS)}")
    chosen: dict[str, Callable[..., Any]] = {}
    lines = []
    for op in OPERATIONS:
        candidates = implementations(accelerator, op)
        if op in ON_REQUEST and op not in asked:
            lines.append(f"op {op:16} none ({ON_REQUEST[op]})")
            continue
        if op in asked:
            implementation, why = _asked(accelerator, candidates, asked[op]), "asked for"
        else:
            implementation, why = _best(candidates)
        chosen[op] = implementation.function
        lines.append(f"op {op:16} {implementation.name}" + (f" ({why})" if why else ""))
    return Ops(**chosen), lines


def _best(candidates: Sequence[Implementation]) -> tuple[Implementation, str]:
    """The first available one, and why better ones were passed over."""
    passed_over: list[str] = []
    for candidate in candidates:
        reason = candidate.why_unavailable()
        if not reason:
            return candidate, "; ".join(passed_over)
        passed_over.append(f"{candidate.name} unavailable: {reason}")
    raise AssertionError("the reference is always available")


def _asked(accelerator: Accelerator, candidates: Sequence[Implementation], name: str) -> Implementation:
    op = candidates[0].op
    found = next((candidate for candidate in candidates if candidate.name == name), None)
    reason = _elsewhere(accelerator, op, name) if found is None else found.why_unavailable()
    if found is not None and not reason:
        return found
    states = []
    for candidate in candidates:
        unavailable = candidate.why_unavailable()
        states.append(candidate.name + (f" (unavailable: {unavailable})" if unavailable else ""))
    raise UnavailableOpError(
        f"--op {op}={name}: {reason}. Implementations of {op} on {accelerator.name}: {', '.join(states)}"
    )


def _elsewhere(accelerator: Accelerator, op: str, name: str) -> str:
    """Why a name is unknown here: it belongs to other devices, or to none."""
    others = [
        device.name
        for device in map(accelerators.load, accelerators.DEVICES)
        if device.name != accelerator.name and name in {known.name for known in implementations(device, op)}
    ]
    if others:
        return f"{name} exists for {', '.join(others)}, not for {accelerator.name}"
    return f"no device has an implementation of that name; {accelerator.name} was chosen by --device"
