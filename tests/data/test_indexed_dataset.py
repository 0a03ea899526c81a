"""Reading, writing, joining and repairing `.bin/.idx`, and every kind of damage."""

from __future__ import annotations

import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.data.errors import DataError
from megatron.data.index_file import HEADER, read_index, token_dtype
from megatron.data.indexed_dataset import IndexedDataset, bin_path, idx_path
from megatron.data.indexed_writer import IndexedDatasetWriter, merge_datasets
from megatron.data.repair import main as repair
from tests.data.corpora import EOD, GOLDEN, VOCAB, write_corpus


def golden_documents(name: str, documents: int, longest: int, seed: int):
    """The documents of tests/golden/data/make_golden.py: tokens and the lengths of their parts."""
    rng = np.random.default_rng(seed)
    for document in range(documents):
        parts = [int(rng.integers(0, longest)) for _ in range(2 if document % 5 == 4 else 1)]
        tokens = rng.integers(0, VOCAB, sum(parts))
        tokens[rng.random(len(tokens)) < 0.05] = EOD
        yield tokens, parts


@pytest.mark.parametrize(
    ("name", "documents", "longest", "seed", "dtype"),
    [
        ("a", 57, 60, 1, np.uint16),
        ("b", 31, 200, 2, np.uint16),
        ("c", 11, 15, 3, np.uint16),
        ("wide", 7, 12, 4, np.int32),
    ],
)
def test_files_are_megatrons_in_both_directions(name, documents, longest, seed, dtype, tmp_path):
    written = list(golden_documents(name, documents, longest, seed))
    with IndexedDatasetWriter(tmp_path / "ours", dtype) as writer:
        for number, (tokens, parts) in enumerate(written):
            if number % 2:
                writer.add_document(tokens, parts)
                continue
            for part in np.split(tokens, np.cumsum(parts)[:-1]):
                writer.add_item(part)
            writer.end_document()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (GOLDEN / f"{name}{suffix}").read_bytes()
    theirs = IndexedDataset(GOLDEN / name)
    sequences = [part for tokens, parts in written for part in np.split(tokens, np.cumsum(parts)[:-1])]
    assert len(theirs) == len(sequences)
    assert theirs.dtype == dtype
    for number, sequence in enumerate(sequences):
        assert theirs[number].tolist() == sequence.tolist()
    assert np.diff(theirs.index.documents).tolist() == [len(parts) for _, parts in written]


def test_token_types_follow_the_vocabulary():
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32
    assert token_dtype(None) == np.int32


def test_a_dataset_travels_to_workers_by_its_path(tmp_path):
    texts = write_corpus(tmp_path / "x")
    sent = pickle.dumps(IndexedDataset(tmp_path / "x"))
    assert len(sent) < 500
    assert pickle.loads(sent)[7].tolist() == texts[7].tolist()


