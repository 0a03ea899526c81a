"""Makes a torch_npu wheel importable on a machine without Huawei's toolkit, for fake tensors only.

The libraries of the toolkit that torch_npu links to are replaced by empty ones whose functions return 0. That is enough
for its operators to be registered and to run on fake tensors: shapes, dtypes and gradients formulas, but no numbers.
"""

from __future__ import annotations

import os
import re
import subprocess
import zipfile
from pathlib import Path

_EMPTY = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
_ANSWERS = r"""
const char* aclrtGetSocName(void) { return "Ascend910B1"; }
const char* aclGetRecentErrMsg(void) { return ""; }
int aclrtGetDeviceCount(unsigned* count) { *count = 1; return 0; }
int aclrtGetDevice(int* device) { *device = 0; return 0; }
int aclrtCreateStream(void** stream) { *stream = (void*)1; return 0; }
int aclrtCreateStreamWithConfig(void** stream, unsigned priority, unsigned flag) { *stream = (void*)1; return 0; }
int aclrtGetCurrentContext(void** context) { *context = (void*)1; return 0; }
int aclrtCreateContext(void** context, int device) { *context = (void*)1; return 0; }
int aclrtGetMemInfo(int kind, unsigned long* free, unsigned long* total) { *free = *total = 64ul << 30; return 0; }
"""
"""The few functions whose answers are looked at while the package loads."""


def install(wheel: Path, folder: Path) -> dict[str, str]:
    """Unpack the wheel and build the empty libraries; the variables under which `import torch_npu` works.

    Args:
        wheel: a torch_npu wheel.
        folder: where to; it becomes about 200 MB.

    Raises:
        subprocess.CalledProcessError: there is no gcc or nm, or it failed.
    """
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    libraries = [*folder.glob("torch_npu/lib/*.so"), *folder.glob("torch_npu/_C*.so")]
    stubs = folder / "stubs"
    stubs.mkdir()
    undefined = {name for library in libraries for name in _undefined(library)}
    looked_up = {name for library in libraries for name in _names(library)}
    toolkit = {
        name for name in undefined | looked_up if re.match(r"(acl|rt|Hccl|Msprof|mspti|hal)[A-Za-z0-9_]*$", name)
    }
    _build(stubs / "libascendcl.so", toolkit - set(re.findall(r"(\w+)\(", _ANSWERS)), _ANSWERS)
    _build(stubs / "libatb.so", {name for name in undefined if re.match(r"_Z\w*3atb", name)})
    for name in _EMPTY:
        _build(stubs / f"lib{name}.so", set())
    paths = {"LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": os.pathsep.join([str(folder), str(Path.cwd())])}
    return {**paths, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def _undefined(library: Path) -> list[str]:
    command = ["nm", "-D", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[-1].partition("@")[0] for line in lines if line.strip()]


def _names(library: Path) -> set[str]:
    """Names of functions that the library looks up while it runs."""
    found = re.findall(rb"(?<![\w.])(?:acl|rt|Hccl|mspti|Msprof|hal)[A-Za-z0-9_]+(?![\w.])", library.read_bytes())
    return {name.decode() for name in found}


def _build(library: Path, functions: set[str], more: str = "") -> None:
    source = library.with_suffix(".c")
    source.write_text(more + "".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(functions)))
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
