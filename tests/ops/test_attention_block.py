"""Attention in pieces: pieces joined by hand give the whole, and queries that see nothing do no harm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron import accelerators
from megatron.ops import BlockRules, implementations, reference
from megatron.ops.samples import relative_error

EXACT = 1e-12  # float64, sums in another order
NAMES = [candidate.name for candidate in implementations(accelerators.load("cpu"), "attention_block")]


def _function(op: str, name: str):
    return next(c.function for c in implementations(accelerators.load("cpu"), op) if c.name == name)


def _draw(*heads: int, length: int = 200) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 2, n, 16, generator=generator, dtype=torch.float64) for n in heads]


@pytest.mark.parametrize("name", NAMES)
def test_two_pieces_of_the_keys_joined_are_the_whole(name):
    """The definition of a piece against the definition of attention, with all rules at once."""
    q, k, v, grad = _draw(6, 2, 2, 6)
    documents = torch.tensor([[0] * 90 + [1] * 110, [0] * 30 + [1] * 170])
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05, 0.02, 0.01])
    common = {"scale": 0.3, "alibi_slopes": slopes, "window": 130}
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = reference.attention(*inputs, **common, document_ids=documents)
    expected.backward(grad)
    queries, cut = 100, 100  # the later half of the queries, in two pieces of the keys
    ids = {"query_documents": documents[:, queries:]}
    pieces = [
        (k[part], v[part], BlockRules(**common, **ids, distance=distance, key_documents=documents[:, part]))
        for part, distance in ((slice(0, cut), 100), (slice(cut, 200), 0))
    ]
    forward, backward = _function("attention_block", name), _function("attention_block_backward", name)
    found = [forward(q[queries:], *piece) for piece in pieces]
    totals = torch.logsumexp(torch.stack([normalizers for _, normalizers in found]), dim=0)
    result = sum(part * (own - totals).exp().permute(2, 0, 1)[..., None] for part, own in found)
    assert relative_error([result], [expected.detach()[queries:]]) < EXACT
    early = slice(0, queries)
    own = BlockRules(**common, distance=0, query_documents=documents[:, early], key_documents=documents[:, early])
    first = forward(q[early], k[early], v[early], own)
    late = [backward(grad[queries:], q[queries:], *piece[:2], result, totals, piece[2]) for piece in pieces]
    begin = backward(grad[early], q[early], k[early], v[early], *first, own)
    grad_q = torch.cat((begin[0], late[0][0] + late[1][0]))
    grad_k, grad_v = (torch.cat((begin[at] + late[0][at], late[1][at])) for at in (1, 2))
    assert relative_error([grad_q, grad_k, grad_v], [x.grad for x in inputs]) < EXACT


@pytest.mark.parametrize("name", NAMES)
def test_queries_that_see_no_key(name):
    q, k, v, grad = _draw(4, 2, 2, 4)
    alone = torch.arange(400).view(2, 200)
    rules = BlockRules(scale=1.0, distance=200, query_documents=alone + 1000, key_documents=alone)
    result, normalizers = _function("attention_block", name)(q, k, v, rules)
    assert torch.equal(result, torch.zeros_like(q))
    assert torch.equal(normalizers, torch.full((2, 4, 200), -torch.inf, dtype=torch.float64))
    finite = torch.zeros_like(normalizers)  # of other pieces
    for gradient in _function("attention_block_backward", name)(grad, q, k, v, result, finite, rules):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", NAMES)
def test_keys_out_of_the_window(name):
    q, k, v = _draw(4, 2, 2)
    result, normalizers = _function("attention_block", name)(q, k, v, BlockRules(scale=1.0, distance=210, window=11))
    assert normalizers[:, :, 0].isfinite().logical_not().all()
    assert torch.equal(result, torch.zeros_like(q))


class _Names(TorchDispatchMode):
    """Notes down the attention operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in function.__name__:
            self.calls.append(function.__name__)
        return function(*args, **(kwargs or {}))


def _flash(op: str):
    return implementations(accelerators.load("cuda"), op)[0].function


def test_flash_kernels_get_the_arguments_that_torch_publishes():
    """Torch's own shape inference stands for the kernels, which run on NVIDIA GPUs only."""
    q, k, v, grad = (x.to("meta", torch.bfloat16) for x in _draw(6, 2, 2, 6))
    for distance in (0, 200):
        rules = BlockRules(scale=0.3, distance=distance)
        with _Names() as found:
            result, normalizers = _flash("attention_block")(q, k, v, rules)
            gradients = _flash("attention_block_backward")(grad, q, k, v, result, normalizers, rules)
        assert (result.shape, normalizers.shape, normalizers.dtype) == (q.shape, (2, 6, 200), torch.float32)
        assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
        name = "_scaled_dot_product_flash_attention"
        assert found.calls == [f"{name}.default", f"{name}_backward.default"]


@pytest.mark.parametrize("rules", [BlockRules(scale=0.3, distance=0, window=5), BlockRules(scale=1.0, distance=0)])
def test_flash_leaves_what_it_cannot_do_to_the_portable_form(rules):
    q, k, v, grad = _draw(4, 2, 2, 4)
    expected = reference.attention_block(q, k, v, rules)
    assert relative_error(list(_flash("attention_block")(q, k, v, rules)), list(expected)) < EXACT
    arguments = (grad, q, k, v, *expected, rules)
    found = _flash("attention_block_backward")(*arguments)
    assert relative_error(list(found), list(reference.attention_block_backward(*arguments))) < EXACT
