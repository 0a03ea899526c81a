"""The variables of AscendSpeed's scripts."""

from __future__ import annotations

import pytest

from tests.launch.recorded import START, Launch, launch_of

_FOUR = {"MASTER_ADDR": "n1", "NODE_RANK": "0"}


def _flags(**variables) -> list[str]:
    environ = {**START, "DEVICE": "npu", "NPUS_PER_NODE": "8", **variables}
    return list(Launch(("--family", "ascend"), environ).plan().flags)


def test_names_of_the_readme():
    flags = " ".join(_flags(DATA="d", TOKENIZER_PATH="t", CHECKPOINT="c", MBS="2", GBS="16", SAVE="s"))
    assert "--data-path d --tokenizer-model t --load c --exit-on-missing-checkpoint" in flags
    assert "--micro-batch-size 2 --global-batch-size 16" in flags


def test_a_run_without_weights_resumes_from_what_it_saved():
    assert " ".join(_flags(SAVE="s")).endswith("--save s --load s")
    assert "--load s" not in " ".join(_flags(SAVE="s", CHECKPOINT="c"))


def test_loss_scale_is_for_float16_only():
    assert "--initial-loss-scale" in _flags(PRECISION="fp16", INITIAL_LOSS_SCALE="4096")
    assert "--initial-loss-scale" not in _flags(PRECISION="bf16", INITIAL_LOSS_SCALE="4096")


def test_slip_in_an_old_readme_is_named():
    with pytest.raises(ValueError, match=r"HEEL_CONNECT_TIMEOUT=1200 is a slip .* HCCL_CONNECT_TIMEOUT"):
        _flags(HEEL_CONNECT_TIMEOUT="1200")


def test_four_machines_need_the_first_ones_address(tmp_path):
    code, _, err = launch_of("npu/pretrain_llama_65B_ptd_32p.sh", tmp_path, NODE_RANK="1").dry_run()
    assert code == 2 and "MASTER_ADDR" in err


def test_user_settings_win_over_those_of_the_script(tmp_path):
    settings = {"PRECISION": "bf16", "GBS": "64", "SAVE_INTERVAL": "5", "HCCL_CONNECT_TIMEOUT": "60", **_FOUR}
    launch = launch_of("npu/pretrain_llama_33B_ptd_32p.sh", tmp_path, "--lr", "1", **settings)
    flags = " ".join(launch.plan().flags)
    assert "--bf16" in flags and "--fp16" not in flags and "--global-batch-size 64" in flags
    assert "--save-interval 5" in flags and flags.endswith("--lr 1") and flags.count("--lr ") == 1
    assert launch.environ["HCCL_CONNECT_TIMEOUT"] == "60"
