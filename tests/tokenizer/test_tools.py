"""The tools that make a corpus and a tokenizer out of nothing but Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tokenizer.conftest import TEXT
from tests.tokenizer.test_ids import SAMPLES, build, gpt2

TOOLS = Path(__file__).resolve().parents[2] / "tools"
_ENOUGH_BYTES = 5_000_000


def run(tool: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / tool), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_corpus_is_large_and_deterministic(tmp_path: Path) -> None:
    first, second = tmp_path / "new" / "a.jsonl", tmp_path / "b.jsonl"
    said = run("collect_corpus.py", "--output", first).stdout
    run("collect_corpus.py", "--output", second)
    content = first.read_bytes()
    assert content == second.read_bytes()
    assert len(content) > _ENOUGH_BYTES
    documents = [json.loads(line)["text"] for line in content.splitlines()]
    assert f"{len(documents)} documents, {len(content) / 1e6:.1f} MB" in said
    assert all(document.strip() for document in documents)
    assert [path.name for path in first.parent.iterdir()] == ["a.jsonl"]


def test_trained_tokenizer_is_deterministic_and_reads_in_every_way(tmp_path: Path) -> None:
    source = tmp_path / "i.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in TEXT))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        done = run("train_tokenizer.py", "--input", source, "--output", folder, "--vocab-size", 350)
        assert done.stdout == f"{folder}: 350 tokens\n", done.stderr
    names = ["merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(path.name for path in folders[0].iterdir()) == names
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)
    ours = build("HFTokenizer", model=str(folders[0]))
    assert (ours.vocab_size, ours.eod) == (350, 0)
    assert ours.encode_batch(SAMPLES) == gpt2(folders[0]).encode_batch(SAMPLES)
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folders[0])
    assert ours.encode_batch(SAMPLES) == [reference(text).input_ids for text in SAMPLES]


def test_training_refuses_what_cannot_work(tmp_path: Path) -> None:
    done = run("train_tokenizer.py", "--input", tmp_path / "no", "--output", tmp_path / "o")
    assert "no: no such file" in done.stderr
    done = run("train_tokenizer.py", "--input", tmp_path, "--output", tmp_path / "o", "--vocab-size", 256)
    assert "--vocab-size 256: must be at least 257" in done.stderr
    assert done.returncode == 2
