import pytest
import torch

from megatron import accelerators

_MIB = 2**20


@pytest.fixture
def cpu() -> accelerators.Accelerator:
    return accelerators.select("cpu")


def test_a_seed_gives_the_same_numbers_again(cpu: accelerators.Accelerator):
    cpu.manual_seed(7)
    first = torch.rand(4)
    cpu.manual_seed(7)
    assert torch.equal(torch.rand(4), first)


def test_memory_follows_an_allocation(cpu: accelerators.Accelerator):
    cpu.reset_peak_memory()
    before = cpu.memory_stats()
    block = torch.ones(64 * _MIB, dtype=torch.uint8)
    during = cpu.memory_stats()
    assert during.allocated - before.allocated > 48 * _MIB  # pages freed meanwhile by others are far fewer than 16 MiB
    del block
    after = cpu.memory_stats()
    assert after.allocated < during.allocated
    assert after.max_allocated >= during.allocated - _MIB  # the kernel counts pages per thread and adds up now and then
    assert after.reserved == after.allocated


def test_description_and_peak(cpu: accelerators.Accelerator):
    assert "cores" in cpu.device_description()
    assert cpu.peak_flops(torch.bfloat16) is None
    assert cpu.device_count() == 1
    with pytest.raises(ValueError, match="-1"):
        cpu.set_device(-1)
