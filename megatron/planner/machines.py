"""The machines a run can be planned for: what one rank has, with the source of every figure.

A rank is what one process drives: a GPU, a Gaudi, an Ascend NPU or a NeuronCore. Bandwidths of links are per rank and
per direction. "MAMF" is the best rate of a large bfloat16 matrix product that mamf-finder.py measured
(github.com/stas00/ml-engineering, compute/accelerator/README.md, 2026-08). A figure whose source says "assumed" was not
measured by anybody we know of: a time that leans on it is a guess.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace

LINK_EFFICIENCY = 0.8
"""Share of a link's data-sheet rate that large collectives reach (ml-engineering, network/README.md: "~80%")."""

MEMORY_EFFICIENCY = 0.85
"""Share of the memory's data-sheet rate that element-wise kernels reach: a copy on an H200 runs at 4.1 of 4.8 TB/s."""

RESERVED = 0.06
"""Share of the memory that tensors cannot have: driver context, communicators' buffers, gaps of the allocator."""

_GB = 10**9
_GIB = 2**30
_TERA = 10**12


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One kind of accelerator and the nodes it is built into."""

    name: str
    description: str
    peak: float
    """Dense bfloat16 or float16 FLOP/s of a rank; MFU is relative to it."""
    fp8_peak: float | None
    """Dense FP8 FLOP/s of a rank; used only to compare with published FP8 results."""
    fp32_peak: float
    """Dense FLOP/s with float32 operands (TF32 is off unless a run turns it on)."""
    matmul: float
    """Share of the peak that a very large matrix product reaches."""
    knee: float
    """Smallest side of a matrix product at which half of that is lost to the start and end of the kernel's pipeline."""
    fp8_matmul: float = 0.7
    """The same share of the FP8 peak."""
    attention: tuple[float, float]
    """Share of the peak of a fused attention kernel, forward and backward, causal, head dim 128."""
    attention_op: str = "sdpa"
    """Implementation of attention that a run takes by default."""
    memory: int
    """Bytes of a rank."""
    bandwidth: float
    """Bytes per second between a rank and its memory."""
    ranks_per_node: int
    inside: float
    """Bytes per second, per rank and direction, between ranks of a node."""
    between: float
    """Bytes per second, per rank and direction, between nodes."""
    latency: float = 12e-6
    """Seconds until a collective inside a node begins to move data; twice that between nodes (assumed)."""
    hop: float = 5e-6
    """Seconds from node to node of a ring (assumed: a network's latency and a pass through memory)."""
    sources: tuple[str, ...] = ()

    @property
    def usable(self) -> int:
        """Bytes that tensors can have."""
        return int(self.memory * (1.0 - RESERVED))


_NVIDIA_KNEE = (
    "knee: fit to measured H100 rates, 720, 700, 660 TFLOP/s at sides of 4096, 3072, 2048 (406 to 418 in each case)"
)
_SCALED_KNEE = "knee: that of the H100, scaled by FLOP/s per byte of memory bandwidth (assumed)"

_H100 = Machine(
    name="h100",
    description="NVIDIA H100 SXM, 8 per node, NDR InfiniBand",
    peak=989.4 * _TERA,
    fp8_peak=1978.9 * _TERA,
    fp32_peak=66.9 * _TERA,
    matmul=0.803,
    fp8_matmul=0.709,
    knee=412,
    attention=(0.53, 0.51),
    memory=85 * _GB,
    bandwidth=3.35e12,
    ranks_per_node=8,
    inside=450 * _GB,
    between=50 * _GB,
    sources=(
        "peak, memory, NVLink 4: NVIDIA H100 data sheet (figures with sparsity halved)",
        "matmul: MAMF 794.5 TFLOP/s; FP8 1402.6",
        "attention: cuDNN 9, 518-529 TFLOP/s forward and 499-518 backward (FlashAttention-3 paper, figures 5 and 6)",
        "between nodes: one 400 Gbit/s adapter per GPU (DGX H100)",
        _NVIDIA_KNEE,
    ),
)
_A100 = Machine(
    name="a100",
    description="NVIDIA A100 SXM 80 GB, 8 per node, HDR InfiniBand",
    peak=312 * _TERA,
    fp8_peak=None,
    fp32_peak=19.5 * _TERA,
    matmul=0.869,
    knee=215,
    attention=(0.62, 0.57),
    memory=85 * _GB,
    bandwidth=2.039e12,
    ranks_per_node=8,
    inside=300 * _GB,
    between=25 * _GB,
    sources=(
        "peak, memory, NVLink 3: NVIDIA A100 data sheet",
        "matmul: MAMF 271.2 TFLOP/s",
        "attention: FlashAttention-2 paper (arXiv:2307.08691), figures 5 and 6",
        "between nodes: one 200 Gbit/s adapter per GPU (DGX A100)",
        _SCALED_KNEE,
    ),
)


