"""What a launch will do, decided before anything is started: pure functions of flags, environment and host names."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.accelerators import EnvVar, host_threads, load, select
from megatron.config.parallel import ParallelConfig
from megatron.config.plugins import PLUGINS
from megatron.config.schema import options
from megatron.launch import env
from megatron.launch.command import BUILDERS, Job
from megatron.launch.families import FAMILIES, passed_on
from megatron.launch.hostfile import Host, common_slots, expand_nodelist, parse_hostfile, rank_of_this_node

_MODEL_PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "ds_sequence_parallel_size",
)
_REPOSITORY = Path(__file__).resolve().parents[2]
_FOLDERS = ("save", "tensorboard_dir", "data_cache_path")
"""Flags of the trainer that name a folder which all nodes write to."""
_PATIENCE = 60
"""Seconds that `--check` waits for other nodes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a launch, for `--dry-run` to print and `main` to run."""

    readings: tuple[env.Reading, ...]
    flags: tuple[str, ...]
    """Flags of the trainer: those of the variables, then those of the command line, which win."""
    exports: tuple[EnvVar, ...]
    """Variables that the processes get and that the user has not set."""
    world_size: int
    device: str
    machine: str | None
    """What the ranks are, for the plan of a dry run: `--machine`."""
    command: tuple[str, ...]
    dry_run: bool
    check: bool = False
    """The command tries the nodes and does not train."""


def parser() -> argparse.ArgumentParser:
    """The launcher's own flags; every other flag is the trainer's."""
    table = "\n".join(f"  {variable.name:<18} {variable.help}" for variable in env.PLAIN.variables if variable.help)
    result = argparse.ArgumentParser(
        prog="python -m megatron.launch",
        description="Start a training run. Flags not listed here are the trainer's: python pretrain_gpt.py --help.",
        epilog=f"environment variables, each overridden by its flag:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--launcher", choices=tuple(BUILDERS), default="torchrun", help="what starts the processes")
    result.add_argument("--script", default="pretrain_gpt.py", help="program to start (pretrain_gpt.py)")
    result.add_argument("--nproc-per-node", type=int, metavar="N", help="processes on each node")
    result.add_argument("--data-parallel-size", type=int, metavar="N", help="copies of the model")
    result.add_argument("--num-nodes", type=int, metavar="N", help="machines (those of the hostfile, or 1)")
    result.add_argument("--node-rank", type=int, metavar="N", help="number of this machine (found in the hostfile)")
    result.add_argument("--hostfile", default="", help="file of `host slots=8` lines")
    result.add_argument("--master-addr", default="", help="address of the first machine (first of the hostfile)")
    result.add_argument("--master-port", type=int, metavar="PORT", help="port of the first machine")
    result.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start all processes again after a failure, N times (0)",
    )
    result.add_argument("--family", choices=tuple(FAMILIES), default="plain", help="whose variables are read (plain)")
    result.add_argument(
        "--export", action="append", default=[], metavar="NAME=VALUE", help="variable that all processes get"
    )
    result.add_argument("--check", action="store_true", help="try on every node what the run needs, and do not run")
    result.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    result.add_argument("--machine", metavar="NAME", help="what a dry run plans memory and time for (h100)")
    return result


def make_plan(
    argv: Sequence[str],
    environ: Mapping[str, str],
    own_names: Sequence[str],
    is_own_address: Callable[[str], bool] = lambda name: False,
) -> Plan:
    """Decide the launch that `argv` and `environ` ask for.

    Args:
        argv: command line without the program's name.
        environ: the environment.
        own_names: names this machine may have in a hostfile.
        is_own_address: whether a name or address of a hostfile, which is none of them, means this machine.

    Raises:
        ValueError: what is asked for is contradictory or not possible; the message names what to change.
    """
    family = FAMILIES[parser().parse_known_args(argv)[0].family]
    readings = env.read(family, environ, argv)
    words = [*(word for reading in readings for word in reading.flags), *argv]
    own, flags = parser().parse_known_args(words)
    _check_restarts(own.max_restarts)
    model_parallel, device = _layout(flags)
    hosts = _hosts(own.hostfile, own.launcher, environ)
    nodes = _nodes(own.num_nodes, hosts)
    accelerator = load(device) if device != "auto" else select(device)
    slots = common_slots(hosts[:nodes]) if hosts and hosts[0].slots else None
    processes = processes_per_node(
        asked=own.nproc_per_node,
        data_parallel=own.data_parallel_size,
        slots=slots,
        devices=accelerator.device_count(),
        model_parallel=model_parallel,
        nodes=nodes,
    )
    if not own.dry_run and not own.check and nodes == 1:
        select(device)
    asked = _exports(own.export, environ)
    wanted = [*asked, *accelerator.environment, host_threads(processes)]
    if own.launcher == "deepspeed" and accelerator.deepspeed_name:
        wanted.append(EnvVar("DS_ACCELERATOR", accelerator.deepspeed_name, "the launcher imports DeepSpeed, too"))
    wanted = list({one.name: one for one in reversed(wanted)}.values())[::-1]
    several = nodes > 1
    job = Job(
        script=_preflight(device, flags) if own.check else (_script(own.script), *flags),
        processes=processes,
        exports={one.name: environ.get(one.name, one.value) for one in wanted} | passed_on(accelerator.name, environ),
        nodes=nodes,
        node_rank=_node_rank(own.node_rank, own.launcher, hosts, own_names, is_own_address) if several else 0,
        master_addr=_master(own.master_addr, own.launcher, hosts) if several else own.master_addr,
        master_port=own.master_port,
        hosts=tuple(host.name for host in hosts[:nodes]),
        hostfile=own.hostfile,
        job_id=environ.get("SLURM_JOB_ID", "megatron"),
        max_restarts=own.max_restarts,
        timeout=_PATIENCE if own.check else None,
    )
    return Plan(
        readings=readings,
        flags=tuple(flags),
        exports=tuple(one for one in wanted if one.name not in environ),
        world_size=nodes * processes,
        device=accelerator.name,
        machine=own.machine,
        command=tuple(BUILDERS[own.launcher](job)),
        dry_run=own.dry_run,
        check=own.check,
    )


def _check_restarts(asked: int) -> None:
    """Raises ValueError for a number of times that is none."""
    if asked < 0:
        raise ValueError(f"--max-restarts {asked}: must be at least 0")


def processes_per_node(
    *,
    asked: int | None,
    data_parallel: int | None,
    slots: int | None,
    devices: int,
    model_parallel: int,
    nodes: int,
) -> int:
    """Processes on each node: asked for, or DP times the model-parallel ranks, or the slots, or the devices.

    Args:
        asked: `--nproc-per-node`.
        data_parallel: `--data-parallel-size`.
        slots: slots of each host in the hostfile.
        devices: devices of this machine; more processes than that run where devices can be shared, on CPUs.
        model_parallel: ranks that hold one copy of the model.
        nodes: machines.

    Raises:
        ValueError: two of them contradict each other, or the ranks cannot be spread evenly.
    """
    if data_parallel is not None:
        total = data_parallel * model_parallel
        if total % nodes:
            raise ValueError(f"DP * TP * PP * CP = {total} ranks cannot be spread evenly over {nodes} nodes")
        if asked is not None and asked * nodes != total:
            raise ValueError(
                f"DP={data_parallel} needs {total} processes ({model_parallel} per copy of the model), but "
                f"--nproc-per-node {asked} on {nodes} node(s) gives {asked * nodes}: drop one of the two"
            )
        asked = total // nodes
    if asked is None and not slots and not devices:
        raise ValueError("this machine has no such device; say how many processes each node runs (--nproc-per-node)")
    chosen = asked if asked is not None else slots or max(devices, -(-model_parallel // nodes))
    if chosen < 1:
        raise ValueError(f"--nproc-per-node {chosen}: must be at least 1")
    if chosen * nodes % model_parallel:
        raise ValueError(
            f"{chosen * nodes} processes cannot hold whole copies of a model spread over TP * PP * CP = "
            f"{model_parallel} ranks: change --nproc-per-node or the parallel sizes"
        )
    return chosen


def _layout(flags: Sequence[str]) -> tuple[int, str]:
    """Ranks that hold one copy of the model, and the device, read from the trainer's flags with its own spellings."""
    reader = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for option in options(ParallelConfig):
        if option.dest in _MODEL_PARALLEL:
            reader.add_argument(*option.names, dest=option.dest, type=int, default=option.default)
    reader.add_argument("--device", default="auto")
    reader.add_argument("--plugin")
    plugin = PLUGINS.get(reader.parse_known_args(list(flags))[0].plugin)
    if plugin is not None:
        reader.set_defaults(**plugin.settings)
    known, _ = reader.parse_known_args(list(flags))
    ranks = 1
    for dest in _MODEL_PARALLEL:
        size = getattr(known, dest)
        if size < 1:
            raise ValueError(f"--{dest.replace('_', '-')} {size}: must be at least 1")
        ranks *= size
    return ranks, known.device


