"""Fine-tuning from raw instructions to a step, through the command lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.training.metrics import read_metrics
from tests.support import run_script

MODEL = (
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "64"),
    *("--max-position-embeddings", "64", "--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-2"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "99", "--device", "cpu", "--num-workers", "0"),
    *("--log-interval", "1", "--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--train-iters", "6", "--eval-interval", "3", "--eval-iters", "1", "--lr-decay-style", "constant"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same additions, 'a b' and their sum, in both forms."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [(a, b) for a in range(1, 9) for b in range(1, 9)]
    lines = [json.dumps({"prompt": f"{a} {b}" + " 50" * a, "completion": str(60 + a + b)}) for a, b in pairs]
    (folder / "i.jsonl").write_text("\n".join(lines))
    for form in ("packed", "compact"):
        done = run_script(
            *("tools/preprocess_data.py", "--input", folder / "i.jsonl", "--handler-name", "PromptCompletionHandler"),
            *("--tokenizer-type", "NullTokenizer", "--vocab-size", "99", "--append-eod"),
            *("--output-prefix", folder / form, "--instruction-format", form),
        )
        assert done.returncode == 0, done.stderr
    return {form: str(folder / form) for form in ("packed", "compact")}


def _losses(tmp_path: Path, *flags: str, program: str = "finetune_gpt.py") -> list[float]:
    log = tmp_path / "metrics.jsonl"
    done = run_script(program, *MODEL, "--log-json", log, "--data-cache-path", tmp_path / "cache", *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    records = list(read_metrics(log))
    assert any(record["kind"] == "evaluation" for record in records)
    return [record["lm_loss"] for record in records if record["kind"] == "train"]


@pytest.mark.slow
def test_answers_are_learned_from_either_form(data: dict[str, str], tmp_path: Path) -> None:
    packed = _losses(tmp_path / "1", "--data-path", data["packed"])
    compact = _losses(tmp_path / "2", "--data-path", data["compact"])
    assert packed == pytest.approx(compact, rel=1e-6)
    assert packed[-1] < 0.8 * packed[0]
    short = _losses(tmp_path / "3", "--data-path", data["compact"], "--variable-seq-lengths")
    assert short == pytest.approx(compact, rel=1e-4)


def test_examples_share_samples(data: dict[str, str], tmp_path: Path) -> None:
    losses = _losses(tmp_path, "--data-path", data["compact"], "--neat-pack")
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--variable-seq-lengths", "--mock-data"), "--mock-data has none"),
        (("--data-path", "nowhere"), "is no instruction data"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(flags: tuple[str, ...], message: str) -> None:
    done = run_script("finetune_gpt.py", *MODEL, *flags)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_packing_of_pretraining_data_is_refused() -> None:
    done = run_script("pretrain_gpt.py", *MODEL, "--mock-data", "--neat-pack")
    assert done.returncode != 0
    assert "--neat-pack and --variable-seq-lengths go with --is-instruction-dataset" in done.stdout + done.stderr


@pytest.mark.slow
def test_fill_in_the_middle_needs_its_tokens(data: dict[str, str]) -> None:
    corpus = f"{data['packed']}_packed_input_ids_document"
    done = run_script("pretrain_gpt.py", *MODEL, "--data-path", corpus, "--fim-data", "--fim-prefix-token", "1 2")
    assert done.returncode != 0
    assert "--fim-prefix-token '1 2' is 2 tokens, not one" in done.stdout + done.stderr
    tokens = [f"--fim-{name}-token={number}" for number, name in enumerate(("prefix", "middle", "suffix", "pad"), 90)]
    done = run_script("pretrain_gpt.py", *MODEL, "--data-path", corpus, "--fim-data", *tokens)
    assert done.returncode == 0, done.stdout + done.stderr
