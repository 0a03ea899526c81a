"""A cluster of two "nodes" on this machine, with the real Slurm, MPI and ssh: for tests of the launchers.

A node has a network, a host name, processes and file systems of its own (namespaces of Linux, which need root), and the
CPUs and folders of this machine. One virtual cable between the two is all of the network; this machine's own is not
touched. Files of the cluster lie in one temporary folder, which the nodes see in place of /etc/slurm and /etc/ssh. A
node ends, with all that runs on it, when its first process does, and this reads from a pipe that closes with the
program that started it.

    python -m tests.cluster.cluster COMMAND...     # runs it on node1 and takes the cluster down; bash unless given
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ADDRESSES: Mapping[str, str] = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
"""Name -> address. The first is where commands are started and Slurm's controller runs."""
PROGRAMS = ("unshare", "nsenter", "ip", "munged", "slurmctld", "slurmd", "srun", "mpirun", "pdsh", "sshd", "ssh-keygen")
_SLURM = """\
ClusterName=pair
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
StateSaveLocation={folder}/state
SlurmctldPidFile=/run/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile=/run/slurmd.pid
SlurmdLogFile={folder}/slurmd-%n.log
KillWait=5
NodeName=node[1-2] CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES State=UP
"""
_SSHD = """\
HostKey {folder}/ssh/host_key
AuthorizedKeysFile {folder}/ssh/user_key.pub
StrictModes no
UsePAM no
PidFile /run/sshd.pid
"""
_SSH = """\
Host *
  IdentityFile {folder}/ssh/user_key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
_SPACES = ("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc")
_SECONDS = 60
REPOSITORY = Path(__file__).resolve().parents[2]


class ClusterError(RuntimeError):
    """The cluster does not come up; with what the program that failed has said."""


def missing() -> str:
    """Why no cluster can be made here; empty where one can."""
    if os.geteuid() != 0:
        return "needs root, which makes namespaces"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    tried = subprocess.run(["unshare", *_SPACES, "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


def _search_path() -> str:
    """Daemons are not on everybody's path."""
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class Cluster:
    """Use as a context: the nodes are up inside of it.

    Attributes:
        folder: for the cluster's files; seen by both nodes, as is every folder of this machine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        """Raises ClusterError."""
        self._write_files()
        try:
            for name in ADDRESSES:
                self._nodes[name] = self._start_node(name)
            self._connect()
            for name in ADDRESSES:
                self._start_daemons(name)
            self._await_slurm()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *problem: object) -> None:
        for node in self._nodes.values():
            assert node.stdin is not None
            node.stdin.close()
            node.wait(_SECONDS)
        self._nodes.clear()

    def command(self, node: str, words: Sequence[str]) -> list[str]:
        """What to run on this machine to have `words` run on `node`, in the repository."""
        home = f"/proc/{self._nodes[node].pid}/ns"
        spaces = [f"--{kind}={home}/{kind}" for kind in ("net", "uts", "ipc")]
        return [
            *("nsenter", *spaces, f"--mount={home}/mnt", f"--pid={home}/pid_for_children", f"--wd={REPOSITORY}"),
            *words,
        ]

    def run(self, node: str, *words: str) -> str:
        """The output of a command on `node`. Raises ClusterError if it fails."""
        return _output(self.command(node, words))

    def _write_files(self) -> None:
        for name in ("ssh", "slurm", "state", "spool-node1", "spool-node2"):
            (self.folder / name).mkdir(parents=True)
        for name in ("host_key", "user_key"):
            _output(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "ssh" / name)])
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        texts = {"ssh/sshd_config": _SSHD, "ssh/ssh_config": _SSH, "slurm/slurm.conf": _SLURM}
        for name, text in texts.items():
            (self.folder / name).write_text(text.format(folder=self.folder, cpus=os.cpu_count()))
        hosts = [f"{address} {name}" for name, address in ADDRESSES.items()]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))

    def _start_node(self, name: str) -> subprocess.Popen[bytes]:
        """Its first process: makes the node see the cluster's files as those of the system, and waits for the end."""
        folder = self.folder
        script = f"""
            mount --bind {folder}/slurm /etc/slurm && mount --bind {folder}/ssh /etc/ssh || exit
            mount --bind {folder}/hosts /etc/hosts || exit
            mount -t tmpfs tmpfs /run && mount -t tmpfs -o mode=1777 tmpfs /dev/shm || exit
            mkdir -m 755 /run/munge /run/sshd && hostname {name} && ip link set lo up || exit
            echo up; read"""
        words = ["unshare", *_SPACES, "bash", "-c", script]
        node = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert node.stdout is not None
        if node.stdout.readline() != b"up\n":
            raise ClusterError(f"{name} cannot be made; it ended with {node.wait(_SECONDS)}")
        return node

    def _connect(self) -> None:
        """One virtual cable between the nodes, of which this machine sees neither end."""
        first, second = self._nodes.values()
        cable = f"ip link add eth0 type veth peer eth0 netns {second.pid}"
        _output(["nsenter", f"--net=/proc/{first.pid}/ns/net", *cable.split()])
        for name, address in ADDRESSES.items():
            self.run(name, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            self.run(name, "ip", "link", "set", "eth0", "up")

    def _start_daemons(self, name: str) -> None:
        folder = self.folder
        # A session of their own: who presses Ctrl-C does not mean them.
        self.run(
            name,
            *("setsid", "munged", f"--key-file={folder}/munge.key", f"--log-file={folder}/munged-{name}.log"),
            *("--pid-file=/run/munge/munged.pid", "--seed-file=/run/munge/seed", "--num-threads=1"),
        )
        self.run(name, "setsid", shutil.which("sshd", path=_search_path()) or "sshd")
        if name == "node1":
            self.run(name, "setsid", "slurmctld")
        self.run(name, "setsid", "slurmd")

    def _await_slurm(self) -> None:
        """Slurm has work for the nodes once they have told the controller that they are there."""
        deadline = time.monotonic() + _SECONDS
        states = ""
        while time.monotonic() < deadline:
            states = self.run("node1", "sinfo", "--noheader", "--Node", "--format=%N %T")
            if sorted(states.split()) == sorted([*ADDRESSES, *("idle" for _ in ADDRESSES)]):
                return
            time.sleep(0.5)
        raise ClusterError(f"Slurm's nodes are not idle but:\n{states}")


def _output(words: Sequence[str]) -> str:
    environment = {**os.environ, "PATH": _search_path()}
    # A daemon keeps what it was given to write to; a file does not wait for it to close that.
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            timeout=_SECONDS,
            check=False,
        )
        said.seek(0)
        text = said.read()
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(words)} ended with {done.returncode}: {text}")
    return text


def main(words: Sequence[str]) -> int:
    """Run a command on the first node of a new cluster; its exit code."""
    problem = missing()
    if problem:
        print(f"error: no cluster can be made here: {problem}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder) / "cluster") as cluster:
        return subprocess.run(cluster.command("node1", words or ["bash"]), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
