"""The definitions against torch's own modules and against hand-written loops."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from megatron.ops import OPERATIONS, checks, reference
from megatron.ops.samples import samples

_F64 = 1e-12  # both sides in float64: only the order of additions differs


def _normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_has_definition_check_and_samples(op: str):
    assert getattr(reference, op).__doc__
    assert callable(getattr(checks, op))
    assert samples(op, torch.float32, torch.device("cpu"), large=False)
    assert len(samples(op, torch.float32, torch.device("cpu"), large=True)) == 1


def test_norms_equal_torch():
    x, weight, bias = _normal(5, 2, 8), _normal(8), _normal(8) * 2
    torch.testing.assert_close(
        reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5), rtol=_F64, atol=0
    )
    torch.testing.assert_close(
        reference.layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (8,), weight, bias, 1e-5), rtol=_F64, atol=_F64
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_pairs(interleaved: bool):
    s, d, r = 7, 10, 6
    x, angles = _normal(s, 1, 2, d), _normal(s, 1, 1, r // 2)
    pairs = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    turned = reference.rotary(x, pairs.cos(), pairs.sin(), interleaved)
    for j in range(r // 2):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + r // 2)
        expected = torch.complex(x[..., a], x[..., b]) * torch.exp(1j * angles[..., j])
        torch.testing.assert_close(torch.complex(turned[..., a], turned[..., b]), expected, rtol=_F64, atol=_F64)
    assert torch.equal(turned[..., r:], x[..., r:])


def test_attention_by_hand():
    s, n, g, d = 9, 4, 2, 3
    q, k, v = _normal(s, 1, n, d), _normal(s, 1, g, d), _normal(s, 1, g, d) * 2
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    result = reference.attention(q, k, v, scale=0.7, alibi_slopes=slopes, document_ids=documents, window=4)
    for i in range(s):
        keys = [j for j in range(s) if j <= i and i - j < 4 and documents[0, i] == documents[0, j]]
        for head in range(n):
            shared = head // (n // g)
            scores = [0.7 * float(q[i, 0, head] @ k[j, 0, shared]) + float(slopes[head]) * j for j in keys]
            weights = torch.tensor([math.exp(score) for score in scores], dtype=torch.float64)
            expected = (weights[:, None] * v[keys, 0, shared]).sum(0) / weights.sum()
            torch.testing.assert_close(result[i, 0, head], expected, rtol=1e-10, atol=1e-12)


def test_attention_dropout_keeps_the_mean_and_follows_the_seed():
    s = 64
    q, k, v = _normal(s, 1, 4, 8), _normal(s, 1, 4, 8), torch.ones(s, 1, 4, 8, dtype=torch.float64)
    torch.manual_seed(1)
    first = reference.attention(q, k, v, scale=0.3, dropout_p=0.25)
    torch.manual_seed(1)
    assert torch.equal(reference.attention(q, k, v, scale=0.3, dropout_p=0.25), first)
    assert not torch.equal(reference.attention(q, k, v, scale=0.3, dropout_p=0.25), first)
    assert abs(first.mean().item() - 1.0) < 0.1  # 2048 sums of random weights around 1


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (reference.swiglu, lambda x, y: F.silu(x) * y),
        (reference.geglu, lambda x, y: F.gelu(x) * y),
        (lambda x, y: reference.bias_gelu(x, y[0, 0], "tanh"), lambda x, y: F.gelu(x + y[0, 0], approximate="tanh")),
        (lambda x, y: reference.bias_gelu(x, None, "none"), lambda x, y: F.gelu(x)),
        (lambda x, y: reference.squared_relu(x), lambda x, y: F.relu(x) ** 2),
        (lambda x, y: reference.relu(x), lambda x, y: F.relu(x)),
    ],
)
def test_activations_equal_torch(mine: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor]):
    x, y = _normal(4, 2, 6), _normal(4, 2, 6) * 2
    torch.testing.assert_close(mine(x, y), theirs(x, y), rtol=_F64, atol=_F64)


def test_bias_dropout_add():
    x, bias, residual = _normal(50, 4, 32), _normal(32), _normal(50, 4, 32) * 2
    plain = residual + x + bias
    torch.testing.assert_close(reference.bias_dropout_add(x, bias, residual, 0.3, False), plain, rtol=_F64, atol=_F64)
    torch.testing.assert_close(reference.bias_dropout_add(x, bias, residual, 0.0, True), plain, rtol=_F64, atol=_F64)
    torch.manual_seed(2)
    dropped = reference.bias_dropout_add(x, None, residual, 0.3, True) - residual
    kept = dropped.abs() > 0
    assert abs(kept.double().mean().item() - 0.7) < 0.02  # 6400 draws: standard deviation 0.006
    torch.testing.assert_close(dropped[kept], (x / 0.7)[kept], rtol=1e-9, atol=1e-9)
    wide = reference.bias_dropout_add(x.bfloat16(), None, residual.float(), 0.0, True)
    assert wide.dtype == torch.float32


def test_cross_entropy_equals_torch_and_is_wide():
    logits, labels = _normal(6, 3, 11), torch.arange(18).view(6, 3) % 11
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(6, 3)
    torch.testing.assert_close(reference.cross_entropy(logits, labels), expected, rtol=_F64, atol=_F64)
    assert reference.cross_entropy(logits.bfloat16(), labels).dtype == torch.float32


def test_adamw_by_hand():
    lr, (b1, b2), eps, decay = 0.1, (0.8, 0.9), 1e-6, 0.5
    parameter = _normal(3).requires_grad_()
    expected, m, v = parameter.detach().clone(), torch.zeros(3), torch.zeros(3)
    optimizer = reference.adamw([{"params": [parameter]}], lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)
    for step in range(1, 4):
        parameter.grad = _normal(3) * step
        optimizer.step()
        m, v = b1 * m + (1 - b1) * parameter.grad, b2 * v + (1 - b2) * parameter.grad**2
        expected = expected * (1 - lr * decay) - lr * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + eps)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=0)
    assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
