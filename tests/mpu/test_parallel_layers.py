"""Mappings, layers and cross entropy on several ranks against their definitions on one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron import accelerators
from megatron.mpu import collectives, mappings
from megatron.mpu.cross_entropy import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from megatron.mpu.groups import Group, ProcessGroups, build_groups, single_process
from megatron.mpu.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, column_linears
from megatron.mpu.sharding import local_slice
from megatron.mpu.topology import Topology
from megatron.ops import build_table, reference_ops
from tests.support import run_ranks

WORLD = 4
# float64 throughout, so that only the order of sums differs.
TOLERANCE = 1e-12


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def _tensor_parallel() -> Group:
    return build_groups(Topology(WORLD, tp=WORLD), "cpu").tp


def _check_mapping(
    mapping: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, expected: Tensor, expected_grad: Tensor
) -> None:
    x = x.clone().requires_grad_()
    before, grad_before = x.detach().clone(), grad.clone()
    result = mapping(x)
    result.backward(grad)
    _close(result.detach(), expected)
    _close(x.grad, expected_grad)
    assert torch.equal(x.detach(), before)
    assert torch.equal(grad, grad_before)


def _check_mappings() -> None:
    group = _tensor_parallel()
    rank = group.rank
    xs, grads = [_draw(8, 2, 3, seed=r) for r in range(WORLD)], [_draw(8, 2, 3, seed=10 + r) for r in range(WORLD)]
    part = slice(2 * rank, 2 * rank + 2)
    x_sum, grad_sum = sum(xs), sum(grads)
    shards, grad_shards = [x[:2] for x in xs], [grad[:2] for grad in grads]
    _check_mapping(lambda x: mappings.copy_to_region(x, group), xs[rank], grads[rank], xs[rank], grad_sum)
    _check_mapping(lambda x: mappings.reduce_from_region(x, group), xs[rank], grads[rank], x_sum, grads[rank])
    _check_mapping(
        lambda x: mappings.gather_sequence(x, group, partial_grad=True),
        shards[rank],
        grads[rank],
        torch.cat(shards),
        grad_sum[part],
    )
    _check_mapping(
        lambda x: mappings.gather_sequence(x, group, partial_grad=False),
        shards[rank],
        grads[0],
        torch.cat(shards),
        grads[0][part],
    )
    _check_mapping(
        lambda x: mappings.reduce_scatter_sequence(x, group),
        xs[rank],
        grad_shards[rank],
        x_sum[part],
        torch.cat(grad_shards),
    )
    _check_mapping(
        lambda x: mappings.gather_last_dim(x, group),
        xs[rank],
        torch.cat(grads, dim=-1),
        torch.cat(xs, dim=-1),
        grads[rank],
    )
    with pytest.raises(ValueError, match="dimension of 6 cannot be divided over 4 ranks"):
        mappings.reduce_scatter_sequence(_draw(6, 1), group)


def test_mappings_and_their_gradients() -> None:
    run_ranks(WORLD, _check_mappings)


def test_a_group_of_one_is_the_identity() -> None:
    group, x = single_process().tp, _draw(4, 2)
    for mapping in (
        mappings.copy_to_region,
        mappings.reduce_from_region,
        mappings.reduce_scatter_sequence,
        mappings.gather_last_dim,
        collectives.all_reduce,
        collectives.all_gather,
        collectives.reduce_scatter,
    ):
        assert mapping(x, group) is x
    assert mappings.gather_sequence(x, group, partial_grad=True) is x


def _check_linears(sequence_parallel: bool) -> None:
    """Two column-parallel layers and a row-parallel one, against plain linear maps of the whole."""
    group = _tensor_parallel()
    x = _draw(8, 2, 6).requires_grad_()
    weights = [_draw(12, 6, seed=1), _draw(20, 6, seed=2), _draw(6, 12, seed=3)]
    biases = [_draw(12, seed=4), _draw(20, seed=5), _draw(6, seed=6)]
    whole = [w.clone().requires_grad_() for w in (*weights, *biases)]
    first, second = F.linear(x, whole[0], whole[3]), F.linear(x, whole[1], whole[4])
    expected = F.linear(first.tanh(), whole[2], whole[5])
    grad, second_grad = _draw(8, 2, 6, seed=7), _draw(8, 2, 20, seed=8)
    torch.autograd.backward((expected, second), (grad, second_grad))

    shared = {"bias": True, "group": group, "sequence_parallel": sequence_parallel, "dtype": torch.float64}
    layers = [
        ColumnParallelLinear(6, 12, **shared),
        ColumnParallelLinear(6, 20, **shared),
        RowParallelLinear(12, 6, ops=reference_ops(), **shared),
    ]
    names = ("mlp.gate", "mlp.up", "mlp.down")
    parts = {}
    for layer, name, weight, bias in zip(layers, names, weights, biases, strict=True):
        for kind, value in (("weight", weight), ("bias", bias)):
            parts[name, kind] = local_slice(f"layers.0.{name}.{kind}", value.shape, group.rank, WORLD)
            getattr(layer, kind).data.copy_(value[parts[name, kind]])
    own = x.detach()[2 * group.rank : 2 * group.rank + 2] if sequence_parallel else x.detach()
    own = own.clone().requires_grad_()
    mine, other = column_linears(own, layers[:2])
    result, bias = layers[2](mine.tanh())
    result = result + bias
    tokens = slice(2 * group.rank, 2 * group.rank + 2) if sequence_parallel else slice(None)
    columns = slice(5 * group.rank, 5 * group.rank + 5)
    torch.autograd.backward((result, other), (grad[tokens], second_grad[..., columns]))

    _close(result.detach(), expected.detach()[tokens])
    _close(own.grad, x.grad[tokens])
    for at, (layer, name) in enumerate(zip(layers, names, strict=True)):
        _close(layer.weight.grad, whole[at].grad[parts[name, "weight"]])
        _close(layer.bias.grad, whole[3 + at].grad[parts[name, "bias"]])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_linear_layers_equal_plain_ones(sequence_parallel: bool) -> None:
    run_ranks(WORLD, _check_linears, sequence_parallel)


def _check_refusals() -> None:
    group = _tensor_parallel()
    for layer in (
        lambda: ColumnParallelLinear(4, 6, bias=False, group=group),
        lambda: RowParallelLinear(6, 4, bias=False, ops=reference_ops(), group=group),
        lambda: VocabParallelEmbedding(6, 4, ops=reference_ops(), group=group),
    ):
        with pytest.raises(ValueError, match="6 cannot be divided over 4 tensor-parallel ranks; --tensor-model"):
            layer()


def test_layers_that_do_not_divide_are_refused() -> None:
    run_ranks(WORLD, _check_refusals)


def _cross_entropy(vocab_size: int, padded: int, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of the logits held here."""
    logits = 30 * _draw(5, 3, padded, seed=1)
    labels = torch.randint(0, vocab_size, (5, 3), generator=torch.Generator().manual_seed(2))
    labels[0, 0], labels[0, 1] = 0, vocab_size - 1
    width = padded // group.size
    own = logits[..., group.rank * width : (group.rank + 1) * width].to(dtype).requires_grad_()
    losses = vocab_parallel_cross_entropy(own, labels, vocab_size=vocab_size, group=group, ops=reference_ops())
    losses.backward(_draw(5, 3, seed=3).to(losses.dtype))
    return losses.detach(), own.grad


