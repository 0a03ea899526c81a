"""Every name of Intel's Gaudi scripts is obeyed or refused with the reason, whatever its value."""

from __future__ import annotations

import random
import re

import pytest

from megatron.launch import hpu, hpu_models, hpu_rows
from megatron.launch.__main__ import resolve
from megatron.launch.families import FAMILIES
from tests.launch.recorded import START, Launch

# All that occur in run_llama.sh of release 1.19.0.
NAMES = re.findall(
    r"\w+",
    """
HL_BATCH_SCHED_SAMPLES HL_CHECKPOINTS_DIR HL_CHECK_TP_NORM HL_CHECK_TP_NORM_TYPE HL_CKP_ACT
HL_COMPILED_AUTOGRAD_FALLBACK_MODE HL_DATA_CACHE_DIR HL_DATA_DIR_ROOT HL_DATA_FILE_PREFIX HL_DEVICES_PER_NODE HL_DP
HL_DROPOUT HL_END_CHECK_TP_NORM_ITER HL_EVAL_INTERVAL HL_EVAL_ITERS HL_EXIT_INTERVAL HL_FP8_AMAX_HISTORY_LEN
HL_FP8_AMAX_RECOMPUTE_ALGO HL_FP8_AMAX_REDUCE HL_FP8_FORMAT HL_FP8_MANUAL_MODE HL_FP8_MARGIN HL_FP8_MEASURE_INTERVAL
HL_GBS HL_GRAD_ACCUM_DTYPE HL_HOSTSFILE HL_IMMEDIATE_GRAD_UPDATE HL_KILL_SWITCH HL_LATEST_CHECKPOINT
HL_LLAMA_MODEL_SIZE HL_LLAMA_VER HL_LOG_INTERVAL HL_MICRO_BATCH HL_NO_PIPELINE_PARALLEL HL_NUM_LAYERS HL_NUM_NODES
HL_OPTIMIZER HL_POSITION_EMBEDDING_TYPE HL_PP HL_PROFILE HL_PROFILE_STEPS HL_QNPU_DIR HL_RESULTS_DIR
HL_RESULTS_DIR_PREFIX HL_SAVE HL_SAVE_INTERVAL HL_SCHEDULER_BATCH_SIZE HL_SEQ_LEN HL_SEQ_PARALLEL
HL_START_CHECK_TP_NORM_ITER HL_STOP_AFTER_NUM_SAMPLES HL_TENSORBOARD_DIR HL_TENSOR_LOGGER HL_TENSOR_LOGGER_DIR
HL_TENSOR_LOGGER_END_ITER HL_TENSOR_LOGGER_START_ITER HL_TOKENIZER_MODEL HL_TOKENIZER_TYPE HL_TP HL_TRAIN_ITERS
HL_TRUST_REMOTE_CODE HL_UNIV_CP HL_USE_CACHE_FP8_WEIGHT HL_USE_CACHE_FP8_WEIGHT_FWD HL_USE_FAST_SOFTMAX
HL_USE_FUSED_RMSNORM HL_USE_FUSED_SDPA HL_USE_FUSED_SDPA_WITH_RECOMPUTE HL_USE_LAZY_MODE HL_USE_TORCH_COMPILE
HL_USE_TORCH_COMPILED_AUTOGRAD HL_USE_TRANSFORMER_ENGINE HL_ZERO_STAGE
""",
)
_OLDER = {"HL_DATASET_NAME", "HL_TORCH_COMPILE_BACKEND"}
_OURS = {"HL_SCHEDULER_SEQ_LEN"}
_WORDS = ("0", "1", "2", "3", "4", "8", "16", "64", "-1", "true", "false", "abc", "2.5", "x/y", "3,4")
_USUAL = {
    "HL_CKP_ACT": ["0", "1", "2", "3", "4"],
    "HL_DP": ["1", "2", "4"],
    "HL_DROPOUT": ["0.0", "0.1"],
    "HL_GBS": ["64", "1024"],
    "HL_GRAD_ACCUM_DTYPE": ["fp32", "bf16"],
    "HL_HOSTSFILE": ["examples/hpu/hostsfile"],
    "HL_IMMEDIATE_GRAD_UPDATE": ["true", "false"],
    "HL_LLAMA_MODEL_SIZE": ["7", "13", "70"],
    "HL_LLAMA_VER": ["1", "2", "3.1"],
    "HL_MICRO_BATCH": ["1", "2"],
    "HL_NUM_LAYERS": ["8", "16"],
    "HL_NUM_NODES": ["1", "2"],
    "HL_OPTIMIZER": ["adam", "adamw", "fusedadamw"],
    "HL_POSITION_EMBEDDING_TYPE": ["rotary", "alibi"],
    "HL_PP": ["1", "2", "4"],
    "HL_PROFILE": ["pt", "pt-full"],
    "HL_SEQ_LEN": ["512", "4096", "16384"],
    "HL_TOKENIZER_MODEL": ["/models/tokenizer.model"],
    "HL_TP": ["1", "2", "4", "8"],
    "HL_USE_FUSED_RMSNORM": ["0", "1"],
    "HL_USE_FUSED_SDPA": ["0", "1"],
    "HL_USE_LAZY_MODE": ["0", "1"],
    "HL_USE_TORCH_COMPILE": ["0", "1"],
    "HL_ZERO_STAGE": ["0", "1", "2"],
}
_OFF = {
    "HL_CHECK_TP_NORM_TYPE": "all",
    "HL_COMPILED_AUTOGRAD_FALLBACK_MODE": "nothing",
    "HL_END_CHECK_TP_NORM_ITER": "-1",
    "HL_FP8_MANUAL_MODE": "1",
    "HL_START_CHECK_TP_NORM_ITER": "-1",
}
_FP8 = {"HL_USE_TRANSFORMER_ENGINE": "1"}
_FUZZ = 200
_ENOUGH = 30
"""Launches of the fuzz that must work, and that must be refused, lest it tests one side only."""


