"""The adapters to GPU packages against stand-ins with the packages' signatures; see vendor_packages.py."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron import accelerators
from megatron.ops import UnavailableOpError, build_table, cuda, engine_norms, implementations, reference
from megatron.ops.samples import prepare, relative_error, samples
from tests.ops import vendor_packages

_ENGINE = {
    "transformer_engine.pytorch.constants": vendor_packages.transformer_engine_constants,
    "transformer_engine_torch": vendor_packages.transformer_engine_torch,
}
_ADAPTERS: list[tuple[str, str, dict[str, Callable[[], ModuleType]]]] = [
    ("attention", "flash_attn", {"flash_attn": vendor_packages.flash_attn}),
    ("attention", "flash_attn_3", {"flash_attn_interface": vendor_packages.flash_attn_interface}),
    ("rms_norm", "apex", {"apex.normalization.fused_layer_norm": vendor_packages.apex_fused_layer_norm}),
    ("layer_norm", "apex", {"apex.normalization.fused_layer_norm": vendor_packages.apex_fused_layer_norm}),
    ("rms_norm", "liger", {"liger_kernel.ops.rms_norm": vendor_packages.liger_rms_norm}),
    ("swiglu", "liger", {"liger_kernel.ops.swiglu": vendor_packages.liger_swiglu}),
    ("rms_norm", "transformer_engine", _ENGINE),
    ("layer_norm", "transformer_engine", _ENGINE),
    ("rms_norm", "torch", {}),
    ("layer_norm", "torch", {}),
    ("cross_entropy", "torch", {}),
    ("cross_entropy", "chunked", {}),
]
_LOOSE = 3e-2  # layouts and arguments are under test: a wrong one is off by tenths; torch's CPU layer norm by 2e-2


@pytest.mark.parametrize(("op", "name", "packages"), _ADAPTERS, ids=[f"{op}-{name}" for op, name, _ in _ADAPTERS])
def test_arguments_reach_the_right_place(
    op: str, name: str, packages: dict[str, Callable[[], ModuleType]], monkeypatch: pytest.MonkeyPatch
):
    for path, make in packages.items():
        parts = path.split(".")
        for length in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:length]), ModuleType(parts[length - 1]))
        monkeypatch.setitem(sys.modules, path, make())
    (adapter,) = (known for known in implementations(accelerators.load("cuda"), op) if known.name == name)
    for sample in samples(op, torch.bfloat16, torch.device("cpu"), large=False):
        if name == "flash_attn_3" and sample.kwargs.get("alibi_slopes") is not None:
            with pytest.raises(ValueError, match="no ALiBi and no dropout"):
                adapter.function(*sample.args, **sample.kwargs)
            continue
        actual = prepare(op, adapter.function, sample)()
        oracle = prepare(op, getattr(reference, op), sample.to(torch.float64))()
        assert relative_error(actual, oracle) <= _LOOSE, sample.label


_PACKAGES = {
    "attention=flash_attn": "flash-attn",
    "rms_norm=apex": "apex with CUDA kernels",
    "layer_norm=apex": "apex with CUDA kernels",
    "rms_norm=liger": "liger-kernel",
    "swiglu=liger": "liger-kernel",
    "rms_norm=transformer_engine": "transformer-engine",
    "layer_norm=transformer_engine": "transformer-engine",
    "make_linear=transformer_engine": "transformer-engine",
}


@pytest.mark.parametrize(("asked", "package"), _PACKAGES.items())
def test_a_missing_package_is_named(asked: str, package: str):
    op, _, name = asked.partition("=")
    (adapter,) = (known for known in implementations(accelerators.load("cuda"), op) if known.name == name)
    if not adapter.why_unavailable():
        pytest.skip(f"{package} is installed")
    with pytest.raises(UnavailableOpError, match=f"--op {asked}: python package {package} is not installed"):
        build_table(accelerators.load("cuda"), {op: name})


@pytest.mark.parametrize(("version", "reason"), [("1.13.0", "it needs transformer-engine 2.0 or later"), ("2.4.0", "")])
def test_the_first_transformer_engine_is_another(
    version: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    described = tmp_path / f"transformer_engine-{version}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert engine_norms.unavailable().startswith(reason) and bool(engine_norms.unavailable()) == bool(reason)


def test_the_engine_refuses_what_it_cannot_compute():
    x, weight = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"not in torch\.float64: use --op rms_norm=torch"):
        engine_norms.rms_norm.function(x, weight, 1e-5)
    with pytest.raises(ValueError, match=r"not in torch\.float64: use --op layer_norm=torch"):
        engine_norms.layer_norm.function(x, weight, None, 1e-5)


def test_flash_refuses_what_it_cannot_compute(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flash_attn", vendor_packages.flash_attn())
    sample = samples("attention", torch.float32, torch.device("cpu"), large=False)[0]
    with pytest.raises(ValueError, match=r"float16 or bfloat16, not torch\.float32: use --bf16 or --fp16"):
        cuda.flash_attention.function(*sample.args, **sample.kwargs)
    wide = replace(sample, args=tuple(torch.zeros(2, 1, 1, 264, dtype=torch.bfloat16) for _ in range(3)))
    with pytest.raises(ValueError, match="head dim 264 is above 256"):
        cuda.flash_attention.function(*wide.args, **wide.kwargs)
