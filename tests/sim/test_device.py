"""The simulated devices behave like devices: their tensors are elsewhere, and what happens to them is counted."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.sim.build import Device
from tests.sim.run import DEVICES, counted, run_on_sim

pytestmark = pytest.mark.slow
every_device = pytest.mark.parametrize("device", DEVICES)

_SUMS_IN_ANOTHER_ORDER = 1e-6  # float32 results of a few hundred terms
_MIB = 2**20


def _mixtures(device: Device) -> list[str]:
    x, y = torch.ones(4, 4, device=device), torch.ones(4, 4)
    ids = torch.zeros(2, dtype=torch.int64)
    calls = {
        "add": lambda: x + y,
        "matmul": lambda: x @ y,
        "linear": lambda: F.linear(y, x),
        "cat": lambda: torch.cat([x, y]),
        "stack": lambda: torch.stack([y, x]),
        "where": lambda: torch.where(x > 0, x, y),
        "embedding": lambda: F.embedding(ids, x),
        "cross entropy": lambda: F.cross_entropy(x, torch.zeros(4, dtype=torch.int64)),
        "attention": lambda: F.scaled_dot_product_attention(x[None], y[None], x[None]),
        "rms_norm": lambda: F.rms_norm(x, (4,), y[0]),
        "in place": lambda: x.add_(y),
        "out": lambda: torch.mul(y, y, out=torch.empty_like(x)),
        "list": lambda: torch._foreach_add([x], [y]),
        "index": lambda: x.index_select(0, ids),
    }
    return [name for name, call in calls.items() if not _refused(call)]


def _refused(call) -> bool:
    try:
        call()
    except RuntimeError as error:
        return "same device" in str(error) or "on the same" in str(error) or "Expected" in str(error)
    return False


@every_device
def test_host_and_device_tensors_do_not_mix(device):
    assert run_on_sim(device, _mixtures, device) == [[]]


def _numpy_is_refused(device: Device) -> str:
    with pytest.raises(TypeError) as refusal:
        torch.ones(2, device=device).numpy()
    return str(refusal.value)


@every_device
def test_device_memory_is_not_readable(device):
    assert device in run_on_sim(device, _numpy_is_refused, device)[0]


def _two_devices_do_not_mix() -> str:
    x, y = torch.ones(2, device="npu:0"), torch.ones(2, device="npu:1")
    assert (x.device.index, y.device.index) == (0, 1)
    with pytest.raises(RuntimeError) as refusal:
        x + y
    torch.npu.set_device(1)
    assert torch.ones(2, device="npu").device == y.device
    return str(refusal.value)


def test_devices_of_one_kind_do_not_mix():
    assert "npu:1" in run_on_sim("npu", _two_devices_do_not_mix)[0]


def _network(device: str, dtype: torch.dtype | None) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((6, 16), (32, 16), (32,), (8, 32))]
    x, first, bias, second = (tensor.to(device).requires_grad_() for tensor in tensors)
    with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        hidden = F.gelu(F.linear(x, first, bias))
        assert hidden.dtype == (dtype or torch.float32)
        loss = F.linear(hidden, second).float().softmax(-1).square().sum()
    loss.backward()
    assert all(tensor.grad.device == tensor.device for tensor in (x, first, bias, second))
    return [tensor.cpu().numpy() for tensor in (loss.detach(), x.grad, first.grad, bias.grad, second.grad)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@every_device
def test_gradients_and_autocast_equal_the_cpus(device, dtype):
    (actual,) = run_on_sim(device, _network, device, dtype)
    for mine, theirs in zip(actual, _network("cpu", dtype), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=_SUMS_IN_ANOTHER_ORDER, atol=_SUMS_IN_ANOTHER_ORDER)


def _random(device: Device) -> None:
    module = torch.get_device_module(device)
    host = torch.get_rng_state()
    module.manual_seed(5)
    state = module.get_rng_state()
    draws = [torch.rand(4, device=device), torch.randn(4, device=device), F.dropout(torch.ones(64, device=device))]
    # A kernel that takes no generator must draw from the device's, too.
    draws.append(torch.native_dropout(torch.ones(64, device=device), 0.5, True)[0])
    module.set_rng_state(state)
    again = [torch.rand(4, device=device), torch.randn(4, device=device), F.dropout(torch.ones(64, device=device))]
    again.append(torch.native_dropout(torch.ones(64, device=device), 0.5, True)[0])
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert not torch.equal(torch.rand(4, device=device), draws[0])
    assert torch.equal(torch.get_rng_state(), host)
    own = torch.Generator(device=device).manual_seed(1)
    twin = torch.Generator(device=device).manual_seed(1)
    assert torch.equal(torch.randn(3, device=device, generator=own), torch.randn(3, device=device, generator=twin))


@every_device
def test_random_numbers_have_their_own_state(device):
    run_on_sim(device, _random, device)


def _saved(device: Device) -> None:
    tensors = {
        "x": torch.arange(6.0, device=device).view(2, 3),
        "y": torch.ones(3, dtype=torch.bfloat16, device=device),
    }
    file = io.BytesIO()
    torch.save(tensors, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["x"].device.type == device
    assert torch.equal(loaded["x"], tensors["x"]) and torch.equal(loaded["y"], tensors["y"])
    file.seek(0)
    assert torch.load(file, map_location="cpu", weights_only=True)["x"].device.type == "cpu"
    storage = tensors["x"].untyped_storage()
    storage.resize_(0)
    assert storage.size() == 0
    storage.resize_(24)
    assert storage.size() == 24


@every_device
def test_tensors_are_saved_and_loaded(device):
    run_on_sim(device, _saved, device)


def _memory(device: Device) -> None:
    module = torch.get_device_module(device)
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    block = torch.empty(4 * _MIB, dtype=torch.uint8, device=device)
    assert module.memory_allocated() == before + 4 * _MIB
    view = block[:10]
    del block
    assert module.memory_allocated() == before + 4 * _MIB, "a view keeps its memory"
    del view
    assert module.memory_allocated() == before
    assert module.max_memory_allocated() >= before + 4 * _MIB
    module.reset_peak_memory_stats()
    assert module.max_memory_allocated() == before


@every_device
def test_memory_is_accounted_for(device):
    run_on_sim(device, _memory, device)


def _counts(device: Device) -> None:
    x = torch.ones(8, 8, device=device)
    with counted(device) as counts:
        y = x @ x
        y.add_(1.0)
        found = counts()
        assert found.torch_operators() == {"mm", "add"}
        assert (found.to_device, found.to_host, found.host_reads) == (0, 0, {})
        assert found.new_signatures == 2
        x @ x
        assert counts().new_signatures == 2, "the same operator on the same shapes is compiled once"
        x[:4] @ x
        x.mul_(0.5)
        x.mul_(0.25)
        assert counts().new_signatures == 5, "another shape, another operator, another number"
        x.sum().item()
        x.nonzero()
        x.cpu()
        torch.ones(3).to(device)
        found = counts()
    assert found.host_reads == {"aten::_local_scalar_dense": 1, "aten::nonzero": 1}
    assert (found.to_device, found.to_host) == (1, 1)
    with counted(device) as counts:
        assert counts().kernels == {}


@every_device
def test_what_happens_is_counted(device):
    run_on_sim(device, _counts, device)


def _streams(device: Device) -> None:
    module = torch.get_device_module(device)
    side = module.Stream()
    assert side != module.current_stream()
    with module.stream(side):
        assert module.current_stream() == side
        x = torch.ones(2, device=device)
        x.record_stream(side)
        event = side.record_event()
    assert module.current_stream() == module.default_stream()
    module.current_stream().wait_event(event)
    event.synchronize()
    module.synchronize()
    assert event.query()
    assert torch.accelerator.current_accelerator().type == device


@every_device
def test_streams_and_events_exist(device):
    run_on_sim(device, _streams, device)