def _linear_cross_entropy(vocab_size: int, padded: int, group: Group) -> tuple[Tensor, ...]:
    """Losses and gradients of the input (summed over the ranks) and the weight held here; without all logits."""
    x, weight = _draw(5, 3, 6, seed=1), _draw(padded, 6, seed=4)
    labels = torch.randint(0, vocab_size, (5, 3), generator=torch.Generator().manual_seed(2))
    labels[0, 0], labels[0, 1] = 0, vocab_size - 1
    own = weight.chunk(group.size)[group.rank].clone()
    inputs = [x.requires_grad_(), own.requires_grad_()]
    ops, _ = build_table(accelerators.load("cpu"), {"linear_cross_entropy": "chunked"})
    whole = mappings.copy_to_region(inputs[0], group)
    losses = vocab_parallel_linear_cross_entropy(whole, own, labels, vocab_size=vocab_size, group=group, ops=ops)
    return losses.detach(), *torch.autograd.grad(losses, inputs, _draw(5, 3, seed=3))


VOCABULARIES = ((32, 32), (27, 32), (13, 32), (8, 32))  # in the last ones some ranks hold nothing but padding


def _check_cross_entropy() -> None:
    group = _tensor_parallel()
    for vocab_size, padded in VOCABULARIES:
        columns = slice(group.rank * padded // WORLD, (group.rank + 1) * padded // WORLD)
        for dtype, tolerance in ((torch.float64, TOLERANCE), (torch.bfloat16, 1e-5)):
            losses, grad = _cross_entropy(vocab_size, padded, group, dtype)
            expected, expected_grad = _cross_entropy(vocab_size, padded, single_process().tp, dtype)
            torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
            # A bfloat16 gradient may round either way.
            slack = tolerance if dtype == torch.float64 else 2**-8
            torch.testing.assert_close(grad, expected_grad[..., columns], rtol=slack, atol=tolerance)
            assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert grad.dtype == dtype
        found = _linear_cross_entropy(vocab_size, padded, group)
        losses, grad, grad_weight = _linear_cross_entropy(vocab_size, padded, single_process().tp)
        for mine, whole in zip(found, (losses, grad, grad_weight[columns]), strict=True):
            torch.testing.assert_close(mine, whole, rtol=TOLERANCE, atol=TOLERANCE)


def test_vocabulary_parallel_cross_entropy_equals_the_plain_one() -> None:
    run_ranks(WORLD, _check_cross_entropy)


@pytest.mark.parametrize(("vocab_size", "padded"), VOCABULARIES)
def test_cross_entropy_without_logits_equals_that_of_logits(vocab_size: int, padded: int) -> None:
    losses, grad, grad_weight = _linear_cross_entropy(vocab_size, padded, single_process().tp)
    x, weight = _draw(5, 3, 6, seed=1).requires_grad_(), _draw(padded, 6, seed=4).requires_grad_()
    labels = torch.randint(0, vocab_size, (5, 3), generator=torch.Generator().manual_seed(2))
    labels[0, 0], labels[0, 1] = 0, vocab_size - 1
    logits = F.linear(x, weight[:vocab_size])
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(5, 3)
    expected_grads = torch.autograd.grad(expected, (x, weight), _draw(5, 3, seed=3))
    for mine, theirs in zip((losses, grad, grad_weight), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("vocab_size", "padded"), VOCABULARIES)
def test_cross_entropy_of_one_rank_is_torchs(vocab_size: int, padded: int) -> None:
    losses, grad = _cross_entropy(vocab_size, padded, single_process().tp, torch.float64)
    logits = (30 * _draw(5, 3, padded, seed=1)).requires_grad_()
    labels = torch.randint(0, vocab_size, (5, 3), generator=torch.Generator().manual_seed(2))
    labels[0, 0], labels[0, 1] = 0, vocab_size - 1
    expected = F.cross_entropy(logits[..., :vocab_size].flatten(0, 1), labels.flatten(), reduction="none").view(5, 3)
    expected.backward(_draw(5, 3, seed=3))
    _close(losses, expected.detach())
    _close(grad, logits.grad)


def _places() -> dict[str, tuple[int, ...]]:
    groups: ProcessGroups = build_groups(Topology(WORLD, tp=2), "cpu")
    assert groups.mesh is not None
    assert groups.sum_over_data(torch.tensor(float(groups.world.rank))).item() == sum(groups.dp.ranks)
    return {name: getattr(groups, name).ranks for name in ("tp", "dp", "cp", "pp", "dp_cp", "world")}


def test_groups_follow_the_topology() -> None:
    results = run_ranks(WORLD, _places)
    assert results[2] == {
        "tp": (2, 3),
        "dp": (0, 2),
        "cp": (2,),
        "pp": (2,),
        "dp_cp": (0, 2),
        "world": (0, 1, 2, 3),
    }


def test_groups_of_a_process_without_torch_distributed() -> None:
    assert build_groups(Topology(1), "cpu") == single_process()
    with pytest.raises(ValueError, match=r"topology has 2 ranks, torch.distributed has 1"):
        build_groups(Topology(2), "cpu")
