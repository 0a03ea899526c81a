"""Reads out of the vendors' public releases what the simulations are checked against, and writes it down as JSON.

    python -m tests.sim.snapshot npu torch_npu-2.13.0-*.whl
    python -m tests.sim.snapshot hpu path/to/a/clone/of/gaudi-pytorch-bridge
    python -m tests.sim.snapshot cuda transformer_engine-2.20.2-py3-none-any.whl

Two things are kept: the schemas of the vendor operators that this project calls, as the vendor's library registers
them, and the names of torch's operators that have a kernel on the device. Any other operator runs on the host there.
Of Transformer Engine, which registers none, the signatures of Python functions are.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NPU_OPERATORS = (
    *("npu_fusion_attention", "npu_fusion_attention_grad", "npu_fusion_attention_v2", "npu_fusion_attention_grad_v2"),
    *("npu_rms_norm", "npu_rms_norm_backward", "npu_rotary_mul", "npu_rotary_mul_backward"),
    *("npu_swiglu", "npu_swiglu_backward", "npu_scaled_masked_softmax", "npu_scaled_masked_softmax_backward"),
    "npu_mm_all_reduce_base",
)
HPU_OPERATORS = (
    *("sdpa_fwd", "sdpa_bwd", "sdpa_recomp_fwd", "sdpa_recomp_bwd", "rms_norm", "rms_norm_backward"),
    *("rotary_pos_embedding", "rotary_pos_embedding_backward", "optimizer_adamw", "fused_clip_norm"),
    *("cast_to_fp8_v2", "fp8_gemm_v2"),
)
ENGINE_FUNCTIONS = {
    "ops.BasicLinear._functional_forward": "ops/basic/basic_linear.py",
    "ops.BasicLinear._functional_backward": "ops/basic/basic_linear.py",
    "Float8Quantizer.__init__": "tensor/float8_tensor.py",
    "prepare_for_saving": "quantized_tensor.py",
    "restore_from_saved": "quantized_tensor.py",
}
"""What `transformer_engine.pytorch` calls them, and the files that they are in."""


def base_names(operators: Iterable[str]) -> list[str]:
    """Names without overload and without the underscore of the in-place form, sorted: `add_.Tensor` -> `add`."""
    names = {operator.partition(".")[0].partition("(")[0].strip() for operator in operators}
    return sorted({name if name.endswith("__") else name.removesuffix("_") for name in names})


def read(device: str) -> dict[str, Any]:
    """The committed snapshot of a device."""
    snapshot: dict[str, Any] = json.loads((HERE / device / "operators.json").read_text())
    return snapshot


def npu(wheel: Path) -> dict[str, Any]:
    """From a torch_npu wheel: schema strings in its library, and its list of supported operators."""
    with zipfile.ZipFile(wheel) as archive:
        binary = archive.read("torch_npu/lib/libtorch_npu.so")
        lists = [
            archive.read(f"torch_npu/csrc/aten/{name}").decode()
            for name in ("npu_native_functions.yaml", "npu_native_functions_by_codegen.yaml")
        ]
    strings = set(re.findall(rb"[\x20-\x7e]{8,}", binary))
    schemas = {}
    for name in NPU_OPERATORS:
        pattern = re.compile(rf"{name}\(.*\) -> .*".encode())
        (found,) = [text.decode() for text in strings if pattern.fullmatch(text)]
        schemas[name] = found
    return {
        "package": "torch_npu",
        "source": wheel.name,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "schemas": schemas,
        "native": base_names(operator for text in lists for operator in _supported(text)),
    }


def _supported(yaml_text: str) -> list[str]:
    """Entries of the `supported` section (and of `symint`, whose operators it implements, too)."""
    section, found = "", []
    for line in yaml_text.splitlines():
        entry = re.match(r"\s*(?:- )?(?:func: )?([\w.]+)\s*(?:\(|$)", line)
        if re.match(r"\w+:", line):
            section = line.partition(":")[0]
        elif section in ("supported", "symint") and entry:
            found.append(entry[1])
    return found


def hpu(clone: Path) -> dict[str, Any]:
    """From the sources of habana_frameworks: its table of operators and what it registers by hand."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=clone, capture_output=True, text=True, check=True).stdout

    table = git("show", "HEAD:scripts/hpu_op.yaml")
    sources = git("grep", "-h", "-E", r"m\.impl\(|m\.def\(|^ *\"hpu::", "HEAD", "--", "*.cpp")
    known = re.findall(r'"hpu::(\w+\(.*?\) -> [^"]*)"', sources) + re.findall(r'_schema: "hpu::([^"]*)"', table)
    schemas = {}
    for name in HPU_OPERATORS:
        # Two are registered under Python's different names for the modes: the eager one comes with a tensor decay.
        candidates = sorted({schema for schema in known if schema.startswith(f"{name}(")}, key=len)
        schemas[name] = candidates[-1]
    eager_and_lazy = [schema for schema in known if schema.startswith("optimizer_adamw(")]
    schemas["optimizer_adamw.lazy"] = min(eager_and_lazy, key=len)
    manual = re.findall(r'm\.impl\(\s*"(?:aten::)?([\w.]+)"', sources)
    return {
        "package": "habana_frameworks",
        "source": "github.com/HabanaAI/gaudi-pytorch-bridge " + git("log", "-1", "--format=%H %s").strip(),
        "schemas": schemas,
        "native": base_names([*re.findall(r"^([\w.]+):$", table, flags=re.MULTILINE), *manual]),
    }


def cuda(wheel: Path) -> dict[str, Any]:
    """From a wheel of transformer_engine: parameters of its functions, with their defaults."""
    schemas = {}
    with zipfile.ZipFile(wheel) as archive:
        for name, file in ENGINE_FUNCTIONS.items():
            module = ast.parse(archive.read(f"transformer_engine/pytorch/{file}"))
            schemas[name] = _parameters(module, name.removeprefix("ops.").split("."))
    return {
        "package": "transformer_engine",
        "source": wheel.name,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "schemas": schemas,
    }


def _parameters(where: ast.Module | ast.ClassDef, path: list[str]) -> str:
    """As `inspect.signature` prints them, without types."""
    kinds = ast.ClassDef if len(path) > 1 else ast.FunctionDef
    (found,) = [node for node in where.body if isinstance(node, kinds) and node.name == path[0]]
    if isinstance(found, ast.ClassDef):
        return _parameters(found, path[1:])
    arguments = found.args
    for argument in (*arguments.args, *arguments.kwonlyargs, arguments.vararg):
        if argument is not None:
            argument.annotation = None
    return f"({ast.unparse(arguments)})"


if __name__ == "__main__":
    device, path = sys.argv[1], Path(sys.argv[2])
    content = {"npu": npu, "hpu": hpu, "cuda": cuda}[device](path)
    (HERE / device / "operators.json").write_text(json.dumps(content, indent=1) + "\n")
