"""From a command line to the settings of any layout."""

from __future__ import annotations

import pytest

from megatron.accelerators import DEVICES, load
from megatron.config.parser import ConfigError
from megatron.ops import implementations
from megatron.planner.case import ATTENTION_KERNELS, case_of
from megatron.planner.machines import MACHINES
from megatron.planner.plan import make_plan
from megatron.planner.request import read_request, resolve


def _case(flags, world=8):
    request = read_request(flags.split(), world)
    resolved = resolve(request)
    assert resolved.impossible == ()
    return case_of(resolved.settings, request.vocab_size, MACHINES["h100"])


def test_a_preset_is_enough():
    request = read_request(["--preset", "llama2-7b"], 8)
    assert request.assumed == (
        *("--seq-length", "4096", "--global-batch-size", "1024"),
        *("--micro-batch-size", "1"),
    )
    assert request.vocab_size == 32000


def test_experts_reach_the_case():
    flags = "--preset mixtral-8x7b --bf16 --expert-model-parallel-size 4 --tensor-model-parallel-size 2 --zero-stage 1"
    flags += " --seq-length 1024 --moe-expert-capacity-factor 1.25"
    found = _case(flags, 32)
    assert (found.ep, found.dp, found.shards, found.shards_of(experts=True)) == (4, 16, 16, 4)
    assert found.expert_rows == 1024 * 2  # a capacity above an equal share does not fill up
    padded = _case(f"{flags} --moe-pad-expert-input-to-capacity", 32)
    assert padded.expert_rows == 1024 * 2 * 1.25


def test_bins_that_cannot_be_are_a_reason():
    flags = "--preset mixtral-small --moe-num-capacity-bins 9 --moe-capacity-bins-alignment 4096"
    (reason,) = make_plan(read_request(flags.split(), 8), MACHINES["h100"]).reasons
    assert reason.startswith("--moe-num-capacity-bins 9")


def test_long_positions_do_not_mean_long_sequences():
    assert _case("--preset llama3.1-8b").seq_length == 8192


def test_files_of_the_real_run_need_not_exist():
    found = _case(
        "--preset llama2-7b --data-path no/such_text_document --tokenizer-type HFTokenizer --tokenizer-model no/such "
        "--save no/such --save-interval 5 --load no/such --tensorboard-dir no/such --bf16"
    )
    assert found.itemsize == 2


def test_layout_reaches_the_case():
    found = _case(
        "--preset llama2-7b --bf16 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
        "--use-distributed-optimizer --num-layers-per-virtual-pipeline-stage 4 --micro-batch-size 2 "
        "--global-batch-size 64 --recompute-granularity full --recompute-method block --recompute-num-layers 3 "
        "--grad-reduce-in-bf16 --use-torch-compile --optimizer sgd"
    )
    assert (found.tp, found.pp, found.dp, found.sequence_parallel) == (2, 2, 2, True)
    assert (found.stages.chunks, found.schedule, found.stages.layers) == (4, "interleaved", (4,) * 8)
    assert (found.engine, found.zero_stage, found.shards) == ("native", 1, 2)
    assert (found.micro_batch, found.microbatches, found.grad_itemsize, found.moments) == (2, 16, 2, 1)
    assert (found.recompute.method, found.recompute.num_layers, found.compiled) == ("block", 3, True)


def test_zero_bubble_v_is_laid_out_there_and_back():
    found = _case("--preset llama2-7b --pipeline-model-parallel-size 4 --pipeline-schedule zbv")
    assert (found.stages.placement, found.stages.chunks) == ("vee", 2)


def test_deepspeed_has_its_own_default_stage():
    found = _case("--preset llama2-7b --bf16 --deepspeed")
    assert (found.engine, found.zero_stage, found.shards) == ("deepspeed", 1, 8)


def test_buckets_of_deepspeeds_file(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}')
    request = read_request(f"--preset llama2-7b --deepspeed --deepspeed_config {tmp_path}/ds.json".split(), 8)
    plan = make_plan(request, MACHINES["h100"])
    assert (plan.case.zero_stage, plan.case.bucket) == (2, 1000)


def test_without_flags_the_native_engine_shards_nothing():
    assert _case("--preset llama2-7b --bf16").shards == 1


@pytest.mark.parametrize(
    ("name", "more", "kernel"),
    [
        ("gaudi2", "", "weights"),
        ("gaudi2", "--op attention=fused_sdpa_recompute", "fused"),
        ("ascend910b", "", "fused"),
        ("trn1", "--op attention=sdpa", "weights"),
    ],
)
def test_attention_kernel_of_a_machine(name, more, kernel):
    plan = make_plan(read_request(f"--preset llama2-7b {more}".split(), 8), MACHINES[name])
    assert plan.case.kernels.attention == kernel


def test_names_of_attention_kernels_are_those_of_the_devices():
    devices = [load(name) for name in DEVICES]
    known = {found.name for device in devices for found in implementations(device, "attention")}
    assert known == set(ATTENTION_KERNELS) - {"compiled_sdpa"}


@pytest.mark.parametrize(
    ("flags", "kernel"),
    [
        ("--preset llama2-7b", "fused"),
        ("--preset bloom-7b1", "masked"),
        ("--preset bloom-7b1 --use-flash-attn", "fused"),
        ("--preset mistral-7b", "masked"),
        ("--preset llama2-7b --reset-attention-mask", "masked"),
        ("--preset llama2-7b --op attention=reference", "reference"),
        ("--preset llama2-7b --op attention=blocked", "blocked"),
        ("--preset llama2-7b --attention-backend unfused", "reference"),
    ],
)
def test_attention_kernel(flags, kernel):
    assert _case(flags).kernels.attention == kernel


def test_an_assumed_batch_is_made_to_fit_the_layout():
    request = read_request(["--preset", "llama2-7b"], 24)
    assert resolve(request).settings["global_batch_size"] == 1032  # the next multiple of 24


def test_a_given_batch_is_not():
    request = read_request(["--preset", "llama2-7b", "--global-batch-size", "1024"], 24)
    (problem,) = resolve(request).impossible
    assert problem.startswith("--global-batch-size 1024: must be a multiple of 24")


def test_kv_heads_fewer_than_ranks_are_possible():
    flags = ["--preset", "llama3.1-70b", "--tensor-model-parallel-size", "32"]
    resolved = resolve(read_request(flags, 32))
    assert resolved.impossible == resolved.missing == ()


def test_kv_heads_that_do_not_divide_are_impossible():
    flags = ["--preset", "llama3.1-70b", "--tensor-model-parallel-size", "12"]
    assert any("--num-key-value-heads" in problem for problem in resolve(read_request(flags, 12)).impossible)


def test_changes_win():
    request = read_request(["--preset", "llama2-7b", "--recompute-granularity", "full"], 8)
    settings = resolve(request, {"tensor_model_parallel_size": 4, "recompute_granularity": None}).settings
    assert (settings["tensor_model_parallel_size"], settings["data_parallel_size"]) == (4, 2)
    assert settings["recompute_granularity"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--preset llama9", "no such preset"),
        ("--num-layers 4", "--hidden-size is missing"),
        ("--preset llama2-7b --tensor-parallel 4", "no such flag"),
        ("--preset llama2-7b --bf16 --fp16", "--fp16 and --bf16"),
    ],
)
def test_what_has_nothing_to_do_with_the_layout_is_refused(flags, words):
    with pytest.raises(ConfigError, match=words):
        read_request(flags.split(), 8)
