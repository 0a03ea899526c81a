"""NVIDIA GPUs through torch's own CUDA support and NCCL."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from megatron.accelerators.base import FLOAT8, Accelerator, Capabilities, EnvVar, MemoryStats

_AMPERE = 8  # first major compute capability with bfloat16 and TF32 tensor cores
_ADA = (8, 9)  # first compute capability with 8-bit tensor cores


@dataclass(frozen=True)
class Card:
    """Peak dense FLOP/s of a card, from NVIDIA's data sheets (figures "with sparsity" halved)."""

    pattern: str
    """Regular expression searched in `torch.cuda.get_device_name()`."""
    half: float
    """float16, and bfloat16 from Ampere on."""
    tf32: float | None
    float32: float
    bfloat16: bool = True


# Searched in this order: a narrower name stands before a wider one.
CARDS = (
    Card(r"\bGB200\b|\bGB300\b", 2500e12, 1250e12, 80e12),
    Card(r"\bB200\b|\bB300\b", 2250e12, 1125e12, 75e12),
    Card(r"\bB100\b", 1750e12, 875e12, 60e12),
    Card(r"\bH[12]00 NVL\b", 835e12, 417e12, 60e12),
    Card(r"\bH[18]00 PCIe\b", 756e12, 378e12, 51e12),
    Card(r"\bH100\b|\bH200\b|\bH800\b|\bGH200\b", 989e12, 494e12, 67e12),
    Card(r"\bH20\b", 148e12, 74e12, 44e12),
    Card(r"\bA100\b|\bA800\b", 312e12, 156e12, 19.5e12),
    Card(r"\bA40\b", 149.7e12, 74.8e12, 37.4e12),
    Card(r"\bA30\b", 165e12, 82e12, 10.3e12),
    Card(r"\bA10G\b", 70e12, 35e12, 35e12),
    Card(r"\bA10\b", 125e12, 62.5e12, 31.2e12),
    Card(r"\bL40S\b", 362e12, 183e12, 91.6e12),
    Card(r"\bL40\b", 181e12, 90.5e12, 90.5e12),
    Card(r"\bL4\b", 121e12, 60e12, 30.3e12),
    Card(r"\bRTX 4090\b", 165.2e12, 82.6e12, 82.6e12),
    Card(r"\bRTX 3090\b", 71e12, 35.6e12, 35.6e12),
    Card(r"\bRTX A6000\b", 154.8e12, 77.4e12, 38.7e12),
    Card(r"\bV100-PCIE\b", 112e12, None, 14e12, bfloat16=False),
    Card(r"\bV100\b", 125e12, None, 15.7e12, bfloat16=False),
    Card(r"\bT4\b", 65e12, None, 8.1e12, bfloat16=False),
)


@dataclass(frozen=True)
class Cuda:
    """NVIDIA GPUs: one per process."""

    name: str = "cuda"
    torch_device_type: str = "cuda"
    collective_backend: str = "nccl"
    deepspeed_name: str | None = "cuda"
    ops_module: str = "megatron.ops.cuda"
    environment: tuple[EnvVar, ...] = (
        EnvVar(
            "TORCH_DEVICE_BACKEND_AUTOLOAD", "0", "an installed vendor package without its driver breaks `import torch`"
        ),
        EnvVar("PYTORCH_ALLOC_CONF", "expandable_segments:True", "large models otherwise fail by fragmentation"),
    )

    @property
    def capabilities(self) -> Capabilities:
        """bfloat16 needs compute capability 8.0 or later, 8-bit floats 8.9; without a GPU, those of the newest."""
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else _ADA
        dtypes = {torch.float64, torch.float32, torch.float16}
        if capability[0] >= _AMPERE:
            dtypes.add(torch.bfloat16)
        float8 = FLOAT8 if capability >= _ADA else {}
        return Capabilities(pinned_memory=True, dtypes=frozenset(dtypes), float8=float8)

    def unavailable_reason(self) -> str:
        """Why torch sees no GPU; empty when it sees one."""
        if torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA"
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} finds no GPU (driver, or CUDA_VISIBLE_DEVICES)"
        return ""

    def is_available(self) -> bool:
        """Whether torch has CUDA and sees a GPU."""
        return not self.unavailable_reason()

    def device_count(self) -> int:
        """GPUs this process can see."""
        return torch.cuda.device_count()

    def set_device(self, local_rank: int) -> torch.device:
        """Make GPU `local_rank` current. Raises ValueError when there is no such GPU."""
        count = self.device_count()
        if not 0 <= local_rank < count:
            raise ValueError(
                f"local rank {local_rank} has no GPU: {count} visible. Start at most {count} processes per node "
                "(--nproc-per-node) or show more GPUs (CUDA_VISIBLE_DEVICES)."
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def synchronize(self) -> None:
        """Wait for all streams of the current GPU."""
        torch.cuda.synchronize()

    def end_of_micro_step(self) -> None:
        """Nothing to cut: kernels are queued when they are called."""

    def manual_seed(self, seed: int) -> None:
        """Seed the generator of the current GPU."""
        torch.cuda.manual_seed(seed)

    def memory_stats(self) -> MemoryStats:
        """Figures of torch's caching allocator, in bytes."""
        return MemoryStats(
            allocated=torch.cuda.memory_allocated(),
            max_allocated=torch.cuda.max_memory_allocated(),
            reserved=torch.cuda.memory_reserved(),
            max_reserved=torch.cuda.max_memory_reserved(),
        )

    def reset_peak_memory(self) -> None:
        """Start the peaks of `memory_stats` anew."""
        torch.cuda.reset_peak_memory_stats()

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Data sheet figure of the card; float32 is TF32 where torch is allowed to use it."""
        tf32 = torch.get_float32_matmul_precision() != "highest"
        return card_peak_flops(torch.cuda.get_device_name(), dtype, tf32=tf32)

    def device_description(self) -> str:
        """Card, memory and CUDA version."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gib = properties.total_memory / 2**30
        return f"{self.device_count()} x {properties.name}, {gib:.0f} GiB, CUDA {torch.version.cuda}"


def accelerator() -> Accelerator:
    """NVIDIA GPUs."""
    return Cuda()


def card_peak_flops(card_name: str, dtype: torch.dtype, *, tf32: bool) -> float | None:
    """Peak dense FLOP/s of the card called `card_name` in `dtype`; None for an unknown card or type.

    Args:
        card_name: as `torch.cuda.get_device_name()` gives it.
        dtype: type of the operands of the matrix products.
        tf32: whether float32 products may run in TF32.
    """
    card = next((card for card in CARDS if re.search(card.pattern, card_name)), None)
    if card is None:
        return None
    if dtype == torch.float16 or (dtype == torch.bfloat16 and card.bfloat16):
        return card.half
    if dtype == torch.float32:
        return card.tf32 if tf32 and card.tf32 is not None else card.float32
    return None
