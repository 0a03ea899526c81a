"""Every patch applies to the tree as it is, is small and says what it is for; applied, the runs are those of the CPU.

The runs happen in a clone, on simulated devices, through simulations of the vendors' migration toolkits.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.parity import FLOAT32_TOLERANCE
from tests.sim.build import ROOT
from tests.sim.launchers import ASCEND_ZERO, GAUDI_BLOOM, STEPS, TRAINIUM_LLAMA, Run, launch, write_data
from tests.sim.run import environment, need

FOLDER = ROOT / "patches"
PATCHES = sorted(path.name for path in FOLDER.glob("*.diff"))
MAX_CHANGED_LINES = 60
_HEADER = ("Why: ", "For: ", "Check: ", "Gone when: ")


def _git(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", PATCHES)
def test_patch_applies_to_the_tree_as_it_is(name):
    done = _git("apply", "--check", f"patches/{name}")
    if done.returncode:
        pytest.fail(
            f"the code that patches/{name} changes has changed: refresh the patch as patches/README.md says.\n"
            f"{done.stderr}",
            pytrace=False,
        )


@pytest.mark.parametrize("name", PATCHES)
def test_patch_is_small_and_says_what_it_is_for(name):
    header, _, changes = (FOLDER / name).read_text().partition("diff --git ")
    assert header.strip() and all(f"\n{word}" in header for word in _HEADER)
    assert "new file mode" not in changes and "deleted file mode" not in changes
    changed = [line for line in changes.splitlines() if re.match(r"[+-](?![+-]{2} )", line)]
    assert 0 < len(changed) <= MAX_CHANGED_LINES


def test_the_table_lists_every_patch():
    rows = re.findall(r"^\| `(\S+\.diff)` ", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(rows) == PATCHES


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a user has after `git clone`: the last commit, and nothing compiled."""
    assert _git("clone", "--quiet", "--shared", str(ROOT), str(tmp_path / "clone")).returncode == 0
    # Compiled files are no part of a clone; `pip install -e .` makes this one.
    for library in (ROOT / "megatron" / "data").glob("_index_builder*"):
        shutil.copyfile(library, tmp_path / "clone" / "megatron" / "data" / library.name)
    return tmp_path / "clone"


def _apply(clone: Path, name: str, *flags: str) -> None:
    done = _git("apply", *flags, f"patches/{name}", cwd=clone)
    assert done.returncode == 0, done.stderr


