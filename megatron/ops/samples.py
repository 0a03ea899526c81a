"""Arguments to try every operation on, and the results and gradients that come out: for the checks and the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron.ops import float8
from megatron.ops.block_reference import attention_block
from megatron.ops.block_rules import BlockRules

_ADAMW_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call. The first `gradients` arguments are differentiated."""

    label: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    gradients: int

    def to(self, dtype: torch.dtype) -> Sample:
        """The same numbers with floating point tensors in another dtype."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def map(self, function: Callable[[Tensor], Tensor]) -> Sample:
        """The same call with every tensor replaced."""

        def convert(value: Any) -> Any:
            if isinstance(value, BlockRules):
                return value.map(function)
            return function(value) if isinstance(value, Tensor) else value

        kwargs = {name: convert(value) for name, value in self.kwargs.items()}
        return replace(self, args=tuple(convert(value) for value in self.args), kwargs=kwargs)


@dataclass(frozen=True)
class _Source:
    """Where sample tensors come from: drawn on the host in float32, so that every device and dtype sees the same."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def samples(op: str, dtype: torch.dtype, device: torch.device, *, large: bool, seed: int = 0) -> tuple[Sample, ...]:
    """Calls of an operation.

    Args:
        op: its name.
        dtype: of the floating point arguments.
        device: where they lie.
        large: one call of training size for timing, instead of small calls that cover every argument.
        seed: of the random numbers.
    """
    source = _Source(dtype, device, torch.Generator().manual_seed(seed))
    return _MAKERS[op](source, 512)[:1] if large else _MAKERS[op](source, 96)


def prepare(op: str, function: Callable[..., Any], sample: Sample) -> Callable[[], list[Tensor]]:
    """A call without arguments that runs the sample forward and backward, with everything else done beforehand.

    It returns the result, then the gradients of the differentiated arguments under a fixed weighting of the result;
    for an optimizer, the parameters after a few steps; for clipping, the norm and the clipped gradients.
    """
    if op == "adamw":
        return lambda: _train(function, sample)
    if op == "clip_grad_norm":
        return lambda: _clip(function, sample)
    if op == "make_linear":
        function = _linear(function)
    if op == "linear_cross_entropy":
        function = _stacked(function)
    if sample.gradients == 0:
        return lambda: _listed(function(*sample.args, **sample.kwargs))
    inputs = [argument.detach().requires_grad_() for argument in sample.args[: sample.gradients]]
    rest = sample.args[sample.gradients :]
    with torch.no_grad():
        weighting = _weighting(function(*inputs, *rest, **sample.kwargs))

    def run() -> list[Tensor]:
        result: Tensor = function(*inputs, *rest, **sample.kwargs)
        return [result.detach(), *torch.autograd.grad(result, inputs, weighting)]

    return run


def relative_error(actual: list[Tensor], oracle: list[Tensor]) -> float:
    """Largest difference over all tensors, relative to the largest value of the tensor in the oracle; NaN stays."""
    errors = [
        (mine.double() - true.double()).abs().max() / true.double().abs().max().clamp_min(1e-30)
        for mine, true in zip(actual, oracle, strict=True)
    ]
    return torch.stack(errors).max().item()


