from __future__ import annotations

import json
from typing import Any

import pytest

from megatron.config.deepspeed import merge, read_document
from megatron.config.parser import ConfigError
from megatron.config.run import RunConfig
from tests.config.commands import config


@pytest.fixture
def run_with(tmp_path):
    """A run with a DeepSpeed file of the given content."""

    def make(document: dict[str, Any], *words: str, **rest: Any) -> RunConfig:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(document))
        return config("--deepspeed", "--deepspeed_config", str(path), *words, **rest)

    return make


def test_without_a_file_everything_comes_from_the_flags():
    run = config("--deepspeed", "--bf16", "--zero-stage", "2", "--global-batch-size", "16", world_size=2)
    merged = merge({}, run)
    assert merged["train_batch_size"] == 16
    assert merged["train_micro_batch_size_per_gpu"] == 2
    assert merged["gradient_accumulation_steps"] == 4
    assert merged["gradient_clipping"] == 1.0
    assert merged["bf16"] == {"enabled": True}
    assert merged["fp16"] == {"enabled": False}
    assert merged["zero_optimization"]["stage"] == 2
    assert merged["data_types"] == {"grad_accum_dtype": "fp32"}
    assert merged["communication_data_type"] == "fp32"
    assert "offload_optimizer" not in merged["zero_optimization"]


def test_the_file_fills_what_no_flag_says(run_with):
    document = {
        "train_batch_size": 12,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.9], "eps": 1e-6}},
        "fp16": {"enabled": False, "loss_scale": 8},
    }
    run = run_with(document)
    assert run.training.global_batch_size == 12
    assert run.optimizer.clip_grad == 0.5
    assert run.precision.params_dtype == "bfloat16"
    assert run.parallel.zero_stage == 3
    assert run.optimizer.cpu_optimizer
    assert (run.optimizer.adam_beta1, run.optimizer.adam_beta2, run.optimizer.adam_eps) == (0.8, 0.9, 1e-6)
    assert run.precision.loss_scale is None
    merged = merge(run.deepspeed_document, run)
    assert merged["gradient_accumulation_steps"] == 6
    assert "optimizer" not in merged
    assert merged["zero_force_ds_cpu_optimizer"] is True


def test_equal_values_agree(run_with):
    document = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 12, "loss_scale_window": 500},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "steps_per_print": 10,
        "wall_clock_breakdown": False,
    }
    words = "--fp16 --initial-loss-scale 4096 --loss-scale-window 500 --weight-decay 0.1 --global-batch-size 8"
    run = run_with(document, *words.split(), world_size=2)
    merged = merge(run.deepspeed_document, run)
    assert merged["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 12,
        "loss_scale_window": 500,
        "hysteresis": 2,
        "min_loss_scale": 1.0,
    }
    assert merged["steps_per_print"] == 10
    assert merge(run.deepspeed_document, run) == merged, "merge changes its argument"


@pytest.mark.parametrize(
    ("document", "words", "expected"),
    [
        ({"train_batch_size": 4}, "--global-batch-size 8", "--global-batch-size 8 and train_batch_size = 4"),
        ({"train_micro_batch_size_per_gpu": 1}, "", "--micro-batch-size 2 and train_micro_batch_size_per_gpu = 1"),
        ({"gradient_clipping": 0.1}, "--clip-grad 1", "--clip-grad 1.0 and gradient_clipping = 0.1"),
        ({"bf16": {"enabled": False}}, "--bf16", "--bf16 and bf16.enabled = false"),
        ({"zero_optimization": {"stage": 2}}, "--zero-stage 1", "--zero-stage 1 and zero_optimization.stage = 2"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
            "--cpu-optimizer",
            '--cpu-optimizer and zero_optimization.offload_optimizer.device = "none"',
        ),
        (
            {"fp16": {"enabled": True, "loss_scale": 2}},
            "--fp16 --loss-scale 4",
            "--loss-scale 4.0 and fp16.loss_scale = 2",
        ),
        ({"optimizer": {"type": "SGD"}}, "--optimizer adam", '--optimizer adam and optimizer.type = "SGD"'),
        ({"optimizer": {"params": {"lr": 0.1}}}, "", "--lr 0.001 and optimizer.params.lr = 0.1"),
        (
            {"optimizer": {"params": {"betas": [0.5, 0.999]}}},
            "--adam-beta1 0.9",
            "--adam-beta1 0.9 and optimizer.params.betas.0 = 0.5",
        ),
        (
            {"gradient_accumulation_steps": 3},
            "--global-batch-size 8",
            "gradient_accumulation_steps = 3 in DeepSpeed's JSON: must be --global-batch-size 8 / (--micro",
        ),
    ],
)
def test_contradictions_name_both_places(run_with, document, words, expected):
    with pytest.raises(ConfigError) as caught:
        run_with(document, *words.split())
    assert [problem for problem in caught.value.problems if expected in problem], caught.value.problems


