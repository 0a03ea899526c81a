"""8-bit layers through Transformer Engine, all of it simulated; or its compiled part alone, where a wheel is named:

TRANSFORMER_ENGINE_WHEEL=transformer_engine-2.20.2-....whl python -m pytest tests/ops/test_engine_linear.py

Then the Python part is real, from the functions that this project calls down to the compiled ones.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron import accelerators
from megatron.accelerators.base import FLOAT8
from megatron.model.recompute import kept_on_host, recomputed
from megatron.ops import UnavailableOpError, build_table, float8
from megatron.ops.engine_linear import EngineProduct
from tests.ops import engine_install
from tests.ops.test_float8 import ROUNDING, expected_products
from tests.sim import snapshot

WHEEL = os.environ.get("TRANSFORMER_ENGINE_WHEEL", "")
needs_wheel = pytest.mark.skipif(not WHEEL, reason="TRANSFORMER_ENGINE_WHEEL does not name a wheel")
SCALES = (32.0, 64.0, 2.0**22)
BOTH = ("hopper", "blackwell")


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(engine_install.SIMULATION)
        compiled = importlib.import_module("transformer_engine_torch")
        return engine_install.load(Path(WHEEL), tmp_path_factory.mktemp("engine"), compiled)


@pytest.fixture(params=["simulated", pytest.param("real", marks=needs_wheel)])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The compiled part, with the other part, simulated or real, in `sys.modules`."""
    monkeypatch.syspath_prepend(engine_install.SIMULATION)
    if request.param == "real":
        sys.modules.update(request.getfixturevalue("real"))
    yield importlib.import_module("transformer_engine_torch")
    engine_install.forget()


