"""Launch variables become the flags their tables say, and the command line wins."""

from __future__ import annotations

import pytest

from megatron.launch import env


def _flags(environ, argv=()):
    return [word for reading in env.read(env.PLAIN, environ, list(argv)) for word in reading.flags]


def test_values_follow_their_flags():
    assert _flags({"TP": "2", "LR": "3e-4"}) == ["--tensor-model-parallel-size", "2", "--lr", "3e-4"]


def test_unset_and_empty_variables_mean_nothing():
    assert _flags({"TP": "", "HOME": "/root", "SHELL": "bash"}) == []


def test_words_are_split_like_a_shell_does():
    assert _flags({"DATA_PATH": "0.3 a '0.7 b'"}) == ["--data-path", "0.3", "a", "0.7 b"]


@pytest.mark.parametrize(
    ("environ", "flags"),
    [
        ({"ENGINE": "deepspeed"}, ["--deepspeed"]),
        ({"ENGINE": "native"}, []),
        ({"PRECISION": "bf16"}, ["--bf16"]),
        ({"SEQUENCE_PARALLEL": "1"}, ["--sequence-parallel"]),
        ({"SEQUENCE_PARALLEL": "0"}, []),
    ],
)
def test_closed_choices(environ, flags):
    assert _flags(environ) == flags


def test_output_folder_holds_everything_a_run_writes():
    flags = _flags({"OUTPUT_DIR": "out/"})
    assert flags[:4] == ["--save", "out/checkpoints", "--load", "out/checkpoints"]


def test_a_single_folder_can_differ_from_the_output_folder():
    flags = _flags({"OUTPUT_DIR": "out", "LOAD": "other"}, ["--tensorboard-dir", "tb"])
    assert flags == ["--save", "out/checkpoints", "--data-cache-path", "out/cache", "--load", "other"]


def test_all_bad_values_are_reported_together():
    with pytest.raises(ValueError, match="ENGINE=fast is none of native, deepspeed") as raised:
        _flags({"ENGINE": "fast", "SEQUENCE_PARALLEL": "maybe"})
    assert "SEQUENCE_PARALLEL=maybe is none of 1, 0" in str(raised.value)


@pytest.mark.parametrize(
    ("environ", "argv"),
    [
        ({"LR": "1"}, ["--lr", "2"]),
        ({"LR": "1"}, ["--lr=2"]),
        ({"PRECISION": "bf16"}, ["--fp16"]),
        ({"DATA_PATH": "a"}, ["--train-data-path", "b"]),
    ],
)
def test_command_line_overrides_the_variable(environ, argv):
    (reading,) = env.read(env.PLAIN, environ, argv)
    assert reading.overridden and reading.flags == ()


def test_two_variables_for_one_flag_must_agree():
    with pytest.raises(ValueError, match="NPROC=2 and NUM_GPUS=4 both decide --nproc-per-node"):
        _flags({"NPROC": "2", "NUM_GPUS": "4"})
    assert _flags({"NPROC": "2", "NUM_GPUS": "2"})
    assert _flags({"NPROC": "2", "NUM_GPUS": "4"}, ["--nproc-per-node", "8"]) == []


def test_unknown_name_of_a_prefixed_family_names_the_nearest():
    family = env.Family("HW_", (env.value("HW_MICRO_BATCH", "--micro-batch-size", "samples"),))
    with pytest.raises(ValueError, match="HW_MICRO_BACTH: no such setting; the nearest is HW_MICRO_BATCH"):
        env.read(family, {"HW_MICRO_BACTH": "1"}, [])
    assert env.read(family, {"MICRO_BACTH": "1"}, []) == ()


def test_no_row_of_the_plain_family_is_there_twice():
    rows = [(variable.name, variable.decides) for variable in env.PLAIN.variables]
    assert len(rows) == len(set(rows))
