"""Wrong arguments are refused before any kernel sees them, by the reference and by every implementation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron import accelerators
from megatron.accelerators.base import FLOAT8
from megatron.ops import OPERATIONS, BlockRules, float8, implementations, reference

_X = torch.zeros(4, 2, 6)
_Q = torch.zeros(4, 2, 6, 8)
_RULES = BlockRules(scale=1.0, distance=0)
_HYBRID = float8.formats("hybrid", FLOAT8, weight_gradient=True)


def _attention(q: torch.Tensor = _Q, k: torch.Tensor = _Q, v: torch.Tensor = _Q, **rules: Any) -> tuple[Any, Any]:
    return (q, k, v), {"scale": 1.0, **rules}


_LABELS = torch.zeros(4, 2, dtype=torch.int64)
_POSITIONS = torch.zeros(2, 4, dtype=torch.int64)


def _cached(
    k: torch.Tensor = _Q, v: torch.Tensor = _Q, positions: torch.Tensor = _POSITIONS, **rules: Any
) -> tuple[Any, Any]:
    return (_Q, k, v, positions), {"scale": 1.0, **rules}


WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("rms_norm", (_X, torch.zeros(5), 1e-5), {}, "weight must be"),
    ("rms_norm", (_X.int(), torch.zeros(6), 1e-5), {}, "x must be floating"),
    ("layer_norm", (_X, torch.zeros(5), None, 1e-5), {}, "weight must be"),
    ("layer_norm", (_X, torch.zeros(6), torch.zeros(2, 6), 1e-5), {}, "bias must be"),
    ("rotary", (_Q, torch.zeros(4, 1, 1, 7), torch.zeros(4, 1, 1, 7), False), {}, "even and at most 8, not 7"),
    ("rotary", (_Q, torch.zeros(4, 1, 1, 10), torch.zeros(4, 1, 1, 10), False), {}, "at most 8, not 10"),
    ("rotary", (_Q, torch.zeros(3, 1, 1, 8), torch.zeros(3, 1, 1, 8), False), {}, "cos must be"),
    ("rotary", (_Q, torch.zeros(4, 1, 1, 8), torch.zeros(4, 1, 1, 6), False), {}, "shapes must agree"),
    ("rotary", (_X, torch.zeros(4, 1, 1, 8), torch.zeros(4, 1, 1, 8), False), {}, "4 dimensions"),
    ("attention", *_attention(k=_Q[:, :, :4], v=_Q[:, :, :4]), "g dividing 6"),
    ("attention", *_attention(k=_Q[:3], v=_Q[:3]), "k and v must be"),
    ("attention", *_attention(v=_Q[:, :, :3]), "shapes must agree"),
    ("attention", *_attention(q=_X, k=_X, v=_X), "q must be"),
    ("attention", *_attention(k=_Q.double()), "one dtype"),
    ("attention", *_attention(alibi_slopes=torch.zeros(3)), r"alibi_slopes must be \[6\]"),
    ("attention", *_attention(document_ids=torch.zeros(4, 2)), r"document_ids must be \[2, 4\]"),
    ("attention", *_attention(window=0), "window must be at least 1"),
    ("attention", *_attention(dropout_p=1.0), "dropout_p must be"),
    ("cached_attention", *_cached(k=_Q[:3, :, :4], v=_Q[:3, :, :4]), "with g dividing 6, not"),
    ("cached_attention", *_cached(positions=_POSITIONS.int()), r"positions must be int64 \[2, 4\]"),
    ("cached_attention", *_cached(positions=_POSITIONS.t()), r"positions must be int64 \[2, 4\]"),
    ("cached_attention", *_cached(window=0), "window must be at least 1"),
    ("attention_block", (_Q, _Q[:3, :, :4], _Q[:3, :, :4], _RULES), {}, "g dividing 6"),
    ("attention_block", (_Q, _Q[:3], _Q, _RULES), {}, "shapes must agree"),
    ("attention_block", (_Q, _X, _X, _RULES), {}, "4 dimensions"),
    ("attention_block", (_Q, _Q.double(), _Q, _RULES), {}, "one dtype"),
    ("attention_block", (_Q, _Q, _Q, replace(_RULES, distance=-1)), {}, "distance must be at least 0"),
    ("attention_block", (_Q, _Q, _Q, replace(_RULES, window=0)), {}, "window must be at least 1"),
    ("attention_block", (_Q, _Q, _Q, replace(_RULES, alibi_slopes=torch.zeros(3))), {}, r"alibi_slopes must be \[6\]"),
    ("attention_block", (_Q, _Q, _Q, replace(_RULES, key_documents=torch.zeros(2, 4))), {}, "go together"),
    (
        "attention_block",
        (_Q, _Q, _Q, replace(_RULES, query_documents=torch.zeros(2, 3), key_documents=torch.zeros(2, 4))),
        {},
        r"query_documents must be \[2, 4\]",
    ),
    ("attention_block_backward", (_Q[:3], _Q, _Q, _Q, _Q, torch.zeros(2, 6, 4), _RULES), {}, "shapes must agree"),
    ("attention_block_backward", (_Q, _Q, _Q, _Q, _Q, torch.zeros(2, 4, 6), _RULES), {}, "normalizers must be"),
    (
        "attention_block_backward",
        (_Q, _Q, _Q, _Q, _Q, torch.zeros(2, 6, 4, dtype=torch.bfloat16), _RULES),
        {},
        "float32 or float64",
    ),
    ("swiglu", (_X, _X[..., :5]), {}, "shapes must agree"),
    ("geglu", (_X, _X.int()), {}, "up must be floating"),
    ("bias_gelu", (_X, torch.zeros(5), "tanh"), {}, "bias must be"),
    ("bias_gelu", (_X, None, "sigmoid"), {}, "approximate must be"),
    ("embedding", (_X[0, 0], torch.zeros(3, dtype=torch.int32)), {}, "int64"),
    ("embedding", (_X[0, 0, 0], torch.zeros(3, dtype=torch.int64)), {}, "[v, h]"),
    ("grouped_matmul", (_X[0], torch.zeros(2, 5, 6), torch.tensor([3.0, 0.0])), {}, r"counts must be int64 \[2\]"),
    ("grouped_matmul", (_X[0], torch.zeros(2, 6, 5), torch.tensor([3, 0])), {}, r"weight must be \[E, o, 6\]"),
    ("squared_relu", (_X.int(),), {}, "floating"),
    ("relu", (_X.int(),), {}, "floating"),
    ("bias_dropout_add", (_X, None, _X[:2], 0.1, True), {}, "shapes must agree"),
    ("bias_dropout_add", (_X, None, _X, -0.1, True), {}, "p must be"),
    ("cross_entropy", (_X, torch.zeros(4, 3, dtype=torch.int64)), {}, "labels must be"),
    ("cross_entropy", (_X, torch.zeros(4, 2)), {}, "labels must be int64"),
    ("linear_cross_entropy", (_X, torch.zeros(5, 4), _LABELS, 5), {}, "x must be"),
    ("linear_cross_entropy", (_X, torch.zeros(5, 6).double(), _LABELS, 5), {}, "one dtype"),
    ("linear_cross_entropy", (_X, torch.zeros(5, 6), _LABELS.t(), 5), {}, r"labels must be int64 \[4, 2\]"),
    ("linear_cross_entropy", (_X, torch.zeros(5, 6), _LABELS, 6), {}, "rows must be 0 to 5, not 6"),
    ("matmul_all_reduce", (_X, torch.zeros(5, 4), None), {}, "x must be"),
    ("matmul_all_reduce", (_X, torch.zeros(6), None), {}, "weight must be"),
    ("matmul_all_reduce", (_X, torch.zeros(5, 6).double(), None), {}, "one dtype"),
    ("make_linear", (24, 32, _HYBRID), {}, "24 input features per tensor-parallel rank"),
    ("make_linear", (32, 0, _HYBRID), {}, "0 output features per tensor-parallel rank"),
    ("clip_grad_norm", ({0: [_X]}, _X.device), {"limit": 1.0}, "held by .0. ranks"),
    ("clip_grad_norm", ({1: [_X]}, _X.device), {"limit": -1.0}, "limit must be at least 0"),
    ("clip_grad_norm", ({1: [_X]}, _X.device), {"limit": 1.0, "scale": 0.0}, "scale must be above 0"),
    ("adamw", ([{"params": [_X]}],), {"lr": -1.0}, "lr must be"),
    ("adamw", ([{"params": [_X]}],), {"lr": 1.0, "betas": (1.0, 0.9)}, "beta must be"),
]


def test_every_operation_is_covered():
    assert {case[0] for case in WRONG} == set(OPERATIONS)


@pytest.mark.parametrize(("op", "args", "kwargs", "message"), WRONG)
def test_wrong_arguments_are_refused(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], message: str):
    functions: list[Callable[..., Any]] = [getattr(reference, op)]
    for name in accelerators.DEVICES:
        functions += [candidate.function for candidate in implementations(accelerators.load(name), op)]
    for function in functions:
        with pytest.raises(ValueError, match=message):
            function(*args, **kwargs)
