from __future__ import annotations

import subprocess
import sys

import pytest

from megatron.config.parser import ConfigError, build_parser, nearest, read, spellings


def test_space_and_equals_mean_the_same():
    assert read(["--num-layers", "2"]) == read(["--num-layers=2"]) == ({"num_layers": 2}, [])


def test_the_last_of_two_wins():
    assert read(["--num-layers=2", "--num-layers=3"])[0] == {"num_layers": 3}


def test_only_what_is_given_is_returned():
    assert read([]) == ({}, [])
    assert read(["--lr", "0.1", "--no-save-optim"])[0] == {"lr": 0.1, "no_save_optim": True}


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["--num-query-groups", "2"], {"num_key_value_heads": 2}),
        (["--norm-epsilon", "1e-6"], {"layernorm_epsilon": 1e-6}),
        (["--rotary-base", "500000"], {"rope_theta": 500000}),
        (["--override-opt-param-scheduler"], {"override_opt_param_scheduler": True}),
        (["--override-opt_param-scheduler"], {"override_opt_param_scheduler": True}),
        (["--persistent-save-interval", "5"], {"save_interval": 5}),
        (["--expert-model-parallel-size", "1"], {"moe_expert_parallel_size": 1}),
        (["--deepspeed-config", "x.json"], {"deepspeed_config": "x.json"}),
        (["--profile-steps", "3,4"], {"profile_steps": "3,4"}),
        (["--local_rank=3"], {"local_rank": 3}),
        (["--tokenizer-name-or-path", "x"], {"tokenizer_model": "x"}),
        (["--normalization", "RMSNorm"], {"normalization": "rmsnorm"}),
        (["--position-embedding-type", "rotary"], {"position_embedding_type": "rope"}),
        (["--apply-query-key-layer-scaling"], {"apply_query_key_layer_scaling": True}),
        (["--use-fused-rmsnorm"], {"use_fused_rmsnorm": True}),
        (["--use-fused-rmsnorm", "0"], {"use_fused_rmsnorm": False}),
        (["--use-torch-compile=true"], {"use_torch_compile": True}),
        (["--onnx-safe", "False"], {"onnx_safe": False}),
        (["--eval-iters", "-1"], {"eval_iters": -1}),
        (["--op", "a=b", "--op", "c=d", "e=f"], {"op": ("a=b", "c=d", "e=f")}),
        (["--data-path", "0.3", "a", "0.7", "b"], {"data_path": ("0.3", "a", "0.7", "b")}),
        (["--rampup-batch-size", "16", "16", "5_000_000"], {"rampup_batch_size": ("16", "16", "5_000_000")}),
    ],
)
def test_spellings(words, settings):
    assert read(words) == (settings, [])


def test_flags_are_not_shortened():
    _, problems = read(["--num-layer", "2"])
    assert problems == ["--num-layer: no such flag; the nearest is --num-layers"]


def test_unknown_words_are_all_reported():
    settings, problems = read(["stray", "--hiden_size", "3", "--xyzzy-plugh=4", "--lr", "0.1"])
    assert settings == {"lr": 0.1}
    assert problems == [
        "stray: not a flag, and no flag before it takes it",
        "--hiden_size: no such flag; the nearest is --hidden-size",
        "--xyzzy-plugh: no such flag",
    ]


def test_wrong_values_are_all_reported():
    _, problems = read(["--num-layers", "two", "--lr-decay-style", "steep", "--profile-ranks", "0", "x"])
    assert sorted(problems) == [
        "--lr-decay-style steep: must be one of constant, linear, cosine, inverse-square-root, WSD",
        "--num-layers two: must be a whole number",
        "--profile-ranks x: must be a whole number",
    ]


def test_a_flag_without_its_value_is_an_error_and_not_an_exit():
    with pytest.raises(ConfigError, match=r"--num-layers.*expected one argument"):
        read(["--num-layers"])


def test_nearest_ignores_dashes_and_underscores():
    assert nearest("--opt-param-scheduler") == "--override-opt-param-scheduler"
    assert nearest("-num_layers") == "--num-layers"


def test_help_shows_sections_and_hides_old_options():
    text = build_parser().format_help()
    assert "--num-layers N" in text
    assert "--img-h" not in text


def test_torchrun_lets_every_flag_through():
    """torchrun refuses a word of the script's command line that could be short for two of its own options."""
    from torch.distributed.run import get_args_parser

    launcher = get_args_parser()
    for flag in spellings():
        parsed = launcher.parse_args(["pretrain_gpt.py", flag, "1"])
        assert parsed.training_script_args == [flag, "1"], flag


def test_the_launcher_guard_can_fail():
    from torch.distributed.run import get_args_parser

    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["pretrain_gpt.py", "--log", "1"])


@pytest.mark.slow
def test_the_deepspeed_launcher_lets_every_flag_through():
    code = (
        "import sys; from deepspeed.launcher.runner import parse_args\n"
        "from megatron.config.parser import spellings\n"
        "for flag in spellings():\n"
        "    assert parse_args(['pretrain_gpt.py', flag, '1']).user_args == [flag, '1'], flag\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