_H200 = replace(
    _H100,
    name="h200",
    description="NVIDIA H200 SXM, 8 per node, NDR InfiniBand",
    memory=150 * _GB,
    bandwidth=4.8e12,
    sources=("memory: NVIDIA H200 data sheet; all else as for the H100", *_H100.sources),
)
_A800 = replace(
    _A100,
    name="a800",
    description="NVIDIA A800 SXM 80 GB, 8 per node",
    inside=200 * _GB,
    sources=("NVLink: 400 GB/s instead of the A100's 600 GB/s; all else as for the A100", *_A100.sources),
)
_GAUDI2 = Machine(
    name="gaudi2",
    description="Intel Gaudi 2, 8 per node (HLS-Gaudi2)",
    peak=432 * _TERA,
    fp8_peak=865 * _TERA,
    fp32_peak=108 * _TERA,
    matmul=0.969,
    fp8_matmul=0.955,
    knee=245,
    attention=(0.45, 0.40),
    attention_op="fused_sdpa",
    memory=int(94.6 * _GIB),
    bandwidth=2.45e12,
    ranks_per_node=8,
    inside=262.5 * _GB,
    between=37.5 * _GB,
    sources=(
        "peak, memory: Intel Gaudi 2 white paper; memory: what its allocator reports of the 96 GB",
        "matmul: MAMF 418.7 TFLOP/s; FP8 826.5",
        "links: 21 ports of 100 Gbit/s to the 7 others, 3 out of the node (docs.habana.ai, network configuration)",
        "attention, float32 peak: assumed",
        _SCALED_KNEE,
    ),
)
_GAUDI3 = Machine(
    name="gaudi3",
    description="Intel Gaudi 3, 8 per node (HLS-3)",
    peak=1677 * _TERA,
    fp8_peak=1677 * _TERA,
    fp32_peak=229 * _TERA,
    matmul=0.741,
    fp8_matmul=0.769,
    knee=635,
    attention=(0.35, 0.30),
    attention_op="fused_sdpa",
    memory=126 * _GB,
    bandwidth=3.67e12,
    ranks_per_node=8,
    inside=525 * _GB,
    between=75 * _GB,
    sources=(
        "peak: at the 1600 MHz it runs at (ml-engineering); the white paper's 1835 TFLOP/s need 1750 MHz",
        "matmul: MAMF 1243 TFLOP/s; FP8 1289.5",
        "memory: Intel Gaudi 3 white paper, 3.67 TB/s; links: 21 and 3 ports of 200 Gbit/s (docs.habana.ai)",
        "attention: assumed",
        _SCALED_KNEE,
    ),
)
_ASCEND910B = Machine(
    name="ascend910b",
    description="Huawei Ascend 910B (64 GB), 8 per node (Atlas 800T A2)",
    peak=313 * _TERA,
    fp8_peak=None,
    fp32_peak=78 * _TERA,
    matmul=0.80,
    knee=275,
    attention=(0.45, 0.35),
    attention_op="fusion_attention",
    memory=64 * _GB,
    bandwidth=1.6e12,
    ranks_per_node=8,
    inside=196 * _GB,
    between=25 * _GB,
    sources=(
        "peak, memory bandwidth, HCCS links: figures commonly quoted for the 910B3; the vendor publishes none",
        "between nodes: one 200 Gbit/s RoCE port per NPU",
        "matmul, attention, float32 peak: assumed",
        _SCALED_KNEE,
    ),
)
_TRN1 = Machine(
    name="trn1",
    description="AWS Trainium, one NeuronCore-v2 per rank, 32 per node (trn1.32xlarge)",
    peak=95 * _TERA,
    fp8_peak=95 * _TERA,
    fp32_peak=23.75 * _TERA,
    matmul=0.80,
    knee=320,
    attention=(0.35, 0.30),
    attention_op="compiled_sdpa",  # torch's own operators, which the vendor's compiler fuses as it can
    memory=16 * _GIB,
    bandwidth=410 * _GB,
    ranks_per_node=32,
    inside=96 * _GB,
    between=3.125 * _GB,
    sources=(
        "per chip (2 cores): 190 TFLOP/s, 32 GiB at 820 GB/s, 384 GB/s of NeuronLink-v2 (AWS Neuron documentation)",
        "between nodes: 800 Gbit/s of EFA per node",
        "matmul, attention: assumed",
        _SCALED_KNEE,
    ),
)
_TRN2 = Machine(
    name="trn2",
    description="AWS Trainium2, one logical NeuronCore (2 physical) per rank, 64 per node (trn2.48xlarge)",
    peak=166.75 * _TERA,
    fp8_peak=324.75 * _TERA,
    fp32_peak=45.25 * _TERA,
    matmul=0.80,
    knee=320,
    attention=(0.35, 0.30),
    attention_op="compiled_sdpa",
    memory=24 * _GIB,
    bandwidth=725 * _GB,
    ranks_per_node=64,
    inside=160 * _GB,
    between=6.25 * _GB,
    sources=(
        "per chip (4 logical cores): 667 TFLOP/s, 96 GiB at 2.9 TB/s, 1.28 TB/s of NeuronLink-v3 (AWS Neuron docs)",
        "between nodes: 3.2 Tbit/s of EFA per node",
        "matmul, attention: assumed",
        _SCALED_KNEE,
    ),
)
MACHINES: Mapping[str, Machine] = {
    machine.name: machine for machine in (_H100, _H200, _A100, _A800, _GAUDI2, _GAUDI3, _ASCEND910B, _TRN1, _TRN2)
}


def machine(name: str) -> Machine:
    """The machine of that name.

    Raises:
        ValueError: there is none; names the known ones.
    """
    if name in MACHINES:
        return MACHINES[name]
    near = difflib.get_close_matches(name, MACHINES, n=1)
    hint = f"the nearest is {near[0]}; " if near else ""
    raise ValueError(f"--machine {name}: no such machine; {hint}known: {', '.join(MACHINES)}")
