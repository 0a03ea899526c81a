"""The CPU attention kernels on random shapes and rules, and their dropout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron import accelerators
from megatron.ops import blocked_attention, implementations, reference
from megatron.ops.cuda import document_starts
from megatron.ops.samples import Sample, prepare, relative_error

KERNELS = {candidate.name: candidate for candidate in implementations(accelerators.load("cpu"), "attention")[:-1]}
BLOCK = blocked_attention.BLOCK_ROWS


@st.composite
def _calls(draw: st.DrawFn) -> Sample:
    s = draw(st.sampled_from([1, 2, 31, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17]))
    b, g, repeat, d = draw(st.tuples(*(st.integers(1, 3) for _ in range(3)), st.sampled_from([1, 4, 7])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q, k, v = (torch.randn(s, b, heads, d, generator=generator) for heads in (g * repeat, g, g))
    rules: dict[str, object] = {"scale": draw(st.sampled_from([0.1, 1.0]))}
    if draw(st.booleans()):
        rules["alibi_slopes"] = torch.rand(g * repeat, generator=generator)
    if draw(st.booleans()):
        lengths = torch.randint(0, 2, (b, s), generator=generator) * torch.randint(0, 2, (b, s), generator=generator)
        rules["document_ids"] = lengths.cumsum(1)
    if draw(st.booleans()):
        rules["window"] = draw(st.integers(1, s + 3))
    return Sample(label="", args=(q, k, v), kwargs=rules, gradients=3)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(sample=_calls())
def test_random_calls(name: str, dtype: torch.dtype, sample: Sample):
    rounded = sample.to(dtype)
    actual = prepare("attention", KERNELS[name].function, rounded)()
    oracle = prepare("attention", reference.attention, rounded.to(torch.float64))()
    for mine, true in zip(actual, oracle, strict=True):
        # A lone gradient may cancel to nearly nothing: the error counts against values of order one.
        error = (mine.double() - true).abs().max() / true.abs().max().clamp_min(1.0)
        assert error <= KERNELS[name].tolerance[dtype]


def test_documents_that_come_back_see_each_other_again():
    """Ids need not be sorted for the blocked kernel: equal is what counts."""
    s = 2 * BLOCK + 5
    documents = (torch.arange(s) // 40 % 3).expand(1, -1)
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(torch.randn(s, 1, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    sample = Sample(label="", args=tensors, kwargs={"scale": 0.5, "document_ids": documents}, gradients=3)
    actual = prepare("attention", KERNELS["blocked"].function, sample)()
    assert relative_error(actual, prepare("attention", reference.attention, sample)()) < 1e-12


def test_recomputed_weights_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(torch.randn(200, 2, 4, 8, generator=generator) for _ in range(3))
    sample = Sample(label="", args=tensors, kwargs={"scale": 0.3, "dropout_p": 0.2}, gradients=3)
    run = prepare("attention", KERNELS["blocked"].function, sample)
    torch.manual_seed(5)
    kept = run()
    monkeypatch.setattr(blocked_attention, "KEEP_WEIGHTS_UP_TO", 0)
    torch.manual_seed(5)
    recomputed = run()
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_dropout_follows_the_seed_and_keeps_the_mean(name: str):
    s, p = 192, 0.25
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(s, 1, 4, 8, generator=generator), torch.randn(s, 1, 4, 8, generator=generator)
    v = torch.ones(s, 1, 4, 8)
    function = KERNELS[name].function
    torch.manual_seed(3)
    first = function(q, k, v, scale=0.3, dropout_p=p)
    torch.manual_seed(3)
    assert torch.equal(function(q, k, v, scale=0.3, dropout_p=p), first)
    assert not torch.equal(function(q, k, v, scale=0.3, dropout_p=p), first)
    late = first[s // 2 :]  # rows of many weights: each sum is near 1
    assert abs(late.mean().item() - 1.0) < 0.02
    assert late.std().item() > 0.01


def test_dropout_gradient_matches_finite_differences():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(6, 1, heads, 3, generator=generator, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)
    )

    def seeded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(11)
        return blocked_attention.blocked_attention(q, k, v, scale=0.7, dropout_p=0.3)

    assert torch.autograd.gradcheck(seeded, (q, k, v))


def test_autocast_leaves_the_dtype_alone():
    q = torch.randn(9, 1, 2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = KERNELS["blocked"].function(q, q, q, scale=0.5)
    assert result.dtype == torch.float32
    assert torch.autograd.grad(result.sum(), q)[0].dtype == torch.float32


def test_nothing_is_kept_without_gradients():
    q = torch.randn(40, 1, 2, 4)
    with torch.no_grad():
        assert not KERNELS["blocked"].function(q, q, q, scale=0.5).requires_grad


def test_document_starts_for_variable_length_kernels():
    documents = torch.tensor([[0, 0, 1, 1, 1], [1, 2, 2, 2, 2]])
    starts = document_starts(documents)
    assert starts.tolist() == [0, 2, 5, 6, 10]
    assert starts.dtype == torch.int32
