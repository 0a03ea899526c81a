"""Lists of machines: DeepSpeed and MPI hostfiles, and the compact node lists of Slurm."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A machine and the number of processes to start on it; 0 where the list does not say."""

    name: str
    slots: int


def parse_hostfile(text: str) -> tuple[Host, ...]:
    """Hosts of a hostfile: a line is `name slots=8` or `name`; empty lines and what follows `#` are left out.

    Raises:
        ValueError: with the number of the line that cannot be read, or for a host named twice or a file without hosts.
    """
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = re.fullmatch(r"(\S+)(?:\s+slots\s*=\s*(\d+))?", content)
        if match is None or (match[2] is not None and int(match[2]) < 1):
            raise ValueError(f"hostfile line {number}: {line.strip()!r} is not of the form `name slots=8` or `name`")
        if any(host.name == match[1] for host in hosts):
            raise ValueError(f"hostfile line {number}: {match[1]} was listed before")
        hosts.append(Host(match[1], int(match[2] or 0)))
    if not hosts:
        raise ValueError("the hostfile lists no host; it needs lines like `name slots=8`")
    return tuple(hosts)


def common_slots(hosts: Sequence[Host]) -> int:
    """Processes per machine. Raises ValueError when the machines differ: ranks are laid out evenly over them."""
    slots = {host.slots for host in hosts}
    if len(slots) != 1:
        counts = ", ".join(f"{host.name} has {host.slots}" for host in hosts)
        raise ValueError(f"all hosts need the same number of slots, but {counts}")
    return slots.pop()


def expand_nodelist(nodelist: str) -> tuple[str, ...]:
    """Names in a Slurm node list: `n[01-03,7],login` -> n01 n02 n03 n7 login.

    Raises:
        ValueError: the list is malformed.
    """
    parts = re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)(?:,|$)", nodelist)
    rebuilt = ",".join(f"{head}[{ranges}]{tail}" if ranges else head + tail for head, ranges, tail in parts)
    if not parts or rebuilt != nodelist.rstrip(","):
        raise ValueError(f"cannot read the node list {nodelist!r}")
    return tuple(
        f"{head}{number}{tail}" for head, ranges, tail in parts for number in (_numbers(ranges) if ranges else ("",))
    )


def is_own_address(name: str) -> bool:
    """Whether `name` resolves to an address of this machine: one that a socket can be bound to."""
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False


def _numbers(ranges: str) -> list[str]:
    """`01-03,7` -> 01 02 03 7; leading zeros keep their width."""
    numbers: list[str] = []
    for item in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if match is None:
            raise ValueError(f"cannot read {item!r} in the node list")
        first, last = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def rank_of_this_node(
    hosts: Sequence[Host], own_names: Sequence[str], is_own_address: Callable[[str], bool] = lambda name: False
) -> int:
    """Position in `hosts` of this machine.

    Args:
        hosts: all machines.
        own_names: names of this one.
        is_own_address: whether a listed name or address is one of this machine's; asked where no name is.

    Raises:
        ValueError: it is not listed, or more than once.
    """
    for rank, host in enumerate(hosts):
        if host.name in own_names:
            return rank
    own = [rank for rank, host in enumerate(hosts) if is_own_address(host.name)]
    if len(own) == 1:
        return own[0]
    if own:
        names = ", ".join(hosts[rank].name for rank in own)
        raise ValueError(f"this machine is {names} of the hostfile: pass --node-rank (NODE_RANK) to say which")
    listed = ", ".join(host.name for host in hosts)
    raise ValueError(f"this machine ({', '.join(own_names)}) is not in the hostfile ({listed}); pass --node-rank")
