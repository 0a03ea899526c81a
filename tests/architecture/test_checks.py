"""Every check finds what it is for, and lets its neighbour pass."""

from __future__ import annotations

import pytest

from tests.architecture import checks
from tests.architecture.checks import Source

CASES = [
    (checks.import_direction, "megatron/mpu/a.py", "import megatron.training.loop", "import megatron.config.run"),
    (checks.import_direction, "megatron/mpu/a.py", "from megatron import model", "from megatron import ops"),
    (checks.import_direction, "megatron/ops/a.py", "from ..data import batch", "from ..config import run"),
    (checks.import_direction, "megatron/config/a.py", "import torch", "import json"),
    (checks.import_direction, "megatron/data/a.py", "import tools.plot_loss", "import megatron.tokenizer"),
    (checks.unknown_packages, "megatron/misc/a.py", "", None),
    (checks.device_names, "megatron/model/a.py", "x.to('cuda')", "x.to(device)"),
    (checks.device_names, "megatron/model/a.py", "torch.device('npu:0')", "torch.device('cpu')"),
    (checks.device_names, "megatron/model/a.py", "torch.cuda.synchronize()", "accelerator.synchronize()"),
    (checks.device_names, "megatron/model/a.py", "device.type == 'cpu'", "offload_device == 'cpu'"),
    (checks.device_names, "megatron/model/a.py", "x.is_cuda", "x.is_leaf"),
    (checks.device_names, "megatron/model/a.py", "backend = 'neuron'", "backend: Literal['nccl', 'neuron']"),
    (checks.mutable_state, "megatron/a.py", "def f():\n    global x\n    x = 1", "def f():\n    x = 1"),
    (checks.mutable_state, "megatron/a.py", "cache = {}", "SIZES = {}"),
    (checks.mutable_state, "megatron/a.py", "SEEN = set()\ndef f(): SEEN.add(1)", "def f(): seen = set()"),
    (checks.mutable_state, "megatron/a.py", "T = {}\ndef f(): T['a'] = 1", "T = {'a': 1}\ndef f(): return T['a']"),
    (checks.mutable_state, "megatron/a.py", "T = [1]\nT += [2]", "T = (1,)\nT += (2,)"),
    (checks.mutable_state, "megatron/a.py", "class A:\n    seen: list[int] = []", "class A:\n    seen: int = 1"),
    (checks.vendor_imports, "megatron/a.py", "import deepspeed", "def f():\n    import deepspeed"),
    (checks.vendor_imports, "megatron/a.py", "try:\n    from apex import x\nexcept E:\n    y = 1", "import torch"),
    (checks.vendor_imports, "megatron/a.py", "class A:\n    import triton.language", "import megatron.triton"),
    (checks.sizes, "megatron/a.py", "x = 1\n" * 601, "x = 1\n" * 600),
    (checks.sizes, "megatron/a.py", "def f():\n" + "    x = 1\n" * 80, "def f():\n" + "    x = 1\n" * 79),
    (checks.silent_skips, "tests/a.py", "pytest.skip()", "pytest.skip('no GPU')"),
    (checks.silent_skips, "tests/a.py", "@pytest.mark.skip\ndef f(): ...", "@pytest.mark.gpu\ndef f(): ..."),
    (checks.silent_skips, "tests/a.py", "pytest.mark.skipif(True)", "pytest.mark.skipif(True, reason='no GPU')"),
    (checks.unordered_cases, "tests/a.py", "m.parametrize('a', D.keys() - {1})", "m.parametrize('a', D.keys())"),
    (checks.unordered_cases, "tests/a.py", "m.parametrize('a', set(D))", "m.parametrize('a', sorted(set(D)))"),
    (checks.private_paths, "docs/a.md", "see /" + "work/main", "see /home/work/main"),
    (checks.private_paths, "docs/a.md", "pip install --extra-" + "index-url x", "pip install x"),
]


@pytest.mark.parametrize(("check", "path", "bad", "good"), CASES)
def test_check_finds_the_bad_sample_and_passes_the_good_one(check, path, bad, good):
    assert check(Source(path, bad))
    if good is not None:
        assert check(Source(path, good)) == []


def test_every_file_check_has_a_sample():
    assert set(checks.FILE_CHECKS) <= {case[0] for case in CASES}


def test_unread_setting_is_found():
    fields = ("used: int = option(1)", "by_key: int = option(1)", "forgotten: int = option(2)", "constant: int = 1")
    section = Source("megatron/config/a.py", "class A:\n" + "".join(f"    {field}\n" for field in fields))
    reader = Source("megatron/training/b.py", "x = a.used\na.forgotten = 3\ny = settings['by_key']")
    assert checks.unread_settings([section, reader]) == ["megatron/config/a.py:4 A.forgotten is never read"]


def test_device_code_may_name_devices():
    assert checks.device_names(Source("megatron/accelerators/cuda.py", "torch.cuda.synchronize()")) == []
