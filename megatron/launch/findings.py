"""What the processes of `--check` found: compared between nodes, and as a table. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

MAX_CLOCK_SECONDS = 5.0
"""Clocks of a cluster agree within milliseconds; logs and files of nodes that differ by more cannot be ordered."""
CHECKS = ("versions", "device", "folder", "clock", "collective")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one process found."""

    node: int
    rank: int
    host: str
    versions: dict[str, str]
    device: str
    """In words, or why there is none."""
    problems: dict[str, str]
    """Check -> why it failed; empty where it did not. What needs a comparison is not in here."""
    clock: float
    """Seconds ahead of the first process."""


def problems_of(finding: Finding, first: Finding) -> Iterator[tuple[str, str]]:
    """(check, cause) of a process, in comparison with the first one."""
    names = sorted({*finding.versions, *first.versions})
    for name in names:
        own, other = finding.versions.get(name, "missing"), first.versions.get(name, "missing")
        if own != other:
            yield "versions", f"{name} is {own}, on the first node {other}"
    if abs(finding.clock) > MAX_CLOCK_SECONDS:
        yield "clock", f"{finding.clock:+.1f} s from the first node's; at most {MAX_CLOCK_SECONDS:.0f} s are allowed"
    for check, problem in finding.problems.items():
        if problem:
            yield check, problem


def causes(findings: Sequence[Finding]) -> list[str]:
    """One line for every cause of every node, processes of a node that say the same taken together."""
    lines = []
    for node, group in groupby(findings, key=lambda finding: finding.node):
        said: dict[tuple[str, str], list[Finding]] = {}
        for finding in group:
            for pair in problems_of(finding, findings[0]):
                said.setdefault(pair, []).append(finding)
        for (check, cause), who in said.items():
            ranks = ",".join(str(finding.rank) for finding in who)
            lines.append(f"error: node {node} ({who[0].host}), rank {ranks}: {check}: {cause}")
    return lines


def table(findings: Sequence[Finding]) -> list[str]:
    """One line per node: each check is ok or FAILED."""
    rows: list[tuple[str, ...]] = [("node", "host", "ranks", *CHECKS, "what")]
    for node, group in groupby(findings, key=lambda finding: finding.node):
        members = list(group)
        failed = {check for finding in members for check, _ in problems_of(finding, findings[0])}
        ranks = f"{members[0].rank}-{members[-1].rank}" if len(members) > 1 else str(members[0].rank)
        states = ["FAILED" if check in failed else "ok" for check in CHECKS]
        rows.append((str(node), members[0].host, ranks, *states, _what(members[0])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _what(finding: Finding) -> str:
    device = "" if finding.problems.get("device") else f"{finding.device}; "
    return device + ", ".join(f"{name} {version}" for name, version in finding.versions.items())
