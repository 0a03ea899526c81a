"""Our calls of torch_npu against the real package, which needs no chip to check schemas and to infer shapes.

Opt-in, as it needs the wheel: TORCH_NPU_WHEEL=torch_npu-2.13.0-....whl python -m pytest tests/ops/test_npu_contract.py
Every kernel runs on meta tensors through the package's schema strings and shape inference alone. A model runs forward
and backward on fake `npu` tensors through the whole package, over empty libraries in place of Huawei's toolkit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import npu_wheel
from tests.sim import snapshot
from tests.sim.build import ROOT
from tests.support import run_ranks

WHEEL = os.environ.get("TORCH_NPU_WHEEL", "")
needs_wheel = pytest.mark.skipif(not WHEEL, reason="TORCH_NPU_WHEEL does not name a torch_npu wheel")


def _real_package(wheel: Path) -> types.ModuleType:
    """A module torch_npu whose functions are the real operators, with real schemas and real shape inference."""
    with zipfile.ZipFile(wheel) as archive:
        binary = archive.read("torch_npu/lib/libtorch_npu.so")
        inference = archive.read("torch_npu/op_plugin/meta/_meta_registrations.py").decode()
    library = torch.library.Library("npu", "DEF")
    strings = {text.decode() for text in re.findall(rb"[\x20-\x7e]{8,}", binary)}
    for text in sorted(strings):
        if re.match(r"\w+(\.\w+)?\(.*\) -> .", text) and not re.search(r"__torch__|\bstd::|::", text):
            try:
                torch._C.parse_schema(f"npu::{text}")
                library.define(text)
            except RuntimeError:
                continue  # of another namespace, or twice
    package = types.ModuleType("torch_npu")
    error = types.SimpleNamespace(VALUE=0, TYPE=0, PARAM=0, NOT_SUPPORT=0)
    stubs: dict[str, dict[str, Any]] = {
        "torch_npu.utils": {},
        "torch_npu.utils._error_code": {"ErrCode": error, "ops_error": lambda code: ""},
        "torch_npu.npu": {},
        "torch_npu.npu.utils": {"get_cann_version": lambda module: "8.5.0"},
        "torch_npu.npu._backends": {"get_soc_version": lambda: 220},
    }
    sys.modules["torch_npu"] = package
    for name, content in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(content)
    scope = {"__name__": "torch_npu.op_plugin.meta._meta_registrations", "_kept": library}
    exec(compile(inference, "_meta_registrations.py", "exec"), scope)
    package.__dict__.update({name: getattr(torch.ops.npu, name) for name in snapshot.NPU_OPERATORS}, _scope=scope)
    return package


def _shapes(wheel: str) -> list[tuple[str, str, str, Any, Any]]:
    """(operation, implementation, sample, our result, the definition's result) on meta tensors, as (shape, dtype)."""
    from megatron import accelerators
    from megatron.ops import OPERATIONS, implementations, reference
    from megatron.ops.samples import samples

    _real_package(Path(wheel))
    meta, found = torch.device("meta"), []
    for op in OPERATIONS:
        known = implementations(accelerators.load("npu"), op)
        for candidate in (one for one in known if one.function.__module__ == "megatron.ops.npu"):
            for sample in samples(op, torch.bfloat16, torch.device("cpu"), large=False):
                arguments = [value.to(meta) if isinstance(value, Tensor) else value for value in sample.args]
                rules = {name: v.to(meta) if isinstance(v, Tensor) else v for name, v in sample.kwargs.items()}
                mine = candidate.function(*arguments, **rules)
                true = getattr(reference, op)(*arguments, **rules)
                results = [(tuple(result.shape), str(result.dtype)) for result in (mine, true)]
                found.append((op, candidate.name, sample.label, *results))
    return found


@needs_wheel
def test_our_calls_fit_the_real_schemas_and_shapes():
    (found,) = run_ranks(1, _shapes, WHEEL, init=False)
    assert {name for _, name, *_ in found} >= {"fusion_attention", "masked_softmax", "fused"}
    assert [row for row in found if row[3] != row[4]] == []


def _sum_within_the_product(wheel: str) -> tuple[tuple[int, ...], str]:
    from megatron.ops.npu import matmul_all_reduce

    _real_package(Path(wheel))
    backend = types.SimpleNamespace(get_hccl_comm_name=lambda rank: f"communicator of rank {rank}")
    group = types.SimpleNamespace(size=lambda: 2, _get_backend=lambda device: backend)
    x, weight = (torch.ones(shape, device="meta", dtype=torch.bfloat16) for shape in ((4, 2, 8), (6, 8)))
    result = matmul_all_reduce.function(x, weight, group)
    return tuple(result.shape), str(result.dtype)


@needs_wheel
def test_the_product_of_several_ranks_fits_the_real_schema_and_shape():
    (found,) = run_ranks(1, _sum_within_the_product, WHEEL)
    assert found == ((4, 2, 6), "torch.bfloat16")


def _refused(wheel: str) -> list[str]:
    package = _real_package(Path(wheel))
    x = torch.ones(4, 2, 8, device="meta")
    with pytest.raises(RuntimeError) as refusal:
        package.npu_rms_norm(x, x[0, 0], eps=1e-5)
    accepted = package.npu_rms_norm(x, x[0, 0, :3], epsilon=1e-5)  # why every call stands behind checks of our own
    return [str(refusal.value).splitlines()[0], str(tuple(accepted[0].shape))]


@needs_wheel
def test_the_real_package_checks_names_but_not_shapes():
    ((message, shape),) = run_ranks(1, _refused, WHEEL, init=False)
    assert "Unknown keyword argument 'eps'" in message
    assert shape == "(4, 2, 8)"


@needs_wheel
def test_the_committed_snapshot_is_that_of_the_wheel():
    assert snapshot.npu(Path(WHEEL)) == snapshot.read("npu")


_MODEL = """
import json, warnings
from collections import Counter
from dataclasses import replace

warnings.simplefilter("ignore")
import torch, torch_npu
import torch_npu.op_plugin.meta._meta_registrations as inference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron import accelerators
from megatron.model.gpt import GPT, ModelInputs
from megatron.mpu.groups import single_process
from megatron.ops import build_table
from tests.model.helpers import FAMILIES

inference._npu_fusion_attention_warning_printed = True  # it would ask the chip for its name

class Audit(TorchDispatchMode):
    calls = Counter()
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[str(operator)] += 1
        return operator(*args, **(kwargs or {}))

device = torch.device("npu:0")
accelerator = accelerators.select("npu")
ops, _ = build_table(accelerator, {})
sizes = {"hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "ffn_hidden_size": 11008}
arch = replace(FAMILIES["llama"], **sizes)
with FakeTensorMode(allow_non_fake_inputs=True):
    model = GPT(arch, ops=ops, groups=single_process(), device=device, dtype=torch.bfloat16).train()
    tokens = torch.zeros(2, 2048, dtype=torch.int64, device=device)
    optimizer = ops.adamw([{"params": list(model.parameters())}], lr=1e-3)
    with Audit() as audit:
        losses = ops.cross_entropy(model(tokens, ModelInputs()), tokens.t().contiguous())
        losses.mean().backward()
    optimizer.step()
    gradients = all(p.grad.shape == p.shape and p.grad.device == device for p in model.parameters())
calls = {name.split(".")[1]: n for name, n in audit.calls.items() if name.startswith("npu.")}
print(json.dumps({"losses": list(losses.shape), "gradients": gradients, "calls": calls}))
"""


@needs_wheel
@pytest.mark.skipif(shutil.which("gcc") is None, reason="empty libraries are built with gcc, which was not found")
def test_a_llama_runs_forward_and_backward_through_the_real_package(tmp_path):
    from tests.sim.test_llama import FUSED

    variables = npu_wheel.install(Path(WHEEL), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _MODEL],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"losses": [2048, 2], "gradients": True, "calls": FUSED["npu"]}
