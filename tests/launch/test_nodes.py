"""Two "nodes" on addresses of this machine: the check of the nodes, and a training run, started by hand on each."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron.launch.hostfile import is_own_address, parse_hostfile, rank_of_this_node
from tests.launch.nodes import FLAGS, LAUNCH, SECONDS, SMALL, environment, has_losses_of_one_process, start
from tests.launch.recorded import ROOT
from tests.support import free_port

HOSTS = "127.0.0.2 slots=1  # the first\n\n# a comment\n127.0.0.3 slots=1\n"


def _both(tmp_path, *flags, differ=({}, {}), **variables):
    """Exit code, output and error output of each node."""
    (tmp_path / "hosts").write_text(HOSTS)
    shared = {"HOSTFILE": str(tmp_path / "hosts"), "MASTER_PORT": str(free_port()), **variables}
    nodes = [start([*LAUNCH, *flags], **shared, **own, NODE_RANK=str(rank)) for rank, own in enumerate(differ)]
    outputs = [node.communicate(timeout=SECONDS) for node in nodes]
    return [(node.returncode, *texts) for node, texts in zip(nodes, outputs, strict=True)]


def test_this_machine_is_found_by_its_address():
    assert is_own_address("127.0.0.2") and is_own_address("localhost")
    assert not is_own_address("192.0.2.1") and not is_own_address("no-such-host.invalid")
    hosts = parse_hostfile("192.0.2.1\n127.0.0.3\n")
    assert rank_of_this_node(hosts, ("me",), is_own_address) == 1
    with pytest.raises(ValueError, match=r"127\.0\.0\.2, 127\.0\.0\.3 of the hostfile: pass --node-rank"):
        rank_of_this_node(parse_hostfile(HOSTS), ("me",), is_own_address)


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(tmp_path):
    runs = _both(tmp_path, *FLAGS, "--log-json", str(tmp_path / "two.jsonl"), **SMALL)
    assert [run[0] for run in runs] == [0, 0], runs
    assert "--nnodes 2 --node-rank 1 --master-addr 127.0.0.2" in runs[1][1]
    assert has_losses_of_one_process(tmp_path / "two.jsonl")


@pytest.mark.slow
def test_check_of_the_nodes_passes_and_prints_a_table(tmp_path):
    folder = tmp_path / "shared"
    runs = _both(tmp_path, "--check", SAVE=str(folder))
    assert [run[0] for run in runs] == [0, 0], runs
    (first, second) = (line.split() for line in runs[0][1].splitlines() if line[:2] in ("0 ", "1 "))
    assert first[2:8] == ["0", *["ok"] * 5] and second[2:8] == ["1", *["ok"] * 5]
    assert "all checks passed" in runs[0][1] and list(folder.iterdir()) == []


@pytest.mark.slow
def test_check_of_the_nodes_names_the_cause_and_fails_everywhere(tmp_path):
    (tmp_path / "file").write_text("")
    differ = ({"SAVE": str(tmp_path / "one")}, {"SAVE": str(tmp_path / "other"), "DEVICE": "hpu"})
    runs = _both(tmp_path, "--check", "--tensorboard-dir", str(tmp_path / "file"), differ=differ)
    assert all(code for code, *_ in runs)
    said = runs[0][1]
    assert "error: node 1 " in said and "other is not the folder of that name on the first node" in said
    assert "device: --device hpu: python package habana_frameworks is not installed" in said
    assert "error: node 0 " in said and f"{tmp_path / 'file'} is not writable" in said


@pytest.mark.slow
def test_check_names_the_node_that_does_not_come(tmp_path):
    where = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "tools/preflight.py", "--device", "cpu", "--timeout", "3"],
        cwd=ROOT,
        env=environment(**where, MASTER_ADDR="127.0.0.2", MASTER_PORT=str(free_port())),
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 1
    assert "node(s) 1 did not come to 127.0.0.2" in done.stderr