def _listed(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _weighting(result: Tensor) -> Tensor:
    """Fixed random numbers of bfloat16 precision, so that they are the same in every dtype."""
    numbers = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    return numbers.bfloat16().to(result.device, result.dtype)


def _train(factory: Callable[..., Any], sample: Sample) -> list[Tensor]:
    half = len(sample.args) // 2
    parameters = [value.clone().requires_grad_() for value in sample.args[:half]]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimizer = factory(groups, **sample.kwargs)
    for step in range(_ADAMW_STEPS):
        for parameter, gradient in zip(parameters, sample.args[half:], strict=True):
            parameter.grad = gradient * (step + 1)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def _clip(function: Callable[..., Tensor], sample: Sample) -> list[Tensor]:
    gradients = [value.clone() for value in sample.args]
    groups = {1: gradients[:2], 2: gradients[2:]} if len(gradients) > 2 else {1: gradients}
    return [function(groups, gradients[0].device, **sample.kwargs), *gradients]


def _linear(make: Callable[..., float8.Product]) -> Callable[[Tensor, Tensor], Tensor]:
    """A layer of 8-bit numbers with scales for tensors of standard deviation 1."""
    largest = {torch.float8_e4m3fn: 240.0, torch.float8_e5m2: 57344.0}  # the least of all devices

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        product = make(weight.shape[1], weight.shape[0], float8.formats("hybrid", largest, weight_gradient=True))
        scale = torch.full((), 32.0, device=x.device)
        return product(x, weight, scale, scale, lambda gradient: scale * 64.0)

    return apply


def _stacked(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """Several results of one shape as one."""
    return lambda *args: torch.stack(function(*args))


def _rms_norm(source: _Source, s: int) -> tuple[Sample, ...]:
    return (Sample(label="", args=(source.normal(s, 2, 512), source.normal(512), 1e-5), gradients=2),)


def _layer_norm(source: _Source, s: int) -> tuple[Sample, ...]:
    x, weight, bias = source.normal(s, 2, 512), source.normal(512), source.normal(512)
    return (
        Sample(label="", args=(x, weight, bias, 1e-5), gradients=3),
        Sample(label="no bias", args=(x, weight, None, 1e-5), gradients=2),
    )


def _rotary(source: _Source, s: int) -> tuple[Sample, ...]:
    x = source.normal(s, 2, 8, 64)
    calls = []
    for label, channels, batch, interleaved in (
        ("", 64, 1, False),
        ("partial", 32, 1, False),
        ("interleaved", 64, 1, True),
        ("per sequence", 64, 2, False),
    ):
        angles = source.normal(s, batch, 1, channels // 2)
        pairs = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
        calls.append(Sample(label=label, args=(x, pairs.cos(), pairs.sin(), interleaved), gradients=1))
    return tuple(calls)


def _attention(source: _Source, s: int) -> tuple[Sample, ...]:
    s = s if s > 256 else 150  # small calls still span two blocks, the second one incomplete
    q, k, v = source.normal(s, 2, 8, 64), source.normal(s, 2, 8, 64), source.normal(s, 2, 8, 64)
    documents = (torch.arange(s, device=source.device) // 60).expand(2, -1)
    slopes = 2.0 ** -torch.arange(1.0, 9.0, device=source.device)
    rules: dict[str, dict[str, Any]] = {
        "": {},
        "documents": {"document_ids": documents},
        "alibi": {"alibi_slopes": slopes},
        "window": {"window": 40},
        "all": {"document_ids": documents, "alibi_slopes": slopes, "window": 40},
    }
    calls = [
        Sample(label=label, args=(q, k, v), kwargs={"scale": 0.125, **kwargs}, gradients=3)
        for label, kwargs in rules.items()
    ]
    grouped = (q, k[:, :, :2].contiguous(), v[:, :, :2].contiguous())
    return (*calls, Sample(label="grouped", args=grouped, kwargs={"scale": 0.125, "window": 40}, gradients=3))


def _cached_attention(source: _Source, s: int) -> tuple[Sample, ...]:
    q, k, v = source.normal(1, 4, 8, 64), source.normal(s, 4, 8, 64), source.normal(s, 4, 8, 64)
    grouped = (k[:, :, :2].contiguous(), v[:, :, :2].contiguous())
    slopes = 2.0 ** -torch.arange(1.0, 9.0, device=source.device)
    positions = torch.tensor([[s - 1], [s // 2], [60], [0]], device=source.device)
    several = torch.cat([positions.clamp(min=2) - back for back in (2, 1, 0)], dim=1)
    calls: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
        "": ((q, k, v, positions), {}),
        "grouped": ((q, *grouped, positions), {}),
        "alibi": ((q, k, v, positions), {"alibi_slopes": slopes}),
        "window": ((q, k, v, positions), {"window": 40}),
        "several tokens": ((source.normal(3, 4, 8, 64), *grouped, several), {"alibi_slopes": slopes, "window": 40}),
    }
    return tuple(
        Sample(label=label, args=args, kwargs={"scale": 0.125, **rules}, gradients=0)
        for label, (args, rules) in calls.items()
    )


def _attention_block(source: _Source, s: int) -> tuple[Sample, ...]:
    s = s if s > 256 else 150  # as above
    q, k, v = source.normal(s, 2, 8, 64), source.normal(s, 2, 8, 64), source.normal(s, 2, 8, 64)
    longer = (source.normal(s + 40, 2, 2, 64), source.normal(s + 40, 2, 2, 64))
    documents = (torch.arange(s, device=source.device) // 60).expand(2, -1)
    ids = {"query_documents": documents, "key_documents": documents}
    slopes = 2.0 ** -torch.arange(1.0, 9.0, device=source.device)
    calls: dict[str, tuple[tuple[Tensor, Tensor], dict[str, Any]]] = {
        "": ((k, v), {"distance": 0}),
        "all behind": ((k, v), {"distance": 4 * s}),
        "some behind": (longer, {"distance": 30}),
        "documents": ((k, v), {"distance": 0, **ids}),
        "alibi": ((k, v), {"distance": s, "alibi_slopes": slopes}),
        "window": (longer, {"distance": 60, "window": 40}),
        "all": ((k, v), {"distance": 20, "alibi_slopes": slopes, "window": 70, **ids}),
    }
    return tuple(
        Sample(label=label, args=(q, *keys, BlockRules(scale=0.125, **rules)), gradients=0)
        for label, (keys, rules) in calls.items()
    )


def _attention_block_backward(source: _Source, s: int) -> tuple[Sample, ...]:
    calls = []
    for sample in _attention_block(source, s):
        q, k, v, rules = sample.args
        result, normalizers = attention_block(q, k, v, rules)
        grad = source.normal(*q.shape)
        calls.append(replace(sample, args=(grad, q, k, v, result, normalizers, rules)))
    return tuple(calls)


def _gated(source: _Source, s: int) -> tuple[Sample, ...]:
    return (Sample(label="", args=(source.normal(s, 2, 1376), source.normal(s, 2, 1376)), gradients=2),)


def _bias_gelu(source: _Source, s: int) -> tuple[Sample, ...]:
    x, bias = source.normal(s, 2, 1376), source.normal(1376)
    return (
        Sample(label="tanh", args=(x, bias, "tanh"), gradients=2),
        Sample(label="exact", args=(x, bias, "none"), gradients=2),
        Sample(label="no bias", args=(x, None, "tanh"), gradients=1),
    )


def _activation(source: _Source, s: int) -> tuple[Sample, ...]:
    return (Sample(label="", args=(source.normal(s, 2, 1376),), gradients=1),)


def _bias_dropout_add(source: _Source, s: int) -> tuple[Sample, ...]:
    x, bias, residual = source.normal(s, 2, 512), source.normal(512), source.normal(s, 2, 512)
    return (Sample(label="", args=(x, bias, residual, 0.0, True), gradients=3),)


def _grouped_matmul(source: _Source, s: int) -> tuple[Sample, ...]:
    weight = source.normal(4, 256, 128)
    # All rows alike, and groups without any.
    shares = {"": (s, s, s, s), "uneven": (0, 3 * s, 1, 0)}
    return tuple(
        Sample(
            label=label,
            args=(source.normal(sum(counts), 128), weight, torch.tensor(counts, device=source.device)),
            gradients=2,
        )
        for label, counts in shares.items()
    )


def _matmul_all_reduce(source: _Source, s: int) -> tuple[Sample, ...]:
    # One rank alone: what several sum up is for tests with several.
    return (Sample(label="", args=(source.normal(s, 2, 512), source.normal(1376, 512), None), gradients=0),)


def _cross_entropy(source: _Source, s: int) -> tuple[Sample, ...]:
    vocabulary = 8192 if s > 256 else 67
    return (Sample(label="", args=(source.normal(s, 2, vocabulary), source.integers(vocabulary, s, 2)), gradients=1),)


def _linear_cross_entropy(source: _Source, s: int) -> tuple[Sample, ...]:
    vocabulary, features = (8192, 512) if s > 256 else (67, 64)
    x, weight = source.normal(s, 2, features), source.normal(vocabulary, features) / 8
    labels = source.integers(vocabulary, s, 2)
    return (
        Sample(label="", args=(x, weight, labels, vocabulary), gradients=2),
        Sample(label="padded, labels elsewhere", args=(x, weight, labels - 9, vocabulary - 17), gradients=2),
    )


def _adamw(source: _Source, s: int) -> tuple[Sample, ...]:
    shapes = ((s, 2048), (s,))
    values = [source.normal(*shape) for shape in (*shapes, *shapes)]
    return (Sample(label="", args=tuple(values), kwargs={"lr": 1e-2, "weight_decay": 0.1}, gradients=0),)


def _clip_grad_norm(source: _Source, s: int) -> tuple[Sample, ...]:
    values = tuple(source.normal(*shape) for shape in ((s, 2048), (s,), (64, s), (3,)))
    return (
        Sample(label="", args=values[:2], kwargs={"limit": 1.0}, gradients=0),
        Sample(label="short", args=values[:2], kwargs={"limit": 1e9}, gradients=0),
        Sample(label="copies", args=values, kwargs={"limit": 1.0, "scale": 8.0}, gradients=0),
        Sample(label="no limit", args=values, kwargs={"limit": 0.0, "scale": 8.0}, gradients=0),
    )


def _make_linear(source: _Source, s: int) -> tuple[Sample, ...]:
    return (Sample(label="", args=(source.normal(s, 2, 512), source.normal(1376, 512)), gradients=2),)


def _embedding(source: _Source, s: int) -> tuple[Sample, ...]:
    # Few different words: the gradient of a row is a long sum.
    vocabulary, words = (8192, 64) if s > 256 else (67, 3)
    return (Sample(label="", args=(source.normal(vocabulary, 32), source.integers(words, s, 2)), gradients=1),)


_MAKERS: Mapping[str, Callable[[_Source, int], tuple[Sample, ...]]] = MappingProxyType(
    {
        "embedding": _embedding,
        "rms_norm": _rms_norm,
        "layer_norm": _layer_norm,
        "rotary": _rotary,
        "attention": _attention,
        "cached_attention": _cached_attention,
        "attention_block": _attention_block,
        "attention_block_backward": _attention_block_backward,
        "swiglu": _gated,
        "geglu": _gated,
        "bias_gelu": _bias_gelu,
        "grouped_matmul": _grouped_matmul,
        "matmul_all_reduce": _matmul_all_reduce,
        "squared_relu": _activation,
        "relu": _activation,
        "bias_dropout_add": _bias_dropout_add,
        "cross_entropy": _cross_entropy,
        "linear_cross_entropy": _linear_cross_entropy,
        "make_linear": _make_linear,
        "clip_grad_norm": _clip_grad_norm,
        "adamw": _adamw,
    }
)
