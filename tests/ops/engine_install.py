"""Makes a Transformer Engine importable without CUDA: a simulated one, or the Python part of a wheel.

In both the compiled part is tests/sim/cuda/transformer_engine_torch.py. Of a wheel the files with the functions that
this project calls are real, and so is all that they import; packages that are not installed are empty.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch

from tests.sim import snapshot

SIMULATION = snapshot.HERE / "cuda"
PYTORCH = "transformer_engine.pytorch"
_WITHOUT_INIT = (
    *("transformer_engine", PYTORCH, f"{PYTORCH}.ops", f"{PYTORCH}.ops.basic"),
    *(f"{PYTORCH}.module", f"{PYTORCH}.cpp_extensions"),
)
"""Packages whose own files load libraries or everything else there is."""
_NO_LIBRARY = {"NVTE_PROJECT_BUILDING": "1"}
"""Under this variable, meant for building it, the package does not look for its libraries."""
_NOT_INSTALLED = ("onnx", "onnxscript", "triton")


@contextlib.contextmanager
def simulated(
    monkeypatch: pytest.MonkeyPatch, folder: Path, version: str, *, capability: tuple[int, int] | None
) -> Iterator[None]:
    """While this lasts, the simulated engine is installed in a version, on a GPU of a capability, or without one."""
    described = folder / f"transformer_engine-{version}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {version}\n")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(folder)
        patched.syspath_prepend(SIMULATION)
        patched.setattr(torch.cuda, "is_available", lambda: capability is not None)
        patched.setattr(torch.cuda, "get_device_capability", lambda: capability)
        try:
            yield
        finally:
            forget()


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not installed, and gives them any attribute."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.partition(".")[0] in _NOT_INSTALLED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Anything(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def load(wheel: Path, folder: Path, compiled: types.ModuleType) -> dict[str, types.ModuleType]:
    """The modules of the engine, to be put into `sys.modules`; the one called `PYTORCH` has what this project calls.

    Args:
        wheel: of Transformer Engine from 2.14 on.
        folder: the wheel is unpacked there, a few MB.
        compiled: has the functions of the compiled part.
    """
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    library = _Anything("transformer_engine_torch")
    library.__dict__.update({name: value for name, value in vars(compiled).items() if not name.startswith("__")})
    sys.modules["transformer_engine_torch"] = library
    for name in _WITHOUT_INIT:
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, package)
    finder = _Empty()
    sys.meta_path.append(finder)
    try:
        with patch.dict(os.environ, _NO_LIBRARY):
            _real(sys.modules[PYTORCH])
    finally:
        sys.meta_path.remove(finder)
        loaded = forget()
    return loaded


def forget() -> dict[str, types.ModuleType]:
    """Take the engine's modules, real or simulated, out of `sys.modules`; returns them."""
    ours = ("transformer_engine", "transformer_engine_torch", *_NOT_INSTALLED)
    names = [name for name in sys.modules if name.partition(".")[0] in ours]
    return {name: sys.modules.pop(name) for name in names}


def _real(pytorch: Any) -> None:
    tensors = importlib.import_module(f"{PYTORCH}.tensor")
    saving = importlib.import_module(f"{PYTORCH}.quantized_tensor")
    gemm = importlib.import_module(f"{PYTORCH}.cpp_extensions.gemm")
    gemm.get_cublas_workspace = lambda device, ub, grouped_gemm: torch.empty(0, dtype=torch.uint8)
    pytorch.cpp_extensions.general_gemm, pytorch.cpp_extensions.get_cublas_workspace = gemm.general_gemm, None
    pytorch.ops.BasicLinear = importlib.import_module(f"{PYTORCH}.ops.basic.basic_linear").BasicLinear
    pytorch.Float8Quantizer, pytorch.Float8TensorStorage = tensors.Float8Quantizer, tensors.Float8TensorStorage
    pytorch.prepare_for_saving, pytorch.restore_from_saved = saving.prepare_for_saving, saving.restore_from_saved