def _compare(reference: Run, candidate: Run) -> str:
    """What tools/compare_loss.py says; fails where it does."""
    command = [sys.executable, "tools/compare_loss.py", str(reference.metrics), str(candidate.metrics)]
    command += ["--threshold", str(FLOAT32_TOLERANCE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(candidate.records) == len(reference.records) == STEPS
    return done.stdout


_VIEWS = {"view", "_unsafe_view", "as_strided", "expand", "permute", "t", "transpose", "unsqueeze", "slice", "select"}
"""Operators that launch nothing: they look at the same memory in another way."""


def _kernels(run: Run) -> Counter[str]:
    """Kernels that all ranks launched, by operator."""
    found: Counter[str] = Counter()
    for counts in run.counts:
        names = {name: name.partition("::")[2].partition(".")[0] for name in counts.kernels}
        found.update({names[name]: count for name, count in counts.kernels.items() if names[name] not in _VIEWS})
    return found


@pytest.mark.slow
def test_bloom_through_gaudis_migration_toolkit(clone, tmp_path):
    need("hpu")
    cpu = launch(GAUDI_BLOOM, tmp_path / "cpu", "one", device=None, root=clone)
    toolkit = {"DEVICE": "cuda", "GPU_MIGRATION_LOG_LEVEL": "3", "HABANA_LOGS": str(tmp_path / "logs")}
    _apply(clone, "gpu_migration.diff")
    plain = launch(GAUDI_BLOOM, tmp_path / "plain", "TP2 PP2", device="hpu", root=clone, **toolkit)
    assert "device: cuda, " in plain.output and "GAUDI2 (simulated)" in plain.output
    print(_compare(cpu, plain))
    _check_logs(tmp_path / "logs" / "gpu_migration_logs", clone)
    assert all("sdpa_fwd" in counts.vendor() or "sdpa_recomp_fwd" in counts.vendor() for counts in plain.counts)

    _apply(clone, "gpu_migration_performance.diff")
    quick = launch(GAUDI_BLOOM, tmp_path / "quick", "TP2 PP2", device="hpu", root=clone, **toolkit)
    _compare(cpu, quick)
    before, after = _kernels(plain), _kernels(quick)
    changed = {name: after[name] - before[name] for name in before | after if after[name] != before[name]}
    print(f"kernels launched: {before.total()} without the performance patch, {after.total()} with it: {changed}")
    assert after.total() < before.total() and changed["add"] == -changed["addmm"] == changed["mm"]

    _apply(clone, "gpu_migration_performance.diff", "-R")
    _apply(clone, "gpu_migration.diff", "-R")
    assert _git("status", "--porcelain", cwd=clone).stdout == ""


def _check_logs(folder: Path, clone: Path) -> None:
    """One log for every rank, in entries of three lines, and the summary beside it."""
    entry = re.compile(
        r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] (/\S+):(\d+)\n    \[context\]: (.*)\n"
        r"    \[(hpu_match|hpu_modified|hpu_mismatch)\]: (.+) --> (.+)\n\n"
    )
    logs = [log for log in folder.glob("*.log") if "init_process_group('nccl')" in log.read_text()]
    assert len(logs) == 4, "the ranks, besides the launcher"
    for log in logs:
        text = log.read_text()
        entries = entry.findall(text)
        assert entry.sub("", text) == "" and len(set(entries)) == len(entries)
        own = [where for where in entries if where[0].startswith(str(clone))]
        assert any("torch.cuda.set_device" in new for *_, new in own) or any("torch.cuda" in e[4] for e in own)
        summary = json.loads(log.with_suffix(".json").read_text())
        assert sum(summary["places"].values()) == len(entries)
        assert summary["places"].get("mismatch", 0) == 0, "nothing the toolkit has only a stub for is called"
        assert "torch.cuda.set_device" in summary["called"] and "torch.cuda.empty_cache" in summary["never_called"]


@pytest.mark.slow
def test_llama_with_deepspeed_through_ascends_transfer_to_npu(clone, tmp_path):
    need("npu")
    write_data(tmp_path)
    cpu = launch(ASCEND_ZERO, tmp_path / "cpu", "one", device=None, root=clone)
    _apply(clone, "npu_migration.diff")
    run = launch(ASCEND_ZERO, tmp_path / "npu", "DP2 ZeRO", device="npu", root=clone, DEVICE="cuda")
    assert "device: cuda, " in run.output and "Ascend910B1 (simulated)" in run.output
    print(_compare(cpu, run))
    assert all(counts.kernels for counts in run.counts) and len(run.counts) == 2
    _apply(clone, "npu_migration.diff", "-R")
    assert _git("status", "--porcelain", cwd=clone).stdout == ""


@pytest.mark.slow
def test_llama_through_pytorch_xla(clone, tmp_path):
    need("neuron")
    write_data(tmp_path)
    cpu = launch(TRAINIUM_LLAMA, tmp_path / "cpu", "one", device=None, root=clone)
    _apply(clone, "neuron_xla.diff")
    xla = {"PJRT_DEVICE": "NEURON", "PYTHONPATH": f"{ROOT}/tests/sim/xla:{environment('neuron')['PYTHONPATH']}"}
    run = launch(TRAINIUM_LLAMA, tmp_path / "xla", "one", device="neuron", root=clone, DEVICE="cuda", **xla)
    assert "device: cuda, " in run.output and "trn1 through PyTorch/XLA; " in run.output
    print(_compare(cpu, run))
    for counts in run.counts:
        assert counts.kernels and counts.events["sync"] >= STEPS
    _apply(clone, "neuron_xla.diff", "-R")
    assert _git("status", "--porcelain", cwd=clone).stdout == ""