def _hosts(hostfile: str, launcher: str, environ: Mapping[str, str]) -> tuple[Host, ...]:
    """The machines: of the hostfile, or of the Slurm allocation, whose number of slots is not known; else none."""
    if hostfile:
        try:
            return parse_hostfile(Path(hostfile).read_text(encoding="utf-8"))
        except OSError as problem:
            raise ValueError(f"--hostfile {hostfile}: {problem.strerror}") from None
    if launcher == "srun" and environ.get("SLURM_JOB_NODELIST"):
        return tuple(Host(name, 0) for name in expand_nodelist(environ["SLURM_JOB_NODELIST"]))
    return ()


def _nodes(asked: int | None, hosts: Sequence[Host]) -> int:
    if asked is None:
        return len(hosts) or 1
    if asked < 1 or (hosts and asked > len(hosts)):
        raise ValueError(f"--num-nodes {asked}: must be from 1 to the {len(hosts) or 'number of'} hosts there are")
    return asked


def _node_rank(
    asked: int | None,
    launcher: str,
    hosts: Sequence[Host],
    own_names: Sequence[str],
    is_own_address: Callable[[str], bool],
) -> int:
    """Only torchrun, started by hand on each node, has to be told which node this is."""
    if launcher != "torchrun":
        return 0
    if asked is not None:
        return asked
    if hosts:
        return rank_of_this_node(hosts, own_names, is_own_address)
    raise ValueError("several nodes without a hostfile: pass --node-rank (NODE_RANK), from 0")