def test_gradients_are_sent_in_bfloat16_where_asked():
    run = config("--deepspeed", "--bf16", "--grad-reduce-in-bf16", world_size=2)
    assert not {"communication_data_type", "data_types"} & merge({}, run).keys()


def test_flags_for_other_memory_and_overlap():
    run = config(
        "--deepspeed", "--zero-stage", "3", "--cpu-optimizer", "--remote-device", "cpu", "--overlap-grad-reduce"
    )
    zero = merge({}, run)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu"}
    assert zero["overlap_comm"] is True
    assert merge({}, config("--deepspeed"))["zero_optimization"] == {"stage": 1}


def test_a_drive_stays_what_the_file_says(run_with):
    drive = {"device": "nvme", "nvme_path": "/drive"}
    run = run_with({"zero_optimization": {"stage": 3, "offload_optimizer": drive, "offload_param": drive}})
    assert run.optimizer.cpu_optimizer and run.deepspeed.remote_device == "nvme"
    zero = merge(run.deepspeed_document, run)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == drive


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (
            {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "x"}},
            "only with --zero-stage 3",
        ),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "give zero_optimization.offload_optimizer.nvme_path"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "give zero_optimization.offload_param.nvme_path"),
        (
            {"stage": 2, "offload_param": {"device": "cpu"}},
            "--remote-device cpu: only with --deepspeed",
        ),
    ],
)
def test_drives_that_cannot_be_used_are_refused(run_with, zero, expected):
    with pytest.raises(ConfigError) as caught:
        run_with({"zero_optimization": zero})
    (problem,) = caught.value.problems
    assert expected in problem


def test_activation_checkpointing_is_ours(run_with):
    run = run_with({"activation_checkpointing": {"cpu_checkpointing": True}}, "--recompute-granularity", "full")
    assert run.training.checkpoint_in_cpu
    with pytest.raises(ConfigError, match=r"activation_checkpointing\.partition_activations = true"):
        run_with({"activation_checkpointing": {"partition_activations": True}})


def test_auto_takes_the_value_of_the_setting(run_with):
    document = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "fp16": {"enabled": "auto", "loss_scale": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
        "optimizer": {"type": "auto", "params": {"lr": "auto", "betas": "auto"}},
        "steps_per_print": "auto",
    }
    run = run_with(document)
    merged = merge(run.deepspeed_document, run)
    assert merged["train_batch_size"] == 2
    assert merged["gradient_accumulation_steps"] == 1
    assert merged["fp16"]["enabled"] is False
    assert merged["zero_optimization"]["stage3_prefetch_bucket_size"] == 9 * 64 * 64 // 10
    assert "auto" not in json.dumps(merged)


def test_an_auto_that_no_setting_fills_is_refused(run_with):
    run = run_with({"aio": {"block_size": "auto"}})
    with pytest.raises(ValueError, match=r'aio.block_size = "auto" .*give a value'):
        merge(run.deepspeed_document, run)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"train_batch_size": "many"}, 'train_batch_size = "many" in DeepSpeed\'s JSON: must be a whole number'),
        ({"bf16": {"enabled": 1}}, "bf16.enabled = 1 in DeepSpeed's JSON: must be true or false"),
        ({"optimizer": {"type": "Lamb"}}, "must be one of adam, adamw, fusedadamw, fusedadam, sgd"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler in DeepSpeed's JSON: the learning rate follows --lr"),
        ({"amp": {"enabled": True}}, "amp in DeepSpeed's JSON: use --fp16 or --bf16"),
        (
            {"zero_optimization": {"stage": 4}},
            "zero_optimization.stage = 4 in DeepSpeed's JSON: must be one of 0, 1, 2, 3",
        ),
    ],
)
def test_values_that_cannot_be(run_with, document, expected):
    with pytest.raises(ConfigError) as caught:
        run_with(document)
    assert [problem for problem in caught.value.problems if expected in problem], caught.value.problems


def test_a_section_that_is_off_is_no_section(run_with):
    assert run_with({"amp": {"enabled": False}, "curriculum_learning": {"enabled": False}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ('{"a": 1, "a": 2}', "a occurs twice"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, expected):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        read_document(str(path))


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"--deepspeed_config .*: No such file"):
        config("--deepspeed", "--deepspeed_config", str(tmp_path / "none.json"))
