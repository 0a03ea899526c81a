"""The launchers with the real Slurm, MPI, pdsh and ssh, on two nodes that are namespaces of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass

import pytest

from tests.cluster.cluster import ADDRESSES, Cluster, missing
from tests.launch.nodes import FLAGS, LAUNCH, SECONDS, SMALL, has_losses_of_one_process, start
from tests.launch.recorded import ROOT
from tests.parity import FLOAT32_TOLERANCE, difference
from tests.sim.launchers import STEPS, TRAINIUM_LLAMA, launch, write_data
from tests.sim.run import need
from tests.sim.runtime import REPORT
from tests.support import free_port

_HOW = "bash tests/cluster/run.sh installs what is needed and runs this"
pytestmark = pytest.mark.slow

LAUNCHERS = ("srun", "mpirun", "deepspeed", "torchrun")
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
ALLOCATION = ("salloc", "--quiet", "--nodes=2", "--exclusive")
HOSTS = "node1 slots=1\nnode2 slots=1  # the second\n"
PROGRAMS = "pretrain_gpt|preflight|torch.distributed.run|deepspeed.launcher|megatron.launch"
ENDLESS = {**SMALL, "TRAIN_ITERS": "1000000"}
SBATCH = """
sbatch --quiet --wait --output="$0" --exclusive --nodes 2 --wrap="srun --ntasks-per-node=1 $*"; code=$?
cat "$0"; exit $code
"""
MPI = ("mpirun", "-np", "2", "--host", "node1,node2", "--bind-to", "none")
ON_OTHER_NODES = (
    *(*TRAINIUM_LLAMA.variables, *TRAINIUM_LLAMA.layouts["one"], "PRECISION", "MASTER_ADDR", "MASTER_PORT"),
    *("MEGATRON_PYTHON", "OMP_NUM_THREADS", "PATH", "PYTHONPATH", REPORT),
)
"""A shell that ssh starts on the other node has nothing of the environment but what mpirun is told to hand on."""
AWKWARD = "a;b $HOME \"x\" 'y' %n \\ `z`"
"""Shells, pdsh and DeepSpeed's launcher each have a meaning for some of it."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    problem = missing() if os.environ.get("TEST_CLUSTER") == "1" else "asked for with TEST_CLUSTER=1"
    if problem:
        pytest.skip(f"no cluster here: {problem}; {_HOW}")
    with Cluster(tmp_path_factory.mktemp("cluster") / "files") as nodes:
        yield nodes


@dataclass(frozen=True)
class Launches:
    """What a user starts: a launch on the first node, or one on each for torchrun."""

    running: list[subprocess.Popen[str]]

    def ends(self) -> tuple[list[int], str]:
        """Exit codes, and all that was said."""
        said = [text for one in self.running for text in one.communicate(timeout=SECONDS)]
        return [one.returncode for one in self.running], "".join(said)

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        for one in self.running:
            os.killpg(one.pid, signal.SIGINT)


def _start(cluster: Cluster, launcher: str, *flags: str, hosts: str = HOSTS, **variables: str) -> Launches:
    listed = cluster.folder / "hosts.txt"
    listed.write_text(hosts)
    shared = {"MASTER_PORT": str(free_port()), **AS_ROOT, **variables, "LAUNCHER": launcher}
    if launcher == "srun":
        return Launches([start(cluster.command("node1", [*ALLOCATION, *LAUNCH, *flags]), **shared, NPROC="1")])
    nodes = ("node1", "node2") if launcher == "torchrun" else ("node1",)
    return Launches([start(cluster.command(node, [*LAUNCH, *flags]), **shared, HOSTFILE=str(listed)) for node in nodes])


def _rows(said: str) -> list[list[str]]:
    """The table of a check, without what DeepSpeed's launcher puts before each line."""
    lines = (line.removeprefix("node1: ").split() for line in said.splitlines())
    return [words for words in lines if len(words) > 7 and words[0] in "01" and words[1].startswith("node")]


def _left(cluster: Cluster) -> list[str]:
    """Processes of a run on both nodes."""
    show = ["bash", "-c", f"pgrep --list-full --full '{PROGRAMS}' | grep --invert-match pgrep || true"]
    return [line for node in ("node1", "node2") for line in cluster.run(node, *show).splitlines()]


