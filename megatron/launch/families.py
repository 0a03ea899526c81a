"""All families of variables, by the name that `--family` takes, and the variables that vendors' software reads."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.launch import hpu, hpu_bloom, hpu_mixtral, neuron, npu
from megatron.launch.env import PLAIN, Family

FAMILIES: Mapping[str, Family] = {
    "plain": PLAIN,
    "gaudi-llama": hpu.LLAMA,
    "gaudi-bloom": hpu_bloom.BLOOM,
    "gaudi-mixtral": hpu_mixtral.MIXTRAL,
    "ascend": npu.ASCEND,
    "neuron": neuron.NEURON,
}

PASSED_ON: Mapping[str, tuple[str, ...]] = {
    "cuda": ("NCCL_", "CUDA_", "TORCH_NCCL_"),
    "hpu": ("PT_HPU_", "HABANA_", "HCCL_", "HLS_", "LOG_LEVEL_", "ENABLE_CONSOLE"),
    "npu": (
        *("HCCL_", "ASCEND_", "NPU_", "PYTORCH_NPU_", "TASK_QUEUE_ENABLE", "COMBINED_ENABLE", "INF_NAN_MODE_"),
        *("MULTI_STREAM_MEMORY_REUSE", "CPU_AFFINITY_CONF"),
    ),
    "neuron": ("NEURON_", "TORCH_NEURONX_", "FI_", "CCOM_", "XLA_", "PJRT_", "MALLOC_ARENA_MAX"),
}
"""Device -> beginnings of the names of variables that its software reads, and that every node must have."""
_EVERYWHERE = (
    *("GLOO_", "OMP_", "TORCH_DISTRIBUTED_DEBUG"),
    # A shell that ssh starts does not know where the compilers and libraries of a vendor or a virtual environment are.
    *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH"),
)


def passed_on(device: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of this node that the processes on other nodes need as well, too."""
    beginnings = (*PASSED_ON.get(device.partition("_")[0], ()), *_EVERYWHERE)
    return {name: environ[name] for name in sorted(environ) if name.startswith(beginnings)}
