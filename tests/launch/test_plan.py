"""A launch is decided from flags, variables and host lists; contradictions are refused with what to change."""

from __future__ import annotations

import itertools

import pytest

from megatron.launch.plan import make_plan, processes_per_node


def _plan(argv=(), environ=None, own_names=("here",)):
    return make_plan(["--dry-run", *argv], {"DEVICE": "cpu", **(environ or {})}, own_names)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("n1 slots=4\nn2 slots=4\n")
    return str(path)


def _trainer_words(plan, script):
    return list(plan.command[plan.command.index(script) + 1 :])


def test_variables_come_before_the_command_line_which_wins(script):
    plan = _plan(["--lr", "2", "--bf16"], {"SCRIPT": script, "LR": "1", "TP": "2"})
    assert _trainer_words(plan, script) == [
        *("--device", "cpu", "--tensor-model-parallel-size", "2", "--lr", "2", "--bf16")
    ]
    assert plan.world_size == 2


def test_flags_of_the_trainer_keep_their_order_and_values(script):
    argv = ["--data-path", "0.3", "a", "0.7", "b", "--swiglu", "--weight-decay", "-0.1"]
    assert _trainer_words(_plan(argv, {"SCRIPT": script}), script)[2:] == argv


def test_missing_script_is_refused():
    with pytest.raises(ValueError, match=r"--script nothing\.py: there is no such file"):
        _plan([], {"SCRIPT": "nothing.py"})


def test_user_variables_are_not_exported_again(script):
    names = {variable.name for variable in _plan([], {"SCRIPT": script}).exports}
    assert "OMP_NUM_THREADS" in names
    names = {variable.name for variable in _plan([], {"SCRIPT": script, "OMP_NUM_THREADS": "3"}).exports}
    assert "OMP_NUM_THREADS" not in names


def test_deepspeed_launcher_is_told_the_device(script):
    plan = _plan(["--launcher", "deepspeed"], {"SCRIPT": script})
    assert ("DS_ACCELERATOR", "cpu") in {(variable.name, variable.value) for variable in plan.exports}


def test_hostfile_gives_nodes_slots_rank_and_meeting_point(script, hostfile):
    plan = _plan([], {"SCRIPT": script, "HOSTFILE": hostfile}, own_names=("n2",))
    command = " ".join(plan.command)
    assert "--nnodes 2 --node-rank 1 --master-addr n1 --master-port 29500 --nproc-per-node 4" in command
    assert plan.world_size == 8


def test_fewer_nodes_than_the_hostfile_lists(script, hostfile):
    plan = _plan(["--num-nodes", "1"], {"SCRIPT": script, "HOSTFILE": hostfile})
    assert "--standalone" in plan.command and plan.world_size == 4


def test_list_of_bare_names_needs_the_number_of_processes(script, tmp_path):
    names = tmp_path / "hosts"
    names.write_text("n1\nn2\nn3\nn4\n")
    environ = {"SCRIPT": script, "HOSTFILE": str(names), "NPROC": "8"}
    assert _plan([], environ, own_names=("n3",)).world_size == 32
    with pytest.raises(ValueError, match="name slots=8"):
        _plan(["--launcher", "deepspeed"], environ)


def test_exported_variables_reach_the_processes(script, hostfile):
    argv = ["--launcher", "mpirun", "--export", "A=1", "--export", "OMP_NUM_THREADS=7", "--export", "SAME=1"]
    here = {"GLOO_SOCKET_IFNAME": "eth1", "LD_LIBRARY_PATH": "/opt/lib", "SAME": "1", "OTHER": "x"}
    plan = _plan(argv, {"SCRIPT": script, "HOSTFILE": hostfile, **here})
    exports = {variable.name: variable.value for variable in plan.exports}
    assert exports["A"] == "1" and exports["OMP_NUM_THREADS"] == "7", "what is asked for wins over what is computed"
    handed_on = {name for flag, name in itertools.pairwise(plan.command) if flag == "-x"}
    assert {"A", "OMP_NUM_THREADS", *here} - {"OTHER"} <= handed_on and "OTHER" not in handed_on


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_launchers_that_reach_the_nodes_need_no_node_rank(script, hostfile, launcher):
    plan = _plan(["--launcher", launcher], {"SCRIPT": script, "HOSTFILE": hostfile}, own_names=("login",))
    assert "n1:29500" in plan.command


def test_slurm_allocation_is_used(script):
    environ = {"SCRIPT": script, "LAUNCHER": "srun", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "77", "NPROC": "8"}
    plan = _plan([], environ)
    assert plan.world_size == 16
    assert "n1:29500" in plan.command and "77" in plan.command


def test_check_starts_another_program_that_gets_the_folders(script, hostfile):
    argv = ["--check", "--save", "x", "--data-cache-path", "y", "--lr", "1"]
    plan = _plan(argv, {"SCRIPT": script, "HOSTFILE": hostfile}, own_names=("n2",))
    command = " ".join(plan.command)
    assert plan.check and plan.world_size == 8 and script not in command and "--lr" not in command
    assert command.endswith("tools/preflight.py --device cpu --timeout 60 --folder x --folder y")
    assert "--rdzv-conf timeout=60,join_timeout=60 -- " in command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--hostfile", "/nonexistent"], "No such file"),
        (["--num-nodes", "2"], "pass --node-rank"),
        (["--num-nodes", "2", "--launcher", "deepspeed"], "pass --hostfile"),
        (["--export", "A"], "--export A: must be NAME=VALUE"),
        (["--export", "SCRIPT=x"], "SCRIPT is .* in the environment"),
        (["--num-nodes", "2", "--node-rank", "0"], "pass --master-addr"),
        (["--num-nodes", "0"], "must be from 1"),
        (["--tensor-model-parallel-size", "0"], "must be at least 1"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_impossible_launches_are_refused(script, argv, message):
    with pytest.raises(ValueError, match=message):
        _plan(argv, {"SCRIPT": script})


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        ({}, 1),
        ({"model_parallel": 4}, 4),
        ({"model_parallel": 4, "nodes": 2}, 2),
        ({"devices": 8}, 8),
        ({"devices": 8, "slots": 4}, 4),
        ({"devices": 8, "asked": 2}, 2),
        ({"data_parallel": 3, "model_parallel": 2}, 6),
        ({"data_parallel": 2, "model_parallel": 2, "nodes": 2, "asked": 2}, 2),
    ],
)
def test_number_of_processes(settings, processes):
    assert _processes(**settings) == processes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_parallel": 2, "model_parallel": 2, "asked": 8}, "DP=2 needs 4 processes .* drop one of the two"),
        ({"data_parallel": 1, "model_parallel": 3, "nodes": 2}, "3 ranks cannot be spread evenly over 2 nodes"),
        ({"asked": 3, "model_parallel": 2}, "3 processes cannot hold whole copies"),
        ({"devices": 0, "slots": None}, "no such device; say how many"),
        ({"asked": 0}, "must be at least 1"),
    ],
)
def test_impossible_numbers_of_processes(settings, message):
    with pytest.raises(ValueError, match=message):
        _processes(**settings)


def _processes(**settings):
    defaults = {"asked": None, "data_parallel": None, "slots": None, "devices": 1, "model_parallel": 1, "nodes": 1}
    return processes_per_node(**{**defaults, **settings})