def _launch(family="gaudi-llama", argv=(), **variables) -> Launch:
    environ = {**START, "DEVICE": "hpu", "PRECISION": "bf16", **variables}
    return Launch(("--family", family, *argv), environ)


def _flags(**variables) -> str:
    return " ".join(_launch(**variables).plan().flags)


def _refusal(family="gaudi-llama", argv=(), **variables) -> str:
    code, out, err = _launch(family, argv, **variables).dry_run()
    assert (code, out) == (2, "") and err.startswith("error: ")
    return err


def test_all_73_names_have_a_row():
    assert len(set(NAMES)) == 73
    rows = {row.name for row in hpu.LLAMA.variables if row.name.startswith("HL_")}
    assert rows == {*NAMES, *_OLDER, *_OURS}


def test_misspelt_name_is_refused_naming_the_right_one():
    assert _refusal(HL_MICRO_BACTH="1") == "error: HL_MICRO_BACTH: no such setting; the nearest is HL_MICRO_BATCH\n"


def test_names_of_another_script_are_refused():
    assert "HL_MOE_EP: no such setting" in _refusal(HL_MOE_EP="8")


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({"HL_CKP_ACT": "1"}, "--recompute-granularity full --recompute-method uniform"),
        ({"HL_CKP_ACT": "2"}, "--recompute-granularity selective"),
        ({"HL_CKP_ACT": "3"}, "--recompute-granularity mlp"),
        ({"HL_GRAD_ACCUM_DTYPE": "bf16"}, "--grad-reduce-in-bf16"),
        ({"HL_USE_FUSED_SDPA": "1"}, "--use-fused-sdpa true"),
        ({"HL_USE_FUSED_RMSNORM": "0"}, "--use-fused-rmsnorm false"),
        ({"HL_OPTIMIZER": "fusedadamw"}, "--optimizer fusedadamw"),
        ({"HL_POSITION_EMBEDDING_TYPE": "alibi"}, "--position-embedding-type alibi"),
        ({"HL_DROPOUT": "0.1"}, "--attention-dropout 0.1 --hidden-dropout 0.1"),
        ({"HL_DATA_DIR_ROOT": "/d/", "HL_DATA_FILE_PREFIX": "oscar"}, "--data-path /d/oscar"),
        ({"HL_DATA_DIR_ROOT": "/d/"}, "--tokenizer-model /d/tokenizer.model"),
        ({"HL_TOKENIZER_TYPE": "GPT2BPETokenizer"}, "--vocab-file /data/datasets/red_pajama/gpt2-vocab.json"),
        ({"HL_TOKENIZER_TYPE": "HFTokenizer", "HL_TOKENIZER_MODEL": "t"}, "--tokenizer-model t"),
        ({"HL_EXIT_INTERVAL": "5"}, "--exit-interval 5"),
        ({"HL_KILL_SWITCH": "stop"}, "--kill-switch-file stop"),
        ({"HL_CHECKPOINTS_DIR": "c"}, "--save c --save-interval 2000 --load c"),
        ({"HL_SEQ_LEN": "4096"}, "--seq-length 4096 --max-position-embeddings 4096"),
        ({"HL_PROFILE": "pt", "HL_PROFILE_STEPS": "3,4"}, "--profile pt --profile-steps 3,4"),
        ({"HL_PROFILE": "hltv"}, "--profile hltv"),
        ({"HL_USE_FUSED_SDPA": "1", "HL_USE_FAST_SOFTMAX": "1"}, "--use-fused-sdpa true --use-fast-softmax"),
        ({"HL_USE_FUSED_SDPA_WITH_RECOMPUTE": "1"}, "--use-fused-sdpa-with-recompute true"),
        (
            {"HL_USE_FUSED_SDPA_WITH_RECOMPUTE": "1", "HL_USE_FAST_SOFTMAX": "1"},
            "--use-fused-sdpa-with-recompute true --use-fast-softmax",
        ),
        ({**_FP8, "HL_FP8_MEASURE_INTERVAL": "10"}, "--fp8-interval 1"),
        ({**_FP8, "HL_FP8_MEASURE_INTERVAL": "3072"}, "--fp8-interval 3"),
        ({**_FP8, "HL_FP8_AMAX_REDUCE": "0"}, "--no-fp8-amax-reduce"),
        (
            {**_FP8, "HL_USE_CACHE_FP8_WEIGHT": "1", "HL_USE_CACHE_FP8_WEIGHT_FWD": "1"},
            "--cache-fp8-weight --cache-fp8-weight-fwd true",
        ),
        (
            {"HL_TENSOR_LOGGER": "1", "HL_TENSOR_LOGGER_END_ITER": "2", "HL_RESULTS_DIR": "r"},
            "--log-model-inputs --log-fwd-activations --log-bwd-grads --tensor-logger-path r/tensordumps "
            "--tensor-logger-end-iter 2",
        ),
        (
            {"HL_CHECK_TP_NORM": "1", "HL_CHECK_TP_NORM_TYPE": "wb", "HL_END_CHECK_TP_NORM_ITER": "9"},
            "--check-tp-norm --check-tp-norm-type wb --end-check-tp-norm-iter 9",
        ),
        ({"HL_USE_TORCH_COMPILE": "1"}, "--use-torch-compile true"),
        ({"HL_LLAMA_VER": "3.1", "HL_LLAMA_MODEL_SIZE": "405"}, "--preset llama3.1-405b --lr 8e-5 --min-lr 8e-7"),
    ],
)
def test_variables_become_flags_that_the_trainer_takes(variables, flags):
    launch = _launch(**variables)
    plan = launch.plan()
    assert f" {flags} " in f" {' '.join(plan.flags)} "
    resolve(plan, launch.environ)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"HL_EXIT_INTERVAL": "0"}, "--exit-interval"),
        ({"HL_SAVE": "0"}, "--save "),
        ({"HL_SEQ_PARALLEL": "0"}, "--sequence-parallel"),
        ({"HL_CKP_ACT": "0"}, "--recompute"),
        ({"HL_SEQ_LEN": "1024"}, "--max-position-embeddings"),
    ],
)
def test_what_is_off_leaves_no_flag(variables, words):
    assert words not in _flags(**variables)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HL_CKP_ACT": "5"}, "HL_CKP_ACT=5 is none of 0, 1, 2, 3, 4"),
        ({"HL_LLAMA_VER": "4"}, "HL_LLAMA_VER=4 is none of 1, 2, 3.1"),
        ({"HL_LLAMA_MODEL_SIZE": "8"}, "HL_LLAMA_MODEL_SIZE=8 is none of 7, 13, 65, the sizes of HL_LLAMA_VER=1"),
        ({"HL_TP": "3"}, r"HL_TP=3 x HL_PP=2 = 6 devices .* do not divide 8"),
        ({"HL_TP": "x"}, "HL_TP=x must be a whole number of at least 1"),
        ({"HL_DP": "16"}, "HL_DP=16 needs 64 devices .* there are 8"),
        ({"HL_DP": "1", "HL_DEVICES_PER_NODE": "8"}, "DP=1 needs 4 processes"),
        ({"HL_NUM_NODES": "4"}, "pass --hostfile"),
        ({"HL_NUM_NODES": "2", "HL_HOSTSFILE": "nowhere", "HL_DP": "4"}, "nowhere: No such file"),
        ({"HL_PP": "4", "HL_LLAMA_VER": "3.1", "HL_LLAMA_MODEL_SIZE": "405"}, "--num-layers 126: "),
        ({"HL_NO_PIPELINE_PARALLEL": "1"}, "must be 1 with --no-pipeline-parallel"),
        ({"HL_TOKENIZER_TYPE": "HFTokenizer"}, "HFTokenizer: give --tokenizer-model"),
        ({"HL_TOKENIZER_TYPE": "GPT2BPETokenizer", "HL_TOKENIZER_MODEL": "t"}, "HL_TOKENIZER_MODEL=t is of no use"),
        ({"HL_USE_LAZY_MODE": "1", "HL_USE_TORCH_COMPILE": "1"}, "HL_USE_LAZY_MODE=1 and HL_USE_TORCH_COMPILE=1 ex"),
        ({"HL_PROFILE_STEPS": "3,4"}, "HL_PROFILE_STEPS=3,4 says nothing without HL_PROFILE"),
        ({"HL_FP8_MARGIN": "1"}, "HL_FP8_MARGIN=1 says nothing without HL_USE_TRANSFORMER_ENGINE=1"),
        ({"HL_TENSOR_LOGGER": "1"}, "give --tensor-logger-end-iter, the last iteration that is written"),
        ({"HL_TENSOR_LOGGER_END_ITER": "3"}, "HL_TENSOR_LOGGER_END_ITER=3 says nothing without HL_TENSOR_LOGGER=1"),
        ({"HL_CHECK_TP_NORM_TYPE": "io"}, "HL_CHECK_TP_NORM_TYPE=io says nothing without HL_CHECK_TP_NORM=1"),
        ({"HL_CHECK_TP_NORM": "1"}, "--check-tp-norm-type all: must be wb"),
        ({"HL_USE_FAST_SOFTMAX": "1", "HL_USE_FUSED_SDPA": "0"}, "--use-fast-softmax: only with --use-fused-sdpa true"),
        ({"HL_USE_CACHE_FP8_WEIGHT": "1"}, "WEIGHT=1 says nothing without HL_USE_TRANSFORMER_ENGINE=1"),
        ({**_FP8, "HL_FP8_MEASURE_INTERVAL": "1500"}, "must be a multiple of 1024, the forward passes of a step"),
        ({"HL_SCHEDULER_BATCH_SIZE": "8 16"}, "--scheduler-batch-size and --batch-sched-samples: give both"),
        ({"HL_QNPU_DIR": "/q"}, "activate that environment"),
        ({"HL_DATASET_NAME": "oscar"}, "HL_DATA_FILE_PREFIX"),
        ({"HL_LLAMA_MODEL_SIZE": "7", "PRESET": "llama-tiny"}, "both decide --preset"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(variables, message):
    assert re.search(message, _refusal(**variables))


def test_eight_bit_linears():
    launch = _launch(HL_USE_TRANSFORMER_ENGINE="1")
    flags = " ".join(launch.plan().flags)
    assert "--transformer-impl transformer_engine --fp8-hybrid --fp8-margin 0 --fp8-amax-compute-algo max" in flags
    assert "--fp8-interval 1 --fp8-amax-history-len 1024" in flags, "one measurement a step"
    precision = resolve(launch.plan(), launch.environ).precision
    assert precision.fp8_format == "hybrid" and precision.fp8_amax_reduce


def test_lazy_mode_reaches_the_processes():
    exports = {one.name: one.value for one in _launch(HL_USE_LAZY_MODE="1").plan().exports}
    assert exports["PT_HPU_LAZY_MODE"] == "1"
    assert "--export PT_HPU_LAZY_MODE=1: PT_HPU_LAZY_MODE is 0" in _refusal(HL_USE_LAZY_MODE="1", PT_HPU_LAZY_MODE="0")


def test_the_vendors_profiler_is_announced_to_the_processes():
    exports = {one.name: one.value for one in _launch(HL_PROFILE="hltv").plan().exports}
    assert exports["HABANA_PROFILE"] == "profile_api_with_nics"
    assert "HABANA_PROFILE" not in {one.name for one in _launch(HL_PROFILE="pt").plan().exports}


def test_variables_of_the_device_reach_other_nodes():
    nodes = {"HL_NUM_NODES": "8", "HL_HOSTSFILE": "examples/hpu/hostsfile", "HL_DP": "16"}
    command = _launch(HABANA_LOGS="/logs", UNRELATED="1", **nodes).plan().command
    assert "HABANA_LOGS=/logs" in command and "UNRELATED=1" not in command


def test_command_line_wins_over_variables_and_defaults():
    launch = _launch(argv=("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "99"), HL_GBS="64")
    plan = launch.plan("--global-batch-size", "8", "--preset", "llama-tiny", "--seq-length", "64")
    run = resolve(plan, launch.environ)
    assert run.training.global_batch_size == 8 and run.data.mock_data and run.model.hidden_size == 64


def test_every_model_of_the_table_resolves():
    for version, size in hpu_models.LLAMA:
        recipe = hpu_models.LLAMA[version, size]
        launch = _launch(HL_LLAMA_VER=version, HL_LLAMA_MODEL_SIZE=size)
        run = resolve(launch.plan(), launch.environ)
        assert run.model.preset == recipe.preset and run.optimizer.lr == float(recipe.lr)


def test_bloom_grows_its_batch_and_can_do_without():
    launch = _launch("gaudi-bloom", ("--global-batch-size", "1024"))
    assert "--rampup-batch-size 16 16 5000000" in " ".join(launch.plan().flags)
    assert "--rampup" not in " ".join(_launch("gaudi-bloom", HL_RAMPUP_BS="0").plan().flags)


def test_mixtral_with_tensor_parallel_experts_says_so():
    assert "HL_MOE_NUM_EXPERTS=8 with HL_TP=2 needs HL_MOE_ENABLE_EXPERT_TP=1" in _refusal("gaudi-mixtral", HL_TP="2")


def test_mixtral_has_bins_of_its_own_and_no_fitted_ones():
    rate = ("--lr", "3e-4")  # which the script gives
    bins = {"HL_MOE_NUM_CAPACITY_BINS": "3", "HL_MOE_CAPACITY_BINS": "4,9,9 8,100,200,300"}
    launch = _launch("gaudi-mixtral", rate, **bins)
    run = resolve(launch.plan(), launch.environ)
    assert (run.moe.moe_num_capacity_bins, run.moe.moe_capacity_bins) == (3, ("4,9,9", "8,100,200,300"))
    assert (run.moe.moe_capacity_bins_exp_base, run.moe.moe_capacity_bins_alignment) == (1.5, 64)
    assert (run.model.preset, run.moe.num_experts, run.moe.moe_expert_parallel_size) == ("mixtral-8x7b", (8,), 8)
    fitted = {"HL_MOE_NUM_CAPACITY_BINS": "3", "HL_MOE_CAPACITY_BINS_OPTIMIZE_INTERVAL": "300"}
    assert "the capacity bins of a run stay as they are" in _refusal("gaudi-mixtral", rate, **fitted)


def test_no_row_is_dropped_by_the_shared_tables():
    shared = {row.name for row in (*hpu_rows.LAYOUT, *hpu_rows.OUTPUT)}
    for family in ("gaudi-llama", "gaudi-bloom", "gaudi-mixtral"):
        names = {row.name for row in FAMILIES[family].variables}
        assert shared - names <= {"HL_UNIV_CP"}


def _random_settings(seed: int) -> dict[str, str]:
    """A few variables with values that are often, but not always, possible."""
    draw = random.Random(seed)
    settings = {}
    for name in draw.sample(NAMES, draw.randint(1, 8)):
        usual = _USUAL.get(name, hpu.llama_defaults({}).get(name, _OFF.get(name, "0")).split())
        settings[name] = draw.choice(_WORDS) if draw.random() < 0.1 else draw.choice(usual)
    if draw.random() < 0.05:
        settings[draw.choice(NAMES) + "S"] = "1"
    return settings


def test_random_settings_give_a_launch_that_parses_or_one_clear_error():
    outcomes = {0: 0, 2: 0}
    for seed in range(_FUZZ):
        settings = _random_settings(seed)
        launch = _launch(**settings)
        code, out, err = launch.dry_run()
        outcomes[code] += 1
        if code == 0:
            assert err == "" and "== command" in out, settings
            resolve(launch.plan(), launch.environ)
        else:
            assert out == "" and err.startswith("error: ") and "Traceback" not in err, settings
            for sentence in err.removeprefix("error: ").splitlines():
                assert re.search(r"HL_|--|DP=|processes|nodes", sentence), (settings, sentence)
    assert min(outcomes.values()) >= _ENOUGH, outcomes
