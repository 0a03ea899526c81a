"""The commands are the documented ones; torchrun's is run for real, with flags it could mistake for its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch.distributed.run import get_args_parser

from megatron.launch.command import BUILDERS, Job, deepspeed, mpirun, srun, torchrun
from megatron.launch.node import with_role

_SCRIPT = ("train.py", "--lr", "1")
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def _job(**settings) -> Job:
    return Job(**{"script": _SCRIPT, "processes": 2, "exports": {"OMP_NUM_THREADS": "4"}, **settings})


def _many(**settings) -> Job:
    return _job(nodes=2, master_addr="n1", master_port=1234, hosts=("n1", "n2"), **settings)


def test_torchrun_on_one_node_picks_a_free_port():
    assert torchrun(_job()) == [*_TORCHRUN, "--standalone", "--nproc-per-node", "2", "--", *_SCRIPT]


def test_torchrun_on_several_nodes_names_the_meeting_point_and_its_own_rank():
    where = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "n1", "--master-port", "1234"]
    assert torchrun(_many(node_rank=1)) == [*_TORCHRUN, *where, "--nproc-per-node", "2", "--", *_SCRIPT]


def test_a_port_that_was_asked_for_is_used_on_one_node_too():
    assert "--standalone" not in torchrun(_job(master_port=4321))
    assert "4321" in torchrun(_job(master_port=4321))


def test_restarts_are_left_to_torchrun_and_nodes_agree_on_them():
    assert torchrun(_job(max_restarts=3))[3:8] == ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    assert "--rdzv-endpoint" in torchrun(_many(max_restarts=3))


def test_deepspeeds_launcher_is_started_again():
    once, again = deepspeed(_job()), deepspeed(_job(max_restarts=3))
    assert again == [sys.executable, "-m", "megatron.launch.again", "3", *once]


def test_deepspeed_on_one_node():
    command = deepspeed(_job())
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert command[-4:] == ["--no_local_rank", *_SCRIPT]
    assert command[command.index("--num_gpus") + 1] == "2"


def test_deepspeed_hands_variables_to_other_nodes():
    command = deepspeed(_many(hostfile="hosts.txt"))
    assert command[command.index("--hostfile") + 1] == "hosts.txt"
    start = command.index("env")
    assert command[start - 1 :] == ["--no_python", "env", "OMP_NUM_THREADS=4", sys.executable, *_SCRIPT]


def _arrived(words):
    """What a node's shell gets of the words that DeepSpeed's launcher is given, after its rules and those of pdsh."""
    quoted = ['"{}"'.format(word.replace('"', '\\"')) if " " in word else word for word in words]
    line = " ".join(quoted).replace("%%", "%")
    shell = ["bash", "-c", f"printf '%s\\0' {line}"]
    return subprocess.run(shell, capture_output=True, text=True, check=True, timeout=60).stdout.split("\0")[:-1]


def test_words_arrive_at_other_nodes_as_they_are():
    awkward = ["a b", "a;b", "$HOME/x", "$HOME `x y`", '{"a": "1"}', '{"a":1}', "it's", "C:\\ x", "%n of %h", "*", ""]
    words = _arrived(deepspeed(_many(hostfile="hosts", script=("train.py", *awkward), exports={"X": "$Y;"})))
    assert words[words.index("env") + 1 :] == ["X=$Y;", sys.executable, "train.py", *awkward]


@pytest.mark.parametrize("builder", [srun, mpirun])
def test_one_torchrun_per_node_meets_at_the_first(builder):
    command = builder(_many(job_id="77"))
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:1234", "--rdzv-id", "77"]
    words = ["--nnodes", "2", *meeting, "--nproc-per-node", "2", "--", *_SCRIPT]
    assert command[command.index(sys.executable) :] == [sys.executable, "-m", "megatron.launch.node", *words]


def test_the_node_that_the_meeting_point_lies_on_serves_it():
    words = ["--nnodes", "2", "--rdzv-endpoint", "n1:1234", "--rdzv-conf", "timeout=9", "--", "x.py", "--rdzv-conf"]
    asked: list[str] = []
    first = get_args_parser().parse_args(with_role(words, lambda host: not asked.append(host)))
    assert (first.rdzv_endpoint, first.rdzv_conf, asked) == ("n1:1234", "timeout=9,is_host=True", ["n1"])
    assert first.training_script_args == ["--rdzv-conf"]
    other = get_args_parser().parse_args(with_role([*words[:4], "--", "x.py"], lambda host: False))
    assert other.rdzv_conf == "is_host=False"


def test_srun_starts_one_task_per_node():
    tasks = ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1"]
    assert srun(_many())[:9] == ["srun", *tasks, "--disable-status", "--nodelist", "n1,n2"]


def test_mpirun_exports_variables_and_names_hosts():
    command = mpirun(_many())
    assert command[command.index("-x") + 1] == "OMP_NUM_THREADS"
    assert command[command.index("--host") + 1] == "n1,n2"


def test_every_launcher_has_a_builder():
    assert tuple(BUILDERS) == ("torchrun", "deepspeed", "srun", "mpirun")


@pytest.mark.slow
def test_torchrun_passes_on_flags_that_abbreviate_its_own(tmp_path):
    script = tmp_path / "show.py"
    script.write_text("import os, sys; print(os.environ['RANK'], os.environ['WORLD_SIZE'], sys.argv[1:])")
    command = torchrun(_job(script=(str(script), "--start", "5", "--log", "x"), processes=1))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.strip() == "0 1 ['--start', '5', '--log', 'x']", done.stderr
