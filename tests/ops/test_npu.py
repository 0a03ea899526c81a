"""What is particular to Ascend's kernels: masks, layouts and limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron import accelerators
from megatron.ops import UnavailableOpError, build_table
from megatron.ops.npu import compressed_causal_mask
from tests.sim.run import counted, run_on_sim

NPU = accelerators.load("npu")

needs_no_npu = pytest.mark.skipif(NPU.is_available(), reason="needs a machine without Ascend software")


@needs_no_npu
def test_without_the_package_everything_falls_back_and_says_why():
    _, lines = build_table(NPU, {})
    assert any(
        line.startswith("op attention        sdpa (fusion_attention unavailable: python package torch_n")
        for line in lines
    )
    with pytest.raises(UnavailableOpError, match="torch_npu is not installed"):
        build_table(NPU, {"attention": "fusion_attention"})


def test_other_devices_are_told_where_a_kernel_is():
    with pytest.raises(UnavailableOpError, match="fusion_attention exists for npu, not for cpu"):
        build_table(accelerators.load("cpu"), {"attention": "fusion_attention"})


def test_the_product_of_several_ranks_is_ascends_alone():
    with pytest.raises(UnavailableOpError, match="fused exists for npu, not for cpu"):
        build_table(accelerators.load("cpu"), {"matmul_all_reduce": "fused"})
    _, lines = build_table(NPU, {})
    assert any(line.startswith("op matmul_all_reduce torch") for line in lines), "only on request"


def test_compressed_mask_hides_what_is_above_the_diagonal():
    mask = compressed_causal_mask(torch.device("cpu"))
    assert mask.shape == (2048, 2048)
    assert not mask[5, :6].any() and mask[5, 6:].all()
    assert compressed_causal_mask(torch.device("cpu")) is mask


def _ops(asked: dict[str, str] | None = None) -> tuple[Any, torch.device, list[str]]:
    accelerator = accelerators.select("npu")
    ops, lines = build_table(accelerator, asked or {})
    return ops, accelerator.set_device(0), lines


def _default_table() -> list[str]:
    return _ops()[2]


@pytest.mark.slow
def test_default_table_on_the_chip():
    (lines,) = run_on_sim("npu", _default_table)
    chosen = {line.split()[1]: line.split()[2] for line in lines}
    assert chosen["attention"] == "fusion_attention"
    assert [chosen[op] for op in ("rms_norm", "rotary", "swiglu", "adamw")] == ["fused"] * 4


def _masks() -> dict[str, tuple[int, set[str]]]:
    """Bytes that attention takes beyond its arguments and result, and the operators it calls."""
    ops, device, _ = _ops()
    s = 512
    q, k = torch.randn(s, 1, 2, 16, device=device), torch.randn(s, 1, 1, 16, device=device)
    documents = (torch.arange(s, device=device) // 100)[None]
    rules: dict[str, dict[str, Any]] = {
        "causal": {},
        "window": {"window": 100},
        "window longer than the sequence": {"window": 600},
        "documents": {"document_ids": documents},
        "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25], device=device)},
    }
    ops.attention(q, k, k, scale=0.25)  # makes the compressed mask
    found = {}
    for name, rule in rules.items():
        torch.npu.reset_peak_memory_stats()
        before = torch.npu.memory_allocated()
        with counted("npu") as counts:
            ops.attention(q, k, k, scale=0.25, **rule)
            found[name] = (torch.npu.max_memory_allocated() - before, set(counts().vendor()))
    return found


@pytest.mark.slow
def test_causal_masks_and_windows_take_no_memory_of_their_own():
    (found,) = run_on_sim("npu", _masks)
    square = 512 * 512
    for name in ("causal", "window", "window longer than the sequence"):
        assert found[name][0] < square, name
    assert found["documents"][0] >= square
    assert found["alibi"][1] == {"npu_fusion_attention_v2"}
    assert all(operators == {"npu_fusion_attention"} for name, (_, operators) in found.items() if name != "alibi")


def _dropout(implementation: str) -> tuple[float, bool, bool]:
    ops, device, _ = _ops({"attention": implementation})
    q, k = torch.randn(64, 2, 8, 8, device=device), torch.randn(64, 2, 2, 8, device=device)
    v = torch.ones(64, 2, 2, 8, device=device)

    def call(seed: int) -> torch.Tensor:
        torch.npu.manual_seed(seed)
        return ops.attention(q, k, v, scale=0.3, dropout_p=0.25)

    return call(1).mean().item(), torch.equal(call(1), call(1)), torch.equal(call(1), call(2))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["fusion_attention", "masked_softmax"])
def test_dropout_keeps_the_mean_and_follows_the_seed(implementation):
    ((mean, same, other),) = run_on_sim("npu", _dropout, implementation)
    assert abs(mean - 1.0) < 0.05  # 8192 sums of random weights around 1
    assert same and not other


def _refusals() -> dict[str, str]:
    ops, device, _ = _ops()
    softmax, _, _ = _ops({"attention": "masked_softmax"})
    cases = {
        "too many heads": lambda: ops.attention(*_qkv(4, 257, 8, device), scale=1.0),
        "too many channels": lambda: ops.attention(*_qkv(4, 1, 769, device), scale=1.0),
        "too long": lambda: softmax.attention(*_qkv(4097, 1, 2, device), scale=1.0),
        "float64": lambda: ops.swiglu(*(torch.ones(2, 4, dtype=torch.float64, device=device),) * 2),
        "wide rotation": lambda: ops.rotary(
            torch.ones(2, 1, 1, 896, device=device), *(torch.ones(2, 1, 1, 896, device=device),) * 2, False
        ),
    }
    found = {}
    for name, call in cases.items():
        with pytest.raises(ValueError) as refusal:
            call()
        found[name] = str(refusal.value)
    return found


def _qkv(s: int, n: int, d: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(torch.ones(s, 1, n, d, device=device) for _ in range(3))


@pytest.mark.slow
def test_limits_are_named_with_what_to_use_instead():
    (found,) = run_on_sim("npu", _refusals)
    assert all("use --op" in message for message in found.values())
    assert "at most 256 heads" in found["too many heads"]
    assert "not 4097: use --op attention=fusion_attention" in found["too long"]