def test_an_empty_corpus_can_be_written_and_read(tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", np.int32):
        pass
    assert len(IndexedDataset(tmp_path / "x")) == 0


def test_nothing_appears_when_writing_fails(tmp_path):
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "x", np.int32) as writer:
        writer.add_document([1, 2])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="not ended"), IndexedDatasetWriter(tmp_path / "x", np.int32) as writer:
        writer.add_item([1])
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused(tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        with pytest.raises(DataError, match="70000 does not fit uint16"):
            writer.add_document([70000])
        with pytest.raises(DataError, match="do not divide the 2 tokens"):
            writer.add_document([1, 2], [1])
    with pytest.raises(DataError, match="outside of the vocabulary of 100"):
        IndexedDataset(GOLDEN / "a").check_vocabulary(100)


def test_joining_keeps_documents_and_order(tmp_path):
    merge_datasets([GOLDEN / "b", GOLDEN / "a"], tmp_path / "x")
    first, second, joined = (IndexedDataset(path) for path in (GOLDEN / "b", GOLDEN / "a", tmp_path / "x"))
    assert [joined[i].tolist() for i in range(len(joined))] == [
        d[i].tolist() for d in (first, second) for i in range(len(d))
    ]
    counts = np.diff(joined.index.documents).tolist()
    assert counts == [*np.diff(first.index.documents), *np.diff(second.index.documents)]
    with pytest.raises(DataError, match="holds int32 tokens"):
        merge_datasets([GOLDEN / "a", GOLDEN / "wide"], tmp_path / "y")
    with pytest.raises(DataError, match="one of the inputs"):
        merge_datasets([tmp_path / "x"], tmp_path / "x")


def test_the_tool_joins_a_folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        for suffix in (".bin", ".idx"):
            shutil.copy(GOLDEN / f"{name}{suffix}", tmp_path / "in")
    tool = Path(__file__).parents[2] / "tools" / "merge_datasets.py"
    command = [sys.executable, str(tool), "--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(tool.parents[1])}
    subprocess.run(command, check=True, env=environment)
    merge_datasets([GOLDEN / "a", GOLDEN / "b"], tmp_path / "expected")
    assert (tmp_path / "out.idx").read_bytes() == (tmp_path / "expected.idx").read_bytes()
    (tmp_path / "in" / "b.bin").unlink()
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "b.bin is missing" in failed.stderr


def write_uncounted(prefix: Path) -> list[list[int]]:
    """What `preprocess_data.py --append-eod` of some Megatron-DeepSpeed versions writes; returns the true sequences."""
    documents = [[[5, 6], [7]], [[8]], [], [[9, 9, 9]]]
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for parts in documents:
            writer.add_document([token for part in parts for token in part], [len(part) for part in parts])
    tokens = [token for parts in documents if parts for token in [*(t for part in parts for t in part), EOD]]
    bin_path(prefix).write_bytes(np.array(tokens, np.int32).tobytes())
    return [[5, 6], [7, EOD], [8, EOD], [9, 9, 9, EOD]]


def test_uncounted_eod_tokens_are_named_and_repaired(tmp_path, capsys):
    expected = write_uncounted(tmp_path / "x")
    with pytest.raises(DataError, match=r"--append-eod(.|\n)*python -m megatron.data.repair"):
        IndexedDataset(tmp_path / "x")
    assert repair([str(tmp_path / "x")]) == 0
    repaired = IndexedDataset(tmp_path / "x")
    assert [repaired[i].tolist() for i in range(len(repaired))] == expected
    assert repair([str(tmp_path / "x")]) == 1
    assert "nothing was changed" in capsys.readouterr().err


def damaged(tmp_path: Path, idx: bytes | None = None, data: bytes | None = None) -> Path:
    for suffix, content in ((".idx", idx), (".bin", data)):
        source = (GOLDEN / f"a{suffix}").read_bytes()
        (tmp_path / f"x{suffix}").write_bytes(source if content is None else content)
    return tmp_path / "x"


IDX = (GOLDEN / "a.idx").read_bytes()
BIN = (GOLDEN / "a.bin").read_bytes()


def with_bytes(offset: int, replacement: bytes) -> bytes:
    return IDX[:offset] + replacement + IDX[offset + len(replacement) :]


@pytest.mark.parametrize(
    ("idx", "data", "message"),
    [
        (b"", None, "cut short: 0 bytes"),
        (IDX[:20], None, "header alone takes 34"),
        (IDX[:-3], None, "cut short"),
        (IDX + b"x", None, "longer than its header"),
        (b"version https://git-lfs.github.com/spec/v1\noid", None, "Git LFS"),
        (None, b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"TNTIDX\x00\x00" + bytes(60), None, "TNTIDX"),
        (b"PK\x03\x04" + bytes(60), None, "not an index file"),
        (with_bytes(9, struct.pack("<Q", 2)), None, "version 2"),
        (with_bytes(17, b"\x06"), None, "floating-point"),
        (with_bytes(17, b"\x63"), None, "unknown token type code 99"),
        (with_bytes(18, struct.pack("<Q", 2**63)), None, "cut short"),
        (with_bytes(34, struct.pack("<i", -7)), None, "sequence 0 has the length -7"),
        (with_bytes(34, struct.pack("<i", 59)), None, "sequence 1 starts at byte"),
        (IDX[:-8] + struct.pack("<q", 1), None, "document index covers"),
        (IDX[:-16] + struct.pack("<q", 2) + IDX[-8:], None, "document index falls"),
        (None, BIN[:-2], "cut short"),
        (None, BIN + b"\0\0", "too long"),
    ],
)
def test_damage_is_named(idx, data, message, tmp_path):
    with pytest.raises(DataError, match=message):
        IndexedDataset(damaged(tmp_path, idx, data))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"x\.idx does not exist"):
        IndexedDataset(tmp_path / "x")
    shutil.copy(GOLDEN / "a.idx", idx_path(tmp_path / "x"))
    with pytest.raises(DataError, match=r"x\.bin does not exist"):
        IndexedDataset(tmp_path / "x")


def test_a_multimodal_index_is_named(tmp_path):
    sequences = read_index(GOLDEN / "a.idx").lengths.size
    with pytest.raises(DataError, match="multimodal"):
        IndexedDataset(damaged(tmp_path, IDX + bytes(sequences)))


def _damage(case: int, rng: np.random.Generator) -> tuple[bytes, bytes]:
    """The index and the tokens after one of eight kinds of damage."""
    content, tokens = bytearray(IDX), (GOLDEN / "a.bin").read_bytes()
    sequences = read_index(GOLDEN / "a.idx").lengths.size
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size).copy()
    pointers = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences).copy()
    kind, victim = case % 8, rng.integers(0, sequences)
    if kind == 0:
        content = content[: rng.integers(0, len(content))]
    elif kind == 1:
        content[rng.integers(0, HEADER.size)] ^= 1 << rng.integers(0, 8)
    elif kind == 2:
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(0, len(content))] ^= 1 << rng.integers(0, 8)
    elif kind == 3:
        content[: rng.integers(1, 10)] = rng.bytes(rng.integers(1, 10))
    elif kind == 4:  # overlapping or far pointers
        pointers[victim] = rng.choice([0, -2, pointers[victim] + 2, pointers[-1], 2**62])
    elif kind == 5:  # negative or huge lengths
        lengths[victim] = rng.choice([-1, -(2**31), 2**31 - 1, lengths[victim] + 1])
    elif kind == 6:
        tokens = tokens[: rng.integers(0, len(tokens))]
    else:
        tokens += rng.bytes(rng.integers(1, 64))
    if kind in (4, 5):
        content[HEADER.size : HEADER.size + 12 * sequences] = lengths.tobytes() + pointers.tobytes()
    return bytes(content), tokens


def test_fuzzed_pairs_give_an_error_or_the_right_tokens(tmp_path):
    rng = np.random.default_rng(0)
    right = IndexedDataset(GOLDEN / "a")
    expected = [right[i].tolist() for i in range(len(right))]
    refused = 0
    for case in range(1000):
        index, tokens = _damage(case, rng)
        prefix = damaged(tmp_path, index)
        Path(f"{prefix}.bin").write_bytes(tokens)
        try:
            read = IndexedDataset(prefix)
        except DataError as error:
            assert len(str(error)) > 20
            refused += 1
            continue
        assert [read[i].tolist() for i in range(len(read))] == expected
    # Only damage that changes nothing, and flips within the document index, which samples do not depend on, are left.
    assert refused > 900
