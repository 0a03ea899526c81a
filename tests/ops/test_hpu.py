"""What is particular to Gaudi's kernels: how they are called, and an optimizer whose step survives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron import accelerators
from megatron.ops import UnavailableOpError, build_table, implementations
from megatron.ops.hpu import additive_mask
from megatron.ops.reference import visible_keys
from tests.sim.run import counted, run_on_sim

HPU = accelerators.load("hpu")
_FLOAT32 = 1e-6  # relative: one update of AdamW in another order of operations

needs_no_gaudi = pytest.mark.skipif(HPU.is_available(), reason="needs a machine without Gaudi software")


@needs_no_gaudi
def test_without_the_package_everything_falls_back_and_says_why():
    _, lines = build_table(HPU, {})
    assert any(line.startswith("op attention        reference (fused_sdpa unavailable: python pack") for line in lines)
    with pytest.raises(UnavailableOpError, match="habana_frameworks is not installed"):
        build_table(HPU, {"attention": "fused_sdpa"})


def test_names_of_the_attention_forms():
    names = [candidate.name for candidate in implementations(HPU, "attention")]
    assert names == [
        *("fused_sdpa", "fused_sdpa_recompute", "fused_sdpa_fast", "fused_sdpa_fast_recompute"),
        "reference",
    ]


def test_nothing_runs_torchs_fused_adamw_which_gaudi_has_no_kernel_for():
    from tests.sim import snapshot

    assert "_fused_adamw" not in snapshot.read("hpu")["native"]
    assert [candidate.name for candidate in implementations(HPU, "adamw")] == ["fused", "reference"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_additive_mask(dtype):
    q = torch.zeros(6, 2, 4, 8, dtype=dtype)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]])
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    mask = additive_mask(q, slopes, documents, 2)
    assert mask.shape == (2, 4, 6, 6) and mask.dtype == dtype
    visible = visible_keys(6, q.device, document_ids=documents, window=2).expand(2, 4, 6, 6)
    assert (mask[~visible] == torch.finfo(dtype).min).all()
    distance = torch.arange(6) - torch.arange(6)[:, None]
    assert torch.equal(mask[visible], (slopes[:, None, None] * distance).to(dtype).expand(2, 4, 6, 6)[visible])
    assert additive_mask(q, None, None, 3).shape == (1, 1, 6, 6)


def _default_table() -> list[str]:
    return build_table(accelerators.select("hpu"), {})[1]


@pytest.mark.slow
def test_default_table_on_the_card():
    (lines,) = run_on_sim("hpu", _default_table)
    chosen = {line.split()[1]: line.split()[2] for line in lines}
    assert chosen["attention"] == "fused_sdpa"
    assert [chosen[op] for op in ("rms_norm", "rotary", "adamw")] == ["fused"] * 3


def _dropout(heads: int, kv_heads: int) -> tuple[float, bool, bool]:
    accelerator = accelerators.select("hpu")
    ops, _ = build_table(accelerator, {})
    device = accelerator.set_device(0)
    q = torch.randn(64, 2, heads, 8, device=device)
    k, v = torch.randn(64, 2, kv_heads, 8, device=device), torch.ones(64, 2, kv_heads, 8, device=device)
    torch.hpu.manual_seed(1)
    first = ops.attention(q, k, v, scale=0.3, dropout_p=0.25)
    torch.hpu.manual_seed(1)
    again = ops.attention(q, k, v, scale=0.3, dropout_p=0.25)
    other = ops.attention(q, k, v, scale=0.3, dropout_p=0.25)
    return first.mean().item(), torch.equal(first, again), torch.equal(first, other)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_dropout_keeps_the_mean_and_follows_the_seed(kv_heads):
    ((mean, same, other),) = run_on_sim("hpu", _dropout, 8, kv_heads)
    assert abs(mean - 1.0) < 0.05  # 8192 sums of random weights around 1
    assert same and not other


def _switched(first: str, second: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Five steps with one optimizer, five with another that got its state; and ten with torch's alone."""
    accelerator = accelerators.select("hpu")
    device = accelerator.set_device(0)
    start = torch.linspace(-1, 1, 24).view(4, 6)
    gradients = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(10)]

    def steps(names: tuple[str, ...]) -> tuple[np.ndarray, float]:
        parameter = torch.nn.Parameter(start.to(device))
        state = None
        for number, gradient in enumerate(gradients):
            if number % (len(gradients) // len(names)) == 0:
                name = names[number * len(names) // len(gradients)]
                ops, _ = build_table(accelerator, {"adamw": name})
                optimizer = ops.adamw([{"params": [parameter]}], lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
                if state is not None:
                    optimizer.load_state_dict(state)
            parameter.grad = gradient.to(device)
            optimizer.step()
            state = optimizer.state_dict()
        return parameter.detach().cpu().numpy(), float(optimizer.state[parameter]["step"])

    mixed, count = steps((first, second))
    return mixed, steps(("reference",))[0], count


@pytest.mark.slow
@pytest.mark.parametrize("lazy", ["0", "1"], ids=["eager", "lazy"])
@pytest.mark.parametrize(("first", "second"), [("reference", "fused"), ("fused", "reference"), ("fused", "fused")])
def test_the_step_survives_a_change_of_optimizers(first, second, lazy):
    ((mixed, plain, count),) = run_on_sim("hpu", _switched, first, second, env={"PT_HPU_LAZY_MODE": lazy})
    assert count == 10.0
    np.testing.assert_allclose(mixed, plain, rtol=_FLOAT32, atol=_FLOAT32)


def _calls_and_marks() -> tuple[dict[str, int], dict[str, int], int]:
    accelerator = accelerators.select("hpu")
    ops, _ = build_table(accelerator, {})
    device = accelerator.set_device(0)
    parameters = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(5)]
    optimizer = ops.adamw([{"params": parameters}], lr=0.1)
    for parameter in parameters[:4]:
        parameter.grad = torch.ones(3, device=device)
    optimizer.step()
    parameters[4].grad = torch.ones(3, device=device)
    with counted("hpu") as counts:
        optimizer.step()
        found = counts()
    return found.vendor(), found.events, found.to_device


@pytest.mark.slow
@pytest.mark.parametrize(("lazy", "marks"), [("0", {}), ("1", {"mark_step": 1})])
def test_one_kernel_for_all_parameters_of_the_same_step(lazy, marks):
    ((calls, events, copies),) = run_on_sim("hpu", _calls_and_marks, env={"PT_HPU_LAZY_MODE": lazy})
    assert calls == {"optimizer_adamw": 2}, "the parameter that got its first gradient later is one step behind"
    assert events == marks
    assert copies == 2


def _refused_dtype() -> str:
    accelerator = accelerators.select("hpu")
    ops, _ = build_table(accelerator, {})
    x = torch.ones(2, 4, dtype=torch.float64, device=accelerator.set_device(0))
    with pytest.raises(ValueError) as refusal:
        ops.rms_norm(x, torch.ones(4, device=x.device), 1e-5)
    return str(refusal.value)


@pytest.mark.slow
def test_float64_is_refused():
    assert "--op rms_norm=fused computes in" in run_on_sim("hpu", _refused_dtype)[0]
