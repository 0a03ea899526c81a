"""The command that continues texts: from every format the text of Hugging Face, and one line for each mistake."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron.checkpoint import CheckpointError
from megatron.checkpoint.formats import FORMATS, ReadOptions, WriteOptions, convert, open_model
from megatron.generation import SamplingError
from megatron.tokenizer import TokenizerError
from megatron.training.setup import SetupError
from tests.generation.test_text import byte_tokenizer
from tests.model.test_hf import CASES, _random_model
from tests.support import load_tool, run_script

TOOL = Path(__file__).resolve().parents[2] / "tools" / "generate_text.py"
PROMPTS = ("def read", "hello, w")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Runs the command in this process and gives what it prints."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["generate_text.py", "--device", "cpu", *map(str, words)])
        load_tool(TOOL.name).main()
        return str(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A LLaMA of Hugging Face with its tokenizer, and how it continues the prompts."""
    folder = tmp_path_factory.mktemp("models") / "hf"
    kind, settings = CASES["llama-gqa"]
    model = _random_model(kind, {**settings, "vocab_size": 260, "bos_token_id": 256, "eos_token_id": 257}).eval()
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids[:-1]])
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(whole[0, ids.shape[1] :].tolist()).removesuffix("</s>"))
    return folder, texts


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_writes_the_text_of_hugging_face(
    kind: str, hugging_face: tuple[Path, list[str]], tool: Any, tmp_path: Path
) -> None:
    source, texts = hugging_face
    folder = source
    if kind != "hf":
        folder = tmp_path / kind
        layout = {"tp": 2, "pp": 2} if FORMATS[kind].sharded else {}
        convert(open_model(source, "hf", ReadOptions()), kind, folder, WriteOptions(log=lambda _: None, **layout))
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    out = tool("--load", folder, "--max-new-tokens", 12, "--temperature", 0, "--json", *prompts)
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in records] == list(PROMPTS)
    assert [record["text"] for record in records] == texts
    assert {record["reason"] for record in records} <= {"length", "eos"}


def test_output_as_text_and_as_lines(
    hugging_face: tuple[Path, list[str]], tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, texts = hugging_face
    always = ("--load", folder, "--max-new-tokens", 12, "--temperature", 0)
    out = tool(*always, "--prompt", PROMPTS[0], "--output", tmp_path / "one.txt")
    assert out == PROMPTS[0] + texts[0] + "\n" == (tmp_path / "one.txt").read_text()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(PROMPTS)))
    tool(*always, "--prompts", "-", "--batch-size", 1, "--output", tmp_path / "two.jsonl")
    records = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [record["text"] for record in records] == texts


def test_a_terminal_sees_the_text_while_it_is_written(
    hugging_face: tuple[Path, list[str]], tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, texts = hugging_face
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    out = tool("--load", folder, "--max-new-tokens", 12, "--temperature", 0, "--prompt", PROMPTS[1])
    assert out == PROMPTS[1] + texts[1] + "\n"


def test_seeds_beams_and_stop_words(hugging_face: tuple[Path, list[str]], tool: Any) -> None:
    folder, texts = hugging_face
    always = ("--load", folder, "--max-new-tokens", 12, "--prompt", PROMPTS[0], "--json")
    drawn = [tool(*always, "--seed", seed, "--top-k", 50) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert json.loads(tool(*always, "--num-beams", 3))["tokens"]
    word = texts[0][4:6]
    stopped = json.loads(tool(*always, "--temperature", 0, "--stop", word))
    assert stopped["text"] == texts[0][: texts[0].index(word)] and stopped["reason"] == "stop"


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (("--load", "nowhere"), CheckpointError, "--load nowhere: it does not exist"),
        (("--load", "nowhere", "--from", "native"), CheckpointError, "--load nowhere: it does not exist"),
        (("--num-beams", 0), SamplingError, "--num-beams is 0"),
        (("--num-beams", 2, "--top-k", 3), SamplingError, "--num-beams searches"),
        (("--max-new-tokens", 0), SamplingError, "--max-new-tokens is 0"),
        (("--stop", ""), SamplingError, "--stop is empty"),
        (("--tensor-model-parallel-size", 2), SetupError, "must be the number of processes, which is 1"),
    ],
)
def test_mistakes(
    words: tuple[object, ...], kind: type[Exception], message: str, hugging_face: tuple[Path, list[str]], tool: Any
) -> None:
    with pytest.raises(kind, match=message):
        tool("--load", hugging_face[0], "--prompt", "x", *words)


def test_a_tokenizer_of_another_model(hugging_face: tuple[Path, list[str]], tool: Any, tmp_path: Path) -> None:
    folder, _ = hugging_face
    model = _random_model(*CASES["llama-gqa"])
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(TokenizerError, match=r"has no tokenizer and does not say where it is: .* --tokenizer-model"):
        tool("--load", tmp_path / "small", "--prompt", "x")
    with pytest.raises(TokenizerError, match=r"makes 258 tokens, but the model in .*small knows 83"):
        tool("--load", tmp_path / "small", "--prompt", "x", "--tokenizer-model", folder)


def test_a_mistake_ends_with_one_line(tmp_path: Path) -> None:
    done = run_script("tools/generate_text.py", "--load", tmp_path / "nowhere", "--prompt", "x", "--device", "cpu")
    assert done.returncode == 1
    assert done.stderr == f"error: --load {tmp_path}/nowhere: it does not exist\n"
