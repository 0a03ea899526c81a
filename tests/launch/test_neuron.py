"""The variables of neuronx-distributed's scripts, and what Slurm and MPI say about the nodes."""

from __future__ import annotations

import pytest

from megatron.launch.__main__ import resolve
from tests.launch.recorded import START, Launch, launch_of

_SLURM = {"SLURM_NTASKS": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "trn[07-08]"}
_TINY = {"PRESET": "llama-tiny", "MICRO_BATCH": "1", "SEQ_LENGTH": "64", "TRAIN_ITERS": "20", "LR": "1e-3"}
_MADE_UP = ("--mock-data", "--vocab-size", "511")


def _launch(*flags: str, **variables: str) -> Launch:
    environ = {**START, "DEVICE": "neuron", "NPROC": "32", **variables}
    return Launch(("--family", "neuron", *flags), environ)


def _flags(**variables: str) -> str:
    return " ".join(_launch(**variables).plan().flags)


def test_slurm_says_how_many_nodes_which_one_and_where_they_meet():
    command = " ".join(_launch(**_SLURM).plan().command)
    assert "--nnodes 2 --node-rank 1 --master-addr trn07 --master-port 29500 --nproc-per-node 32" in command


def test_mpi_says_how_many_nodes_and_which_one():
    environ = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "MASTER_ADDR": "trn1"}
    assert "--nnodes 4 --node-rank 3 --master-addr trn1" in " ".join(_launch(**environ).plan().command)


def test_what_the_user_says_about_nodes_wins():
    command = " ".join(_launch(**_SLURM, NODE_RANK="0", MASTER_ADDR="here").plan().command)
    assert "--nnodes 2 --node-rank 0 --master-addr here" in command


def test_chunks_of_a_stage_become_layers_of_a_chunk():
    flags = _flags(PRESET="llama3-70b", TP_DEGREE="8", PP_DEGREE="4", VPP_DEGREE="5")
    assert "--num-layers-per-virtual-pipeline-stage 4" in flags, "80 layers in 4 stages of 5 chunks"
    with pytest.raises(ValueError, match="VPP_DEGREE=3 x PP_DEGREE=4 = 12: must divide the 80 layers of llama3-70b"):
        _flags(PRESET="llama3-70b", PP_DEGREE="4", VPP_DEGREE="3")
    with pytest.raises(ValueError, match="VPP_DEGREE=x and PP_DEGREE must be whole numbers"):
        _flags(PRESET="llama3-70b", VPP_DEGREE="x")


@pytest.mark.parametrize("name", ["COMPILE_ONLY", "NEURON_EXTRACT_GRAPHS_ONLY"])
def test_compiling_takes_a_few_steps_of_the_real_run_and_keeps_nothing(name):
    launch = _launch(*_MADE_UP, **_TINY, CHECKPOINT_DIR="c", **{name: "1"})
    run = resolve(launch.plan(), launch.environ)
    assert run.training.exit_interval == 10 and run.training.train_iters == 20
    assert run.checkpoint.save is None and run.checkpoint.load is None


def test_trainium_1_says_what_to_set_in_the_scripts(tmp_path):
    def tried(*flags: str, **variables: str) -> tuple[int, str]:
        script = "neuron/run_llama2_13B_tp_pp.sh"
        code, _, error = launch_of(script, tmp_path, *flags, DEVICE="neuron_xla", TP_DEGREE="4", **variables).dry_run()
        return code, error.partition(": set ")[2]

    model = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "32000")
    assert tried(*model) == (2, "--pipeline-model-parallel-size 1 (not 4), --zero-stage 0 (not 1)\n")
    assert tried(*model, "--zero-stage", "0", PP_DEGREE="1") == (0, "")


def test_measuring_stops_early():
    assert "--exit-interval 100" in _flags(PERF_TEST="1")
    assert "--exit-interval 7" in _flags(EARLY_EXIT_STEPS="7")
    assert "--exit-interval" not in _flags(EARLY_EXIT_STEPS="0", PERF_TEST="0")
    with pytest.raises(ValueError, match="both decide --exit-interval"):
        _flags(EARLY_EXIT_STEPS="7", COMPILE_ONLY="1")


def test_half_precision_optimizers_are_refused():
    with pytest.raises(ValueError, match="GPU_COMPATIBLE_PRECISION=0 is not possible"):
        _flags(GPU_COMPATIBLE_PRECISION="0")


def test_more_ranks_than_kv_heads_is_for_the_trainer_to_judge(tmp_path):
    nodes = {"SLURM_NTASKS": "32", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "t[1-32]"}
    launch = launch_of("neuron/run_llama3_70B_tp_pp.sh", tmp_path, TP_DEGREE="32", **nodes)
    plan = launch.plan()
    try:
        resolve(plan, launch.environ)
    except ValueError as trainer:
        assert launch.dry_run() == (2, "", f"error: {trainer}\n")
        assert str(trainer).startswith("--num-key-value-heads 8: ")
