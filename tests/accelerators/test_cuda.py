import pytest
import torch

from megatron import accelerators
from megatron.accelerators.cuda import card_peak_flops


@pytest.mark.parametrize(
    ("card", "dtype", "tf32", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312e12),
        ("NVIDIA A800-SXM4-80GB", torch.float16, False, 312e12),
        ("NVIDIA A100-SXM4-40GB", torch.float32, True, 156e12),
        ("NVIDIA A100-SXM4-40GB", torch.float32, False, 19.5e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756e12),
        ("NVIDIA H100 NVL", torch.bfloat16, False, 835e12),
        ("NVIDIA H200", torch.bfloat16, False, 989e12),
        ("NVIDIA H20", torch.bfloat16, False, 148e12),
        ("NVIDIA B200", torch.bfloat16, False, 2250e12),
        ("NVIDIA GB200", torch.bfloat16, False, 2500e12),
        ("NVIDIA A10G", torch.bfloat16, False, 70e12),
        ("NVIDIA L40S", torch.bfloat16, False, 362e12),
        ("Tesla V100-SXM2-32GB", torch.float16, False, 125e12),
        ("Tesla V100-SXM2-32GB", torch.bfloat16, False, None),
        ("Tesla V100-SXM2-32GB", torch.float32, True, 15.7e12),
        ("NVIDIA H100 80GB HBM3", torch.int8, False, None),
        ("NVIDIA Unheard Of", torch.bfloat16, False, None),
    ],
)
def test_peak_flops(card: str, dtype: torch.dtype, tf32: bool, flops: float | None):
    assert card_peak_flops(card, dtype, tf32=tf32) == flops


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_local_rank_without_gpu_is_refused():
    with pytest.raises(ValueError, match="local rank 0 has no GPU: 0 visible"):
        accelerators.load("cuda").set_device(0)


@pytest.mark.gpu
def test_gpu_seed_and_memory():
    cuda = accelerators.select("cuda")
    device = cuda.set_device(0)
    cuda.manual_seed(3)
    first = torch.rand(4, device=device)
    cuda.manual_seed(3)
    assert torch.equal(torch.rand(4, device=device), first)
    before = cuda.memory_stats().allocated
    block = torch.ones(2**20, device=device)
    cuda.synchronize()
    assert cuda.memory_stats().allocated >= before + block.numel() * 4
    with pytest.raises(ValueError, match="has no GPU"):
        cuda.set_device(cuda.device_count())
