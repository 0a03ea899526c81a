"""Lists of machines are read, or refused with the line that is wrong."""

from __future__ import annotations

import pytest

from megatron.launch.hostfile import Host, common_slots, expand_nodelist, parse_hostfile, rank_of_this_node


def test_comments_and_empty_lines_are_left_out():
    text = "# cluster\n\nn1 slots=8  # first\n  n2   slots = 8\n"
    assert parse_hostfile(text) == (Host("n1", 8), Host("n2", 8))


def test_names_alone_leave_the_number_of_processes_open():
    assert parse_hostfile("n1\nn2\n") == (Host("n1", 0), Host("n2", 0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1 8", "line 1: 'n1 8' is not of the form"),
        ("n1 slots=8\nn2 slots=x", "line 2"),
        ("n1 slots=0", "line 1"),
        ("n1 slots=8\nn1 slots=8", "line 2: n1 was listed before"),
        ("# nobody", "lists no host"),
    ],
)
def test_bad_hostfiles_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_hostfile(text)


def test_slots_must_agree():
    assert common_slots([Host("a", 4), Host("b", 4)]) == 4
    with pytest.raises(ValueError, match="a has 4, b has 8"):
        common_slots([Host("a", 4), Host("b", 8)])


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("login", ["login"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[01-02,7],m1", ["n01", "n02", "n7", "m1"]),
        ("a[1]-ib,b[9-10]", ["a1-ib", "b9", "b10"]),
    ],
)
def test_slurm_nodelists(nodelist, names):
    assert list(expand_nodelist(nodelist)) == names


@pytest.mark.parametrize("nodelist", ["", "n[1-3", "n[a-b]", "n1]"])
def test_bad_nodelists_are_refused(nodelist):
    with pytest.raises(ValueError, match="cannot read"):
        expand_nodelist(nodelist)


def test_rank_of_this_node():
    hosts = [Host("a", 8), Host("b", 8)]
    assert rank_of_this_node(hosts, ["b.cluster", "b"]) == 1
    with pytest.raises(ValueError, match=r"\(c\) is not in the hostfile \(a, b\); pass --node-rank"):
        rank_of_this_node(hosts, ["c"])