def _wait(condition, seconds: float = SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.5)
    return bool(condition())


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_check_finds_both_nodes_well(cluster, launcher, tmp_path):
    codes, said = _start(cluster, launcher, "--check", SAVE=str(tmp_path / "shared")).ends()
    assert set(codes) == {0}, said
    assert "all checks passed" in said
    assert [row[:8] for row in _rows(said)] == [["0", "node1", "0", *["ok"] * 5], ["1", "node2", "1", *["ok"] * 5]]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_check_names_the_node_whose_folder_is_another(cluster, launcher, tmp_path):
    cluster.run("node2", "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path))
    try:
        codes, said = _start(cluster, launcher, "--check", SAVE=str(tmp_path)).ends()
    finally:
        cluster.run("node2", "umount", str(tmp_path))
    assert 0 not in codes
    causes = [line.removeprefix("node1: ") for line in said.splitlines() if "error: node 1 (" in line]
    cause = f"{tmp_path} is not writable (Read-only file system)"
    assert causes == [f"error: node 1 (node2), rank 1: folder: {cause}"], said
    assert not _left(cluster)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_variables_and_flags_arrive_on_every_node(cluster, launcher, tmp_path):
    found = {"NEURON_CC_FLAGS": "--model-type=transformer -O1", "FI_PROVIDER": "efa", "LD_LIBRARY_PATH": "/opt/lib"}
    found |= {"SAME": "value"}
    asked = ("--export", f"AWKWARD={AWKWARD}", "--export", "SAME=value", "--export", f"RECORD_IN={tmp_path}")
    flags = (*FLAGS, *asked, "--tensorboard-dir", AWKWARD, "--data-cache-path", "$(a)*{b}")
    device = {"DEVICE": "neuron", "SCRIPT": "tests/cluster/record.py"}
    codes, said = _start(cluster, launcher, *flags, **SMALL, **found, **device).ends()
    assert set(codes) == {0}, said
    for rank, node in enumerate(("node1", "node2")):
        record = json.loads((tmp_path / f"{rank}.json").read_text())
        assert record["host"] == node and record["folder"] == str(ROOT)
        assert record["processors"] == os.cpu_count()
        assert record["words"][-4:] == ["--tensorboard-dir", AWKWARD, "--data-cache-path", "$(a)*{b}"]
        environment = record["environment"]
        assert {name: environment.get(name) for name in found} == found
        assert environment["AWKWARD"] == AWKWARD
        assert environment["PATH"].startswith(os.environ["PATH"])


@pytest.mark.parametrize(
    ("launcher", "layout"),
    [
        *[("srun", {"TP": "2"}), ("mpirun", {"DP": "2"}), ("torchrun", {"PP": "2"})],
        ("deepspeed", {"ENGINE": "deepspeed", "ZERO_STAGE": "1", "DP": "2"}),
    ],
)
def test_training_on_two_nodes_has_the_losses_of_one_process(cluster, launcher, layout, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    codes, said = _start(cluster, launcher, *FLAGS, "--log-json", str(metrics), **SMALL, **layout).ends()
    assert set(codes) == {0}, said
    assert has_losses_of_one_process(metrics)


@pytest.mark.parametrize("end", ["Ctrl-C", "one rank killed"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_nothing_is_left_of_a_run_that_is_ended(cluster, launcher, end, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    running = _start(cluster, launcher, *FLAGS, "--log-json", str(metrics), **ENDLESS)
    assert _wait(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3), running.ends()
    assert any("pretrain_gpt" in line for line in _left(cluster))
    if end == "Ctrl-C" and launcher == "srun":  # salloc, which would give up the allocation, is not always there
        cluster.run("node1", "pkill", "-INT", "--exact", "srun")
    elif end == "Ctrl-C":
        running.interrupt()
    else:
        cluster.run("node2", "pkill", "-KILL", "--oldest", "--full", "^[^ ]*python[^ ]* (-u )?pretrain_gpt")
    codes, said = running.ends()
    assert 0 not in codes, said
    assert _wait(lambda: not _left(cluster), 60), _left(cluster)


@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed"])
def test_a_node_that_cannot_be_reached_is_named(cluster, launcher):
    codes, said = _start(cluster, launcher, "--check", hosts=HOSTS.replace("node2", "node3")).ends()
    assert codes != [0] and "node3" in said, said
    assert _wait(lambda: not _left(cluster), 60), _left(cluster)


def test_a_list_of_addresses_will_do_where_a_node_calls_itself_127_0_1_1(cluster, tmp_path):
    """As Debian's installer writes it into /etc/hosts."""
    for node, (other, address) in zip(ADDRESSES, reversed(ADDRESSES.items()), strict=True):
        own = tmp_path / node
        own.write_text(f"127.0.0.1 localhost\n127.0.1.1 {node}\n{address} {other}\n")
        cluster.run(node, "mount", "--bind", str(own), "/etc/hosts")
    hosts = "".join(f"{address} slots=1\n" for address in ADDRESSES.values())
    try:
        codes, said = _start(cluster, "mpirun", "--check", hosts=hosts, GLOO_SOCKET_IFNAME="eth0").ends()
    finally:
        for node in ADDRESSES:
            cluster.run(node, "umount", "/etc/hosts")
    assert codes == [0] and "all checks passed" in said, said


@pytest.fixture(scope="module")
def trainium_on_cpu(tmp_path_factory):
    """The records of Trainium's script in one process on the CPU, and the folder of its data."""
    need("neuron")
    folder = tmp_path_factory.mktemp("trainium")
    write_data(folder)
    return folder, launch(TRAINIUM_LLAMA, folder / "one", "one", device=None).records


@pytest.mark.parametrize("starter", ["Slurm", "MPI"])
def test_trainiums_script_is_started_once_per_node(cluster, starter, trainium_on_cpu):
    folder, expected = trainium_on_cpu
    words = (*MPI, *(word for name in ON_OTHER_NODES for word in ("-x", name)))
    if starter == "Slurm":
        words = ("bash", "-c", SBATCH, str(folder / "slurm.log"))
    variables = {**AS_ROOT, "NPROC": "2", **({"MASTER_ADDR": "node1"} if starter == "MPI" else {})}
    before = cluster.command("node1", words)
    run = launch(TRAINIUM_LLAMA, folder / starter, "TP2 PP2", device="neuron", before=before, **variables)
    assert run.output.count("--nnodes 2 ") == 2 and "(simulated)" in run.output
    assert len(run.records) == STEPS and len(run.counts) == 4
    for name in ("lm_loss", "grad_norm"):
        found, wanted = ([record[name] for record in one] for one in (run.records, expected))
        assert difference(found, wanted) <= FLOAT32_TOLERANCE, name
