"""What the processes of a check found, compared between nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron.launch.findings import CHECKS, MAX_CLOCK_SECONDS, Finding, causes, table


def _finding(rank=0, **changes):
    good = Finding(
        node=rank // 2,
        rank=rank,
        host=f"n{rank // 2}",
        versions={"torch": "2.13.0", "code": "abc"},
        device="2 x card",
        problems=dict.fromkeys(("device", "folder", "collective"), ""),
        clock=0.01,
    )
    return replace(good, **changes)


def test_nodes_that_are_alike_pass():
    findings = [_finding(rank) for rank in range(4)]
    assert causes(findings) == []
    head, *rows = table(findings)
    assert head.split() == ["node", "host", "ranks", *CHECKS, "what"]
    assert rows[1].split()[:8] == ["1", "n1", "2-3", *["ok"] * 5]
    assert "2 x card; torch 2.13.0, code abc" in rows[1]


@pytest.mark.parametrize(
    ("changes", "check", "cause"),
    [
        ({"versions": {"torch": "2.12.0", "code": "abc"}}, "versions", "torch is 2.12.0, on the first node 2.13.0"),
        ({"versions": {"torch": "2.13.0"}}, "versions", "code is missing, on the first node abc"),
        ({"clock": -MAX_CLOCK_SECONDS - 1}, "clock", "-6.0 s from the first node's; at most 5 s are allowed"),
        ({"problems": {"device": "no card"}}, "device", "no card"),
        ({"problems": {"folder": "/x is not writable"}}, "folder", "/x is not writable"),
        ({"problems": {"collective": "timeout"}}, "collective", "timeout"),
    ],
)
def test_cause_is_named_with_the_node_and_the_rank(changes, check, cause):
    findings = [_finding(0), _finding(1), _finding(2), _finding(3, **changes)]
    assert causes(findings) == [f"error: node 1 (n1), rank 3: {check}: {cause}"]
    assert dict(zip(CHECKS, table(findings)[2].split()[3:], strict=False))[check] == "FAILED"


def test_processes_of_a_node_with_the_same_problem_share_a_line():
    findings = [_finding(0), _finding(1), *(_finding(rank, problems={"device": "no driver"}) for rank in (2, 3))]
    assert causes(findings) == ["error: node 1 (n1), rank 2,3: device: no driver"]
