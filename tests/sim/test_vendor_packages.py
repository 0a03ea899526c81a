"""The faked packages refuse what the vendors' documentation does not allow, so that a wrong call of ours shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.sim import snapshot
from tests.sim.run import counted, run_on_sim


def test_snapshots_hold_what_the_project_calls():
    for device, namespace in (("hpu", "hpu"), ("npu", "npu")):
        content = snapshot.read(device)
        for schema in content["schemas"].values():
            torch._C.parse_schema(f"{namespace}::{schema}")
        assert {"mm", "bmm", "add", "cat", "copy", "native_layer_norm"} <= set(content["native"])
        assert content["source"]


def test_base_names():
    found = snapshot.base_names(["add_.Tensor", "add.out", "copy_", "__ilshift__.Scalar", "npu_x(Tensor a) -> Tensor"])
    assert found == ["__ilshift__", "add", "copy", "npu_x"]


def _refusals(calls: dict[str, Any]) -> dict[str, str]:
    """What each call was refused with; "" where it was accepted."""
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = ""
        except (ValueError, RuntimeError) as error:
            found[name] = str(error).splitlines()[0]
    return found


def _npu_refusals() -> dict[str, str]:
    import torch_npu

    x, weight = torch.randn(4, 2, 64, device="npu"), torch.ones(64, device="npu")
    q = torch.randn(64, 2, 64, device="npu")
    triangle = torch.ones(2048, 2048, dtype=torch.bool, device="npu").triu(1)
    heads = torch.randn(4, 2, 8, 32, device="npu")
    table = torch.ones(4, 1, 1, 32, device="npu")
    scores, mask = torch.randn(1, 2, 64, 64, device="npu"), torch.zeros(1, 1, 64, 64, dtype=torch.bool, device="npu")
    attention = torch_npu.npu_fusion_attention
    return _refusals(
        {
            "unknown keyword": lambda: torch_npu.npu_rms_norm(x, weight, eps=1e-5),
            "weight of another length": lambda: torch_npu.npu_rms_norm(x, weight[:32]),
            "weight of another dtype": lambda: torch_npu.npu_rms_norm(x, weight.half()),
            "host weight": lambda: torch_npu.npu_rms_norm(x, weight.cpu()),
            "float64": lambda: torch_npu.npu_rms_norm(x.double(), weight.double()),
            "layout": lambda: attention(q, q, q, 4, "XYZ"),
            "heads that do not divide": lambda: attention(q, q, q, 5, "SBH"),
            "heads as text": lambda: attention(q, q, q, "4", "SBH"),
            "float mask": lambda: attention(q, q, q, 4, "SBH", atten_mask=triangle.float(), sparse_mode=2),
            "sparse mode": lambda: attention(q, q, q, 4, "SBH", atten_mask=triangle, sparse_mode=99),
            "mask of the sequence's size": lambda: attention(
                q, q, q, 4, "SBH", atten_mask=triangle[:64, :64], sparse_mode=2
            ),
            "no mask": lambda: attention(q, q, q, 4, "SBH", sparse_mode=2),
            "inverted mask": lambda: attention(q, q, q, 4, "SBH", atten_mask=~triangle, sparse_mode=2),
            "mixed dtypes": lambda: attention(q, q.half(), q, 4, "SBH"),
            "misspelt tokens": lambda: attention(q, q, q, 4, "SBH", pre_tokens=5),
            "odd channels": lambda: torch_npu.npu_swiglu(x[..., :63]),
            "cosines of another width": lambda: torch_npu.npu_rotary_mul(heads, table[..., :16], table[..., :16]),
            "one table per sequence, pairs": lambda: torch_npu.npu_rotary_mul(
                heads, table.expand(4, 2, 1, 32), table.expand(4, 2, 1, 32), rotary_mode="interleave"
            ),
            "additive softmax mask": lambda: torch_npu.npu_scaled_masked_softmax(scores, mask.float(), 1.0, False),
            "softmax of 48 columns": lambda: torch_npu.npu_scaled_masked_softmax(
                scores[..., :48], mask[..., :48], 1.0, False
            ),
        }
    )


@pytest.mark.slow
def test_wrong_calls_of_torch_npu_are_refused():
    (found,) = run_on_sim("npu", _npu_refusals)
    assert [name for name, message in found.items() if not message] == []


def _hpu_refusals() -> dict[str, str]:
    from habana_frameworks.torch.hpex.kernels import FusedSDPA, RotaryPosEmbeddingHelperV1
    from habana_frameworks.torch.hpex.normalization import FusedRMSNorm

    x, weight = torch.randn(4, 2, 64, device="hpu"), torch.ones(64, device="hpu")
    q = torch.randn(2, 4, 8, 16, device="hpu", requires_grad=True)
    mask = torch.zeros(1, 1, 8, 8, device="hpu")
    heads, table = torch.randn(4, 2, 8, 32, device="hpu"), torch.ones(4, 1, 1, 32, device="hpu")
    return _refusals(
        {
            "weight of another dtype": lambda: FusedRMSNorm.apply(x, weight.bfloat16(), 1e-5),
            "integer eps": lambda: FusedRMSNorm.apply(x, weight, 1),
            "host weight": lambda: FusedRMSNorm.apply(x, weight.cpu(), 1e-5),
            "mask and causal": lambda: FusedSDPA.apply(q, q, q, mask, 0.0, True),
            "boolean mask": lambda: FusedSDPA.apply(q, q, q, mask.bool(), 0.0, False),
            "softmax mode": lambda: FusedSDPA.apply(q, q, q, None, 0.0, True, None, "quick"),
            "fast, masked, recomputed": lambda: FusedSDPA.apply(q, q, q, mask, 0.0, False, None, "fast", True),
            "heads that do not divide": lambda: FusedSDPA.apply(q, q[:, :3], q[:, :3], None, 0.0, True),
            "one table per sequence": lambda: RotaryPosEmbeddingHelperV1.apply(
                heads, table.expand(4, 2, 1, 32), table.expand(4, 2, 1, 32), 0
            ),
            "cosines of another width": lambda: RotaryPosEmbeddingHelperV1.apply(
                heads, table[..., :16], table[..., :16], 0
            ),
        }
    )


@pytest.mark.slow
def test_wrong_calls_of_habana_frameworks_are_refused():
    (found,) = run_on_sim("hpu", _hpu_refusals)
    assert [name for name, message in found.items() if not message] == []


def _vendor_adamw_restarts() -> tuple[float, int, int]:
    """What the vendor's FusedAdamW does with the state of torch's: the trap that ours avoids."""
    from habana_frameworks.torch.hpex.optimizers import FusedAdamW

    parameter = torch.nn.Parameter(torch.ones(4, device="hpu"))
    parameter.grad = torch.ones(4, device="hpu")
    plain = torch.optim.AdamW([parameter], lr=0.1)
    for _ in range(3):
        plain.step()
    fused = FusedAdamW([parameter], lr=0.1)
    fused.load_state_dict(plain.state_dict())
    fused.step()
    steps = fused.state[parameter]["step"]
    return float(steps), fused.param_groups[0]["step"], len(fused.state[parameter])


@pytest.mark.slow
def test_the_vendors_adamw_forgets_how_many_steps_were_made():
    assert run_on_sim("hpu", _vendor_adamw_restarts)[0] == (3.0, 1, 3)


def _compiled() -> tuple[int, int, bool]:
    from torch_neuronx import _compiler

    _compiler.register()
    layer = torch.nn.Linear(4, 4, device="neuron")
    compiled = torch.compile(layer, backend="neuron", dynamic=False)
    x = torch.ones(2, 4, device="neuron")
    with counted("neuron") as counts:
        same = torch.equal(compiled(x), layer(x))
        compiled(x)
        once = counts().events.get("compile", 0)
        compiled(torch.ones(3, 4, device="neuron"))
        return once, counts().events["compile"], same


@pytest.mark.slow
def test_the_neuron_compiler_compiles_once_per_shape():
    assert run_on_sim("neuron", _compiled)[0] == (1, 2, True)
