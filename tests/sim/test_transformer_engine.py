"""The faked transformer engine of Gaudi follows the vendor's public tests of the real one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.sim.run import counted, run_on_sim

pytestmark = pytest.mark.slow


def _layer(rows: int, value: float, weight: float, **recipe: Any) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    from habana_frameworks.torch.hpex.experimental import transformer_engine as te

    scaling = te.recipe.DelayedScaling(reduce_amax=False, **recipe)
    x = torch.full((rows, 8), value, device="hpu", requires_grad=True)
    w = torch.full((4, 8), weight, device="hpu", requires_grad=True)
    return te, te.fp8_autocast(enabled=True, fp8_recipe=scaling), x, w


def _out_of_scale(name: str) -> list[list[float]]:
    from habana_frameworks.torch.hpex.experimental.transformer_engine.recipe import Format

    te, autocast, x, w = _layer(2, 109000.0, 3.26, fp8_format=Format[name], amax_history_len=16)
    layer = te.Linear(8, 4, bias=False, skip_weight_param_allocation=True)
    found = []
    for _ in range(2):
        x.grad = w.grad = None
        with autocast:
            out = layer(x, w)
        out.sum().backward()
        found.append([value.flatten()[0].item() for value in (out, x.grad, w.grad)])
    return found


@pytest.mark.parametrize(("name", "cast", "weight"), [("E5M2", 114688.0, 3.5), ("HYBRID", 106496.0, 3.25)])
def test_scales_follow_one_pass_late(name, cast, weight):
    ((first, second),) = run_on_sim("hpu", _out_of_scale, name)
    assert first[0] < 8 * cast * weight, "the first pass has measured nothing and saturates"
    assert second == [8 * cast * weight, 4 * 3.5, 2 * 114688.0]  # gradients are of E5M2 in both


def _history() -> list[list[float]]:
    from habana_frameworks.torch.hpex.experimental import transformer_engine as te

    layer = te.Linear(8, 4, bias=False)
    found = []
    for length, values in ((3, (1.0, 2.0, 3.0, 4.0)), (2, (5.0,)), (4, (6.0,))):
        scaling = te.recipe.DelayedScaling(amax_history_len=length, reduce_amax=False)
        for value in values:
            with te.fp8_autocast(enabled=True, fp8_recipe=scaling):
                layer(torch.full((2, 8), value, device="hpu"))
        found.append(layer.fp8_meta["scaling_fwd"].amax_history[:, 0].tolist())
    return found


def test_history_keeps_the_most_recent_values():
    assert run_on_sim("hpu", _history) == [[[4.0, 3.0, 2.0], [5.0, 4.0], [6.0, 5.0, 4.0, 0.0]]]


def _measurement() -> dict[str, Any]:
    te, autocast, x, w = _layer(2, 1.0, 1.0, interval=3)
    layer = te.Linear(8, 4, bias=False, skip_weight_param_allocation=True)

    def measured(*, manual: bool, value: bool = True) -> bool:
        te.fp8.set_measurement_mode(manual=manual, manual_value=value)
        with autocast:
            layer(x, w)
        return layer.measured

    by_interval = [measured(manual=False) for _ in range(6)]
    by_hand = [measured(manual=True, value=value) for value in (True, False)]
    with te.distributed.activation_checkpointing():
        recomputed = measured(manual=True)
    with counted("hpu") as counts, autocast:
        layer(x, w)
        operators = set(counts().vendor())
    assert not te.fp8.is_fp8_enabled()
    with torch.no_grad():
        plain = torch.equal(layer(x, w), torch.nn.functional.linear(x, w))
    return {
        "by interval": by_interval,
        "by hand": by_hand,
        "recomputed": recomputed,
        "operators": operators,
        "plain": plain,
    }


def test_measurement_and_operators():
    (found,) = run_on_sim("hpu", _measurement)
    assert found["by interval"] == [True, False, False] * 2
    assert found["by hand"] == [True, False]
    assert found["recomputed"] is False
    assert found["operators"] == {"cast_to_fp8_v2", "fp8_gemm_v2"}
    assert found["plain"]


def _state() -> tuple[np.ndarray, np.ndarray]:
    te, autocast, x, w = _layer(2, 3.0, 5.0, amax_history_len=2)
    first, second = (te.Linear(8, 4, bias=False, skip_weight_param_allocation=True) for _ in range(2))
    with autocast:
        first(x, w).sum().backward()
        first(x, w)
        second.load_state_dict(first.state_dict())
        return first(x, w).detach().cpu().numpy(), second(x, w).detach().cpu().numpy()


def test_state_is_part_of_a_checkpoint():
    ((one, other),) = run_on_sim("hpu", _state)
    np.testing.assert_array_equal(one, other)


def _refusals() -> list[str]:
    te, _, x, w = _layer(2, 1.0, 1.0)
    calls = (
        lambda: te.Linear(8, 4, skip_weight_param_allocation=True)(x),
        lambda: te.Linear(8, 4)(x, w),
        lambda: te.Linear(8, 4, bias=False, skip_weight_param_allocation=True)(x, w[:, :4]),
        lambda: te.recipe.DelayedScaling(amax_compute_algo="mean"),
        lambda: te.fp8_autocast(enabled=True, fp8_recipe="hybrid"),
    )
    found = []
    for call in calls:
        with pytest.raises((ValueError, TypeError)) as refusal:
            call()
        found.append(str(refusal.value))
    return found


def test_wrong_calls_are_refused():
    assert len(run_on_sim("hpu", _refusals)[0]) == 5
