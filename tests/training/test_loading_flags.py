"""What of a checkpoint is taken and what begins anew, with either engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron.checkpoint.manifest import read_manifest
from megatron.training.metrics import read_metrics
from tests.parity import FLOAT32_TOLERANCE, MODEL, TRAINING, difference, train
from tests.support import run_ranks

ENGINES = {"native": (), "deepspeed": ("--deepspeed", "--zero-stage", "2")}
STEPS, SAVED = 4, 2
LOADING = {
    "continued": (),
    "new optimizer": ("--no-load-optim",),
    "new schedule": ("--no-load-lr-state",),
    "new position": ("--reset-iteration",),
    "weights alone": ("--finetune",),
}


def _train_all(commands: Sequence[Sequence[str]]) -> None:
    for argv in commands:
        train(argv)


def _argv(folder: Path, name: str, *flags: str) -> list[str]:
    steps = ("--train-iters", "8", "--exit-interval", str(STEPS), "--log-json", str(folder / f"{name}.jsonl"))
    return [*MODEL, *TRAINING, "--mock-data", *steps, *flags]


def _curves(engine: str, folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Iterations and losses of a run and of those that go on from its checkpoint."""
    folder.mkdir()
    saved, flags = str(folder / "saved"), ENGINES[engine]
    commands = [_argv(folder, "whole", "--save", saved, "--save-interval", str(SAVED), *flags)]
    loading = ("--load", saved, "--ckpt-step", str(SAVED), *flags)
    commands += [_argv(folder, name, *loading, *chosen) for name, chosen in LOADING.items()]
    run_ranks(1, _train_all, commands, init=False, timeout=400.0)
    found = {}
    for name in ("whole", *LOADING):
        records = [record for record in read_metrics(folder / f"{name}.jsonl") if record["kind"] == "train"]
        found[name] = [r["iteration"] for r in records], [r["lm_loss"] for r in records]
    return found


@pytest.mark.slow
def test_both_engines_obey_the_flags_of_loading_alike(tmp_path: Path) -> None:
    native, deepspeed = (_curves(engine, tmp_path / engine) for engine in ENGINES)
    for name, (iterations, losses) in native.items():
        assert deepspeed[name][0] == iterations, name
        assert difference(deepspeed[name][1], losses) <= FLOAT32_TOLERANCE, name
    whole = native["whole"][1]
    assert native["continued"] == ([3, 4], whole[SAVED:])
    assert native["new optimizer"][0] == native["new schedule"][0] == [3, 4]
    assert native["new position"][0] == native["weights alone"][0] == [1, 2, 3, 4]
    first = {name: losses[0] for name, (_, losses) in native.items()}
    assert first["continued"] == first["new optimizer"] == first["new schedule"] == whole[SAVED]
    assert first["new position"] == first["weights alone"] < whole[0]
    later = {native[name][1][1] for name in LOADING}
    assert len(later) == len(LOADING), "each flag changes something else"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_optimizer_that_was_not_saved_is_missed(engine: str, tmp_path: Path) -> None:
    saved, flags = str(tmp_path / "saved"), ENGINES[engine]
    saving = _argv(tmp_path, "first", "--save", saved, "--save-interval", "4", "--no-save-optim", *flags)
    loading = _argv(tmp_path, "second", "--load", saved, *flags)
    with pytest.raises(AssertionError, match=r"(?s)missing in the checkpoint .*--no-load-optim loads the weights"):
        run_ranks(1, _train_all, [saving, [*loading, "--no-load-optim"], loading], init=False, timeout=400.0)
    tensors = read_manifest(tmp_path / "saved" / "iter_0000004").tensors
    assert tensors and all(name.startswith("model.") for name in tensors)
