"""The command that starts a run: pure functions from settings to an argument list.

torchrun starts the processes of one node whichever program reaches the nodes, so a trainer only ever reads
RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR/MASTER_PORT. Only DeepSpeed's launcher, which sets the same variables,
starts them itself.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

DEFAULT_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to start, and where."""

    script: tuple[str, ...]
    """The trainer and its flags."""
    processes: int
    """Processes on each node."""
    exports: Mapping[str, str]
    """Variables every process must have besides the environment the launcher runs in."""
    nodes: int = 1
    node_rank: int = 0
    master_addr: str = ""
    """Address of the first node; empty on a single node."""
    master_port: int | None = None
    hosts: tuple[str, ...] = ()
    """Names of the nodes, where a hostfile gave them."""
    hostfile: str = ""
    job_id: str = "megatron"
    """Distinguishes rendezvous of different jobs."""
    max_restarts: int = 0
    """Times that all processes are started again after one of them has failed."""
    timeout: int | None = None
    """Seconds that nodes wait for each other; None = what the launcher likes."""

    @property
    def port(self) -> int:
        """The port of the first node that the processes meet at."""
        return DEFAULT_PORT if self.master_port is None else self.master_port


def torchrun(job: Job) -> list[str]:
    """One torchrun on this node. On several nodes the same command runs on each, with its own node rank."""
    if job.nodes == 1 and job.master_port is None:
        where = ["--standalone"]
    elif job.nodes > 1 and job.max_restarts:  # nodes agree on a restart at a meeting point alone
        where = _rendezvous(job)
    else:
        address = job.master_addr or "127.0.0.1"
        where = ["--nnodes", str(job.nodes), "--node-rank", str(job.node_rank)]
        where += ["--master-addr", address, "--master-port", str(job.port)]
    return _torchrun(job, where)


def deepspeed(job: Job) -> list[str]:
    """DeepSpeed's launcher: reaches the nodes of a hostfile over ssh by itself."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if job.max_restarts:  # its elastic agent fails with today's torch, and DeepSpeed 0.19 has none
        command = [sys.executable, "-m", "megatron.launch.again", str(job.max_restarts), *command]
    if job.hostfile:
        command += ["--hostfile", job.hostfile]
    command += ["--num_nodes", str(job.nodes), "--num_gpus", str(job.processes), "--master_port", str(job.port)]
    if job.master_addr:
        command += ["--master_addr", job.master_addr]
    if job.nodes == 1:
        return [*command, "--no_local_rank", *job.script]
    # The launcher hands on only variables with certain prefixes to other nodes.
    variables = [f"{name}={value}" for name, value in job.exports.items()]
    words = [_through_pdsh(word) for word in (*variables, sys.executable, *job.script)]
    return [*command, "--no_local_rank", "--no_python", "env", *words]


def _through_pdsh(word: str) -> str:
    """A word that arrives at the other nodes as it is.

    DeepSpeed's launcher joins the words to a line for the nodes' shells. It puts those with a space into double quotes,
    with a backslash before each `"`, and leaves all others as they are; pdsh puts the node's name for `%h`, and so on.
    """
    word = word.replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def srun(job: Job) -> list[str]:
    """One torchrun per Slurm node, on all CPUs of the allocation; they find each other at the first node."""
    count = str(job.nodes)
    command = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--cpu-bind=none"]
    # Without the last one a first Ctrl-C is a question about the tasks.
    command += ["--kill-on-bad-exit=1", "--disable-status"]
    if job.hosts:
        command += ["--nodelist", ",".join(job.hosts)]
    return [*command, *_torchrun(job, _rendezvous(job))]


def mpirun(job: Job) -> list[str]:
    """One torchrun per MPI node; they find each other at the first node."""
    command = ["mpirun", "-np", str(job.nodes), "--map-by", "ppr:1:node", "--bind-to", "none"]
    if job.hosts:
        command += ["--host", ",".join(job.hosts)]
    for name in job.exports:
        command += ["-x", name]
    return [*command, *_torchrun(job, _rendezvous(job))]


def _rendezvous(job: Job) -> list[str]:
    if job.nodes == 1:
        return ["--standalone"]
    endpoint = f"{job.master_addr}:{job.port}"
    return ["--nnodes", str(job.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", job.job_id]


def _torchrun(job: Job, where: list[str]) -> list[str]:
    # Without `--`, torchrun takes flags of the trainer for abbreviations of its own.
    program = "megatron.launch.node" if "--rdzv-endpoint" in where else "torch.distributed.run"
    command = [sys.executable, "-m", program, *where, "--nproc-per-node", str(job.processes)]
    if job.max_restarts:
        command += ["--max-restarts", str(job.max_restarts)]
    if job.timeout is not None:
        command += ["--rdzv-conf", f"timeout={job.timeout},join_timeout={job.timeout}"]
    return [*command, "--", *job.script]


BUILDERS: Mapping[str, Callable[[Job], list[str]]] = {
    "torchrun": torchrun,
    "deepspeed": deepspeed,
    "srun": srun,
    "mpirun": mpirun,
}
"""Launcher -> its command; the order is the order of the help text."""