def _generation(compiled: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {"hopper": (9, 0), "blackwell": (10, 0)}[name]
    monkeypatch.setattr(compiled.Arch, "blackwell", name == "blackwell")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    utilities = sys.modules.get("transformer_engine.pytorch.utils")
    if utilities is not None:  # real
        utilities.is_non_tn_fp8_gemm_supported.cache_clear()


def _difference(found: torch.Tensor, true: np.ndarray) -> float:
    return float(np.abs(found.detach().double().numpy() - true).max() / np.abs(true).max())


@pytest.mark.parametrize("generation", BOTH)
@pytest.mark.parametrize(("name", "wgrad"), [("hybrid", True), ("e4m3", True), ("hybrid", False)])
def test_products_are_those_of_the_rounded_numbers(engine, monkeypatch, generation, name, wgrad):
    _generation(engine, generation, monkeypatch)
    generator = np.random.default_rng(0)
    x, w, g = (generator.standard_normal(s).astype(np.float32).astype(float) for s in ((16, 32), (48, 32), (16, 48)))
    g *= 1e-6
    true = expected_products(x, w, g, SCALES, name, wgrad)
    scale = [torch.tensor(value) for value in SCALES]
    inputs, weight, grad = (torch.tensor(value, dtype=torch.float32) for value in (x, w, g))
    inputs, grad = inputs.view(4, 4, 32), grad.view(4, 4, 48)
    product = EngineProduct(32, 48, float8.formats(name, FLOAT8, weight_gradient=wgrad))
    casts = []
    for new in (None, True, False):
        a, b = inputs.clone().requires_grad_(), weight.clone().requires_grad_()
        engine.CALLS.clear()
        y = product(a, b, scale[0], scale[1], lambda _: scale[2], new_weight=new)
        y.backward(grad)
        casts.append(engine.CALLS.count("quantize"))
        for mine, expected in zip((y.view(16, 48), a.grad.view(16, 32), b.grad), true, strict=True):
            assert _difference(mine, expected) <= ROUNDING
    assert casts == [4, 3, 2], "the weight is cast in both passes, once, or not at all"
    assert _difference(product.weight_gradient(inputs, grad, scale[0], scale[2]), true[2]) <= ROUNDING
    assert engine.CALLS.count("generic_gemm") == (4 if wgrad else 2)


@pytest.mark.slow
@pytest.mark.parametrize("generation", BOTH)
def test_what_is_kept_can_be_made_again_or_go_to_the_host(engine, monkeypatch, generation):
    _generation(engine, generation, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator).bfloat16().requires_grad_() for s in ((32, 1, 64), (48, 64)))
    product = EngineProduct(64, 48, float8.formats("hybrid", FLOAT8, weight_gradient=True))
    two = torch.tensor(2.0)
    packed: list[weakref.ref[torch.Tensor]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(weakref.ref(tensor))
        return tensor

    def layer(x: torch.Tensor) -> torch.Tensor:
        return product(x, weight, two, two, lambda _: two)

    def gradients(y: torch.Tensor) -> list[torch.Tensor]:
        return [y, *torch.autograd.grad(y.float().pow(2).sum(), (x, weight))]

    plain = gradients(layer(x))
    with kept_on_host([weight], [], pinned=False):
        moved = layer(x)
    for other in (gradients(moved), gradients(recomputed(layer, x))):
        assert all(torch.equal(one, same) for one, same in zip(plain, other, strict=True))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    kept = [saved() for saved in packed]
    assert sorted(t.numel() * t.element_size() for t in kept if t is not weight) == [4, 4, 4, 32 * 64]
    del kept
    gradients(y)
    assert y.requires_grad and {id(saved()) for saved in packed} <= {id(None), id(weight), id(two)}


def test_refusals(engine, monkeypatch):
    _generation(engine, "hopper", monkeypatch)
    hybrid = float8.formats("hybrid", FLOAT8, weight_gradient=True)
    with pytest.raises(ValueError, match="e5m2: this device multiplies E5M2 with E4M3 only"):
        EngineProduct(32, 48, float8.formats("e5m2", FLOAT8, weight_gradient=True))
    product, one = EngineProduct(32, 48, hybrid), torch.tensor(1.0)
    for x, scale, message in (
        (torch.zeros(8, 32), one, "8 tokens; 8-bit products take multiples of 16"),
        (torch.zeros(16, 32).double(), one, "in torch.float32, torch.bfloat16, torch.float16, not in torch.float64"),
        (torch.zeros(16, 32), one.double(), "a scale must be one float32 on cpu, not 1 torch.float64 on cpu"),
        (torch.zeros(16, 32), torch.ones(2), "a scale must be one float32 on cpu, not 2 torch.float32 on cpu"),
        (torch.zeros(16, 32), one.to("meta"), "a scale must be one float32 on cpu, not 1 torch.float32 on meta"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            product(x, torch.zeros(48, 32, dtype=x.dtype), scale, scale, lambda _: one)


def test_the_simulation_has_the_real_signatures(monkeypatch):
    monkeypatch.syspath_prepend(engine_install.SIMULATION)
    module = importlib.import_module("transformer_engine.pytorch")
    for name, parameters in snapshot.read("cuda")["schemas"].items():
        function = module
        for part in name.split("."):
            function = getattr(function, part)
        found = inspect.signature(function)
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
        assert str(inspect.Signature(bare)) == parameters, name
    engine_install.forget()


@needs_wheel
def test_the_snapshot_is_that_of_the_wheel():
    if Path(WHEEL).name != snapshot.read("cuda")["source"]:
        pytest.skip("the snapshot is of another version")
    assert snapshot.cuda(Path(WHEEL)) == snapshot.read("cuda")


def _chosen() -> str:
    """The line of the log, or why there is none."""
    try:
        _, lines = build_table(accelerators.load("cuda"), {"make_linear": "transformer_engine"})
    except UnavailableOpError as error:
        return str(error)
    return next(line for line in lines if "make_linear" in line)


@pytest.mark.parametrize(
    ("version", "capability", "line"),
    [
        ("2.14.0+1234567", (8, 9), "op make_linear      transformer_engine (asked for)"),
        ("2.14.0+1234567", (8, 6), "GPUs compute with 8-bit numbers from compute capability 8.9 on"),
        ("2.14.0+1234567", None, "GPUs compute with 8-bit numbers from compute capability 8.9 on"),
        ("2.13.0+1234567", (8, 9), "it needs transformer-engine 2.14 or later, not 2.13.0+1234567"),
    ],
)
def test_it_is_had_where_package_and_card_are(tmp_path, monkeypatch, version, capability, line):
    with engine_install.simulated(monkeypatch, tmp_path, version, capability=capability):
        assert line in _chosen()


def test_a_package_that_cannot_be_loaded_is_said_to_be_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", None)  # as if built for another torch
    with engine_install.simulated(monkeypatch, tmp_path, "2.20.2", capability=(9, 0)):
        assert "transformer_engine.pytorch cannot be imported: ModuleNotFoundError(" in _chosen()