def _master(asked: str, launcher: str, hosts: Sequence[Host]) -> str:
    if launcher == "deepspeed" and not all(host.slots for host in hosts):
        raise ValueError("DeepSpeed's launcher reads lines of the form `name slots=8` in --hostfile: add the slots")
    if launcher == "deepspeed" and not hosts:
        raise ValueError("several nodes with DeepSpeed's launcher: pass --hostfile (HOSTFILE), the list of machines")
    if asked or launcher == "deepspeed":
        return asked
    if hosts:
        return hosts[0].name
    raise ValueError("several nodes without a hostfile: pass --master-addr (MASTER_ADDR), the first machine")


def _exports(asked: Sequence[str], environ: Mapping[str, str]) -> list[EnvVar]:
    """The variables of `--export`. Raises ValueError for one that is not NAME=VALUE, or is set to something else."""
    result = []
    for text in asked:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"--export {text}: must be NAME=VALUE")
        if environ.get(name, value) != value:
            raise ValueError(
                f"--export {text}: {name} is {environ[name]} in the environment; unset it, or make it agree"
            )
        result.append(EnvVar(name, value, "asked for"))
    return result


def _preflight(device: str, flags: Sequence[str]) -> tuple[str, ...]:
    """The program that tries the nodes, with the folders that the trainer's flags name."""
    reader = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for dest in _FOLDERS:
        reader.add_argument(f"--{dest.replace('_', '-')}", dest=dest)
    known, _ = reader.parse_known_args(list(flags))
    folders = [word for dest in _FOLDERS if getattr(known, dest) for word in ("--folder", getattr(known, dest))]
    return (_script("tools/preflight.py"), "--device", device, "--timeout", str(_PATIENCE), *folders)


def _script(asked: str) -> str:
    """The trainer's path: as given, or in the repository this package lies in."""
    for candidate in (Path(asked), _REPOSITORY / asked):
        if candidate.is_file():
            return str(candidate)
    raise ValueError(f"--script {asked}: there is no such file here or in {_REPOSITORY}")
