"""Runs that begin with the weights of a Hugging Face folder and end with one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.formats import ReadOptions, StoredModel, WriteOptions, convert, open_model
from megatron.config.run import parse
from megatron.training.checkpoint_args import read_settings
from megatron.training.run import run
from tests.checkpoint.formats.samples import FAMILIES, random_model
from tests.support import run_ranks, run_script

RUN = (
    "--use-checkpoint-args --mock-data --tokenizer-type NullTokenizer --vocab-size 82 --seq-length 16 --lr 0 "
    "--save-interval 10 --num-workers 0"
)
STEPS = "--micro-batch-size 1 --global-batch-size 4 --train-iters 1 --eval-iters 0"

BFLOAT16_TOLERANCE = 2e-2  # weights and activations of 8 bits


def _train(flags: str, ranks: int) -> None:
    env = {"WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
    run(parse(f"{RUN} {STEPS} {flags}".split(), env, read_record=read_settings))


def _folder(family: str, path: Path) -> StoredModel:
    model = random_model(FAMILIES[family], torch.float32)
    convert(model, "hf", path, WriteOptions())
    return model


@pytest.mark.parametrize(
    ("family", "flags", "ranks"),
    [
        ("llama", "", 1),
        ("gpt2", "--tensor-model-parallel-size 2", 2),
        pytest.param("bloom", "--pipeline-model-parallel-size 2", 2, marks=pytest.mark.slow),
        pytest.param("llama", "--deepspeed --zero-stage 3", 2, marks=pytest.mark.slow),
        pytest.param("mistral", "--tensor-model-parallel-size 2 --zero-stage 3", 4, marks=pytest.mark.slow),
    ],
)
def test_weights_go_through_a_run_unchanged(family: str, flags: str, ranks: int, tmp_path: Path) -> None:
    """At learning rate 0 what comes out is what went in, on every layout."""
    model = _folder(family, tmp_path / "in")
    folders = f"--load {tmp_path / 'in'} --save {tmp_path / 'ckpt'} --save-hf {tmp_path / 'out'} {flags}"
    run_ranks(ranks, _train, folders, ranks)
    found = open_model(tmp_path / "out", "hf", ReadOptions())
    assert found.weights.records == model.weights.records
    for name in model.weights.records:
        assert torch.equal(found.weights.read(name), model.weights.read(name)), name


def _losses(flags: str) -> list[str]:
    """What a run in one process prints as its losses, digit by digit."""
    done = run_script("pretrain_gpt.py", *flags.split(), "--log-interval", "1")
    assert done.returncode == 0, done.stderr
    return re.findall(r"lm loss: (\S+)", done.stdout)


@pytest.mark.slow
def test_training_continues_from_a_checkpoint_that_went_through_another_format(tmp_path: Path) -> None:
    """Weights, moments, schedule and position go over DeepSpeed's universal form; the losses go on as they were."""
    tokens = "--mock-data --tokenizer-type NullTokenizer --vocab-size 82 --seq-length 16 --num-workers 0"
    sizes = "--preset llama-tiny --micro-batch-size 1 --global-batch-size 4 --train-iters 4 --eval-iters 0 --lr 1e-3"
    run_flags = f"{tokens} {sizes}"
    whole = _losses(f"{run_flags} --save {tmp_path / 'run'} --save-interval 2")
    half = open_model(tmp_path / "run", "native", ReadOptions(iteration=2))
    convert(half, "universal", tmp_path / "universal", WriteOptions())
    convert(open_model(tmp_path / "universal", None, ReadOptions()), "native", tmp_path / "back", WriteOptions())
    assert _losses(f"{run_flags} --load {tmp_path / 'back'}") == whole[2:]
    assert len(whole) == 4


@pytest.mark.slow
def test_deepspeed_begins_with_the_weights(tmp_path: Path) -> None:
    """The first loss is that of the native engine."""
    _folder("llama", tmp_path / "in")
    losses = []
    for engine in ("", "--deepspeed --zero-stage 1 --bf16"):
        losses.append(float(_losses(f"{RUN} {STEPS} --load {tmp_path / 'in'} {engine}")[0]))
    assert losses[1] == pytest.approx(losses[0], rel=BFLOAT16_TOLERANCE)
    assert losses[0] > 5, "random weights of this size lose more than the logarithm of the vocabulary"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-layers 3", r"--num-layers 3: the checkpoint in --load .* has 4"),
        ("--save-hf {folder}/in --save {folder}/ckpt", "--save-hf .*in is there already"),
    ],
)
def test_refusals(flags: str, message: str, tmp_path: Path) -> None:
    _folder("llama", tmp_path / "in")
    with pytest.raises(AssertionError, match=message):
        run_ranks(1, _train, f"--load {tmp_path / 'in'} {flags.format(folder=tmp_path)}", 1)


def test_flags_that_describe_another_model(tmp_path: Path) -> None:
    _folder("llama", tmp_path / "in")
    flags = "--num-layers 4 --hidden-size 32 --num-attention-heads 8 --mock-data --tokenizer-type NullTokenizer"
    sizes = f"--vocab-size 82 --seq-length 16 --lr 0 --load {tmp_path / 'in'} --finetune"
    with pytest.raises(AssertionError, match=r"num_kv_heads is 8, not 4.*--use-checkpoint-args"):
        run_ranks(1, _train_plain, f"{flags} {sizes}")


def _train_plain(flags: str) -> None:
    run(parse(f"{flags} {STEPS}".split(), {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, read_record=read_settings))
