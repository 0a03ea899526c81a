"""Every implementation that runs here against the reference in float64: results, gradients, dtypes, layouts."""

import functools
from dataclasses import replace

import pytest
import torch

from megatron import accelerators
from megatron.accelerators import Accelerator
from megatron.ops import OPERATIONS, Implementation, implementations, reference
from megatron.ops.check import measure_error
from megatron.ops.linear_cross_entropy import in_blocks
from megatron.ops.samples import prepare, relative_error, samples

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = [device for device in map(accelerators.load, accelerators.DEVICES) if device.is_available()]
RUNNABLE = [
    pytest.param(
        *(device, candidate, dtype),
        id=f"{device.name}-{op}-{candidate.name}-{str(dtype)[6:]}",
        marks=[pytest.mark.gpu] * (device.name == "cuda"),
    )
    for device in DEVICES
    for op in OPERATIONS
    for candidate in implementations(device, op)
    for dtype in DTYPES
    if not candidate.why_unavailable() and dtype in candidate.tolerance
]


@pytest.mark.parametrize(("device", "candidate", "dtype"), RUNNABLE)
def test_error_is_within_the_registered_tolerance(device: Accelerator, candidate: Implementation, dtype: torch.dtype):
    assert measure_error(candidate, dtype, device.set_device(0)) <= candidate.tolerance[dtype]


@pytest.mark.parametrize(("device", "candidate", "dtype"), RUNNABLE)
def test_results_have_the_shape_and_dtype_of_the_reference(
    device: Accelerator, candidate: Implementation, dtype: torch.dtype
):
    for sample in samples(candidate.op, dtype, device.set_device(0), large=False):
        mine = prepare(candidate.op, candidate.function, sample)()
        theirs = prepare(candidate.op, getattr(reference, candidate.op), sample)()
        assert [(x.shape, x.dtype) for x in mine] == [(x.shape, x.dtype) for x in theirs]


CPU_CANDIDATES = [
    pytest.param(candidate, id=f"{op}-{candidate.name}")
    for op in (
        *("rms_norm", "layer_norm", "rotary", "attention", "attention_block", "attention_block_backward"),
        *("cached_attention", "swiglu", "geglu", "bias_gelu", "cross_entropy", "linear_cross_entropy"),
    )
    for candidate in implementations(accelerators.load("cpu"), op)[:-1]
]


@pytest.mark.parametrize("candidate", CPU_CANDIDATES)
def test_arguments_need_not_be_contiguous(candidate: Implementation):
    for sample in samples(candidate.op, torch.float32, torch.device("cpu"), large=False):
        strided = tuple(torch.stack((x, x), dim=-1)[..., 0] if isinstance(x, torch.Tensor) else x for x in sample.args)
        actual = prepare(candidate.op, candidate.function, replace(sample, args=strided))()
        oracle = prepare(candidate.op, getattr(reference, candidate.op), sample.to(torch.float64))()
        assert relative_error(actual, oracle) <= candidate.tolerance[torch.float32]


@pytest.mark.parametrize("candidate", CPU_CANDIDATES)
def test_arguments_are_left_alone(candidate: Implementation):
    for sample in samples(candidate.op, torch.float32, torch.device("cpu"), large=False):
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in sample.args]
        prepare(candidate.op, candidate.function, sample)()
        for old, new in zip(before, sample.args, strict=True):
            assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


def test_norm_weight_gradients_do_not_drift_in_bfloat16():
    """Sums over many rows must be made in float32: torch's own layer norm is 15 % off here."""
    rows = 4096
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(rows, 64, generator=generator).bfloat16() for _ in range(2))
    for op in ("rms_norm", "layer_norm"):
        candidate = implementations(accelerators.load("cpu"), op)[0]
        rest = (1e-5,) if op == "rms_norm" else (None, 1e-5)
        gradients = []
        for function, dtype in ((candidate.function, torch.bfloat16), (getattr(reference, op), torch.float64)):
            weight = torch.ones(64, dtype=dtype, requires_grad=True)
            gradients.append(torch.autograd.grad(function(x.to(dtype), weight, *rest), weight, grad.to(dtype))[0])
        assert relative_error(gradients[:1], gradients[1:]) < 1e-2  # two roundings to bfloat16


@pytest.mark.parametrize("vocabulary", [1, 2, 131_073])
def test_chunked_cross_entropy_at_the_edges(vocabulary: int):
    """A vocabulary larger than a chunk, and logits far from zero."""
    candidate = implementations(accelerators.load("cpu"), "cross_entropy")[0]
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0)) * 50 + 300
    labels = torch.tensor([0, vocabulary - 1, vocabulary // 2])
    mine, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    actual, expected = candidate.function(mine, labels), reference.cross_entropy(theirs, labels)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)  # float32 near 300: 3e-5 apart
    weighting = torch.tensor([1.0, 2.0, 0.0])
    actual.backward(weighting)
    expected.backward(weighting.double())
    torch.testing.assert_close(mine.grad, theirs.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (1, 4), (11, 11), (23, 5), (30, 128)])
def test_linear_cross_entropy_in_blocks(rows: int, columns: int):
    """A last block that is not full, rows that only pad, labels of other ranks: in float64 equal to the definition."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, 8, generator=generator, dtype=torch.float64) for shape in ((7, 2), (30,)))
    labels = torch.randint(-5, 40, (7, 2), generator=generator)
    weighting = torch.randn(2, 7, 2, generator=generator, dtype=torch.float64)
    found = []
    for function in (reference.linear_cross_entropy, functools.partial(in_blocks, columns=columns)):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        parts = function(*inputs, labels, rows)
        finite = sum((part * weights).sum() for part, weights in zip(parts, weighting, strict=True) if rows)
        found.append([*parts, *(torch.autograd.grad(finite, inputs) if rows else ())])
    for mine, true in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


def test_label_outside_the_vocabulary_is_an_error():
    candidate = implementations(accelerators.load("cpu"), "cross_entropy")[0]
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        candidate.function(torch.zeros(2, 5), torch.tensor([0, 5]))
