"""tools/inspect_dataset.py and tools/split_dataset.py."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron.data.index_file import HEADER
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter, merge_datasets
from megatron.data.inspection import inspect_dataset
from tests.data.corpora import EOD, VOCAB, write_corpus
from tests.tools.test_preprocess_data import ROOT


def _run(tool: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"tools/{tool}.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def _documents(prefix: Path | str) -> list[list[int]]:
    data = IndexedDataset(prefix)
    starts = data.index.documents.tolist()
    return [[int(t) for s in range(a, b) for t in data[s]] for a, b in pairwise(starts)]


def test_a_sound_corpus(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "a")
    picture = tmp_path / "deep" / "lengths.png"
    done = _run(
        "inspect_dataset", tmp_path / "a", "--vocab-size", VOCAB, "--eod", EOD, "--checksum", "--histogram", picture
    )
    assert done.returncode == 0, done.stderr
    assert f"40 documents, 40 sequences, {sum(map(len, texts))} tokens of uint16" in done.stdout
    assert f"token ids from 0 to {max(text.max() for text in texts)}" in done.stdout
    assert "no problems found" in done.stdout
    assert hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest() in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = _run(
        "inspect_dataset", tmp_path / "a", "--tokenizer-type", "NullTokenizer", "--vocab-size", VOCAB, "--text", 1
    )
    assert f"document 0: {' '.join(map(str, texts[0][:100]))!r}" in shown.stdout


def test_known_damage_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a")
    content = (tmp_path / "a.idx").read_bytes()
    data = (tmp_path / "a.bin").read_bytes()

    def problems(index: bytes, tokens: bytes = data, **known: int) -> str:
        (tmp_path / "x.idx").write_bytes(index)
        (tmp_path / "x.bin").write_bytes(tokens)
        return "\n".join(inspect_dataset(str(tmp_path / "x"), **known).problems)

    floats = bytearray(content)
    floats[17] = 6
    assert "the other way round in GPT-NeoX" in problems(bytes(floats))
    assert "outside of the vocabulary of 100: made with another tokenizer" in problems(content, vocab_size=100)
    assert "uint16 cannot hold all ids of a vocabulary of 70000" in problems(content, vocab_size=70000)
    tokens = np.frombuffer(data, np.uint16).copy()
    tokens[-1] = 7
    assert "1 of 40 documents do not end with EOD (0)" in problems(content, tokens.tobytes(), eod=EOD)
    assert "is cut short" in problems(content[:-3])
    done = _run("inspect_dataset", tmp_path / "x")
    assert done.returncode == 1
    assert "PROBLEM: " in done.stdout


def test_offsets_that_overflowed_are_recognised(tmp_path: Path) -> None:
    """A sparse file of 5 GB, whose index a tool with 32-bit arithmetic has written."""
    lengths = np.full(3, 1_200_000_000, np.int64)
    starts = ((np.cumsum(lengths) - lengths) * 2).astype(np.int32).astype(np.int64)
    assert (starts < 0).any()
    header = HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, 3, 4)
    index = header + lengths.astype("<i4").tobytes() + starts.tobytes() + struct.pack("<4q", 0, 1, 2, 3)
    (tmp_path / "x.idx").write_bytes(index)
    with (tmp_path / "x.bin").open("wb") as file:
        file.truncate(int(lengths.sum()) * 2)
    found = inspect_dataset(str(tmp_path / "x"))
    assert any("overflowed beyond 2 GiB" in problem for problem in found.problems)


def test_uncounted_eod_tokens_are_recognised(tmp_path: Path) -> None:
    texts = [np.array([*range(1, length), EOD]) for length in range(2, 30)]
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        for text in texts:
            writer.add_document(text[:-1])
    (tmp_path / "x.bin").write_bytes(np.concatenate(texts).astype(np.uint16).tobytes())
    (problem,) = inspect_dataset(str(tmp_path / "x")).problems
    assert "drift apart by one token per document" in problem


def test_parts_hold_everything_in_order(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a")
    done = _run("split_dataset", "--input", tmp_path / "a", "--output-prefix", tmp_path / "p", "--parts", 3)
    assert done.returncode == 0, done.stderr
    assert [len(_documents(tmp_path / f"p_{i}")) for i in range(3)] == [13, 14, 13]
    merge_datasets([tmp_path / f"p_{i}" for i in range(3)], tmp_path / "again")
    for end in (".bin", ".idx"):
        assert (tmp_path / f"again{end}").read_bytes() == (tmp_path / f"a{end}").read_bytes()
    _run("split_dataset", "--input", tmp_path / "a", "--output-prefix", tmp_path / "s", "--split", "90,10")
    assert [len(_documents(tmp_path / f"s_{name}")) for name in ("train", "valid")] == [36, 4]
    assert not (tmp_path / "s_test.idx").exists()
    assert not list(tmp_path.glob("*.unfinished"))


def test_tokens_of_another_width(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "a", np.int32) as writer:
        writer.add_document([1, 2, 3, 60000], [2, 2])
        writer.add_document([])
    done = _run("split_dataset", "--input", tmp_path / "a", "--output-prefix", tmp_path / "b", "--dtype", "uint16")
    assert done.returncode == 0, done.stderr
    narrow = IndexedDataset(tmp_path / "b")
    assert narrow.dtype == np.uint16
    assert narrow.index.documents.tolist() == [0, 2, 3]
    assert _documents(tmp_path / "b") == [[1, 2, 3, 60000], []]
    refused = _run("split_dataset", "--input", tmp_path / "a", "--output-prefix", tmp_path / "c", "--dtype", "uint8")
    assert refused.returncode == 1
    assert "holds token id 60000, which does not fit uint8" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "b.bin", "b.idx"]
    same = _run("split_dataset", "--input", tmp_path / "a", "--output-prefix", tmp_path / "a", "--dtype", "int32")
    assert "is the input" in same.stderr


@pytest.mark.parametrize("flags", [("--parts", 41), ("--parts", 0)])
def test_impossible_parts_are_refused(tmp_path: Path, flags: tuple[object, ...]) -> None:
    write_corpus(tmp_path / "a")
    done = _run("split_dataset", "--input", tmp_path / "a", "--output-prefix", tmp_path / "p", *flags)
    assert done.returncode == 1
    assert "so 1 to 40 parts" in done.stderr
