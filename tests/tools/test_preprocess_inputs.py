"""Kinds of input of the preprocessing command, and going on after a kill."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.data.indexed_dataset import IndexedDataset
from tests.tools.test_preprocess_data import NULL, ROOT, TOOL, digest, fail, jsonl, leftovers, read, succeed, trained

__all__ = ["trained"]
TEXTS = ["1 2", "3", "4 5 6"]
DOCUMENTS = [[1, 2], [3], [4, 5, 6]]


def _documents(*inputs: object, folder: Path) -> list[list[int]]:
    succeed("--input", *inputs, *NULL, "--output-prefix", folder / "out" / "o")
    return read(folder / "out" / "o_text_document")


def test_compressed_text(tmp_path: Path) -> None:
    plain = jsonl(tmp_path / "x.jsonl", TEXTS).read_bytes()
    for ending, compress in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        (tmp_path / f"i.jsonl{ending}").write_bytes(compress(plain))
        assert _documents(tmp_path / f"i.jsonl{ending}", folder=tmp_path) == DOCUMENTS


def test_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="the optional zstandard is not installed")
    plain = jsonl(tmp_path / "x.jsonl", TEXTS).read_bytes()
    frames = b"".join(zstandard.ZstdCompressor().compress(line) for line in plain.splitlines(keepends=True))
    (tmp_path / "i.jsonl.zst").write_bytes(frames)
    assert _documents(tmp_path / "i.jsonl.zst", folder=tmp_path) == DOCUMENTS
    (tmp_path / "cut.jsonl.zst").write_bytes(frames[:-3])
    assert "cannot be read to its end" in fail(
        "--input", tmp_path / "cut.jsonl.zst", *NULL, "--output-prefix", tmp_path / "o"
    )


def test_csv_and_json_arrays(tmp_path: Path) -> None:
    with (tmp_path / "i.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], ["a", "1 2"], ["b,c", "3"], ["d", "4\n5 6"]])
    assert _documents(tmp_path / "i.csv", folder=tmp_path) == DOCUMENTS
    (tmp_path / "i.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=2))
    assert _documents(tmp_path / "i.json", folder=tmp_path) == DOCUMENTS
    (tmp_path / "bad.csv").write_text("id,text\na\n")
    prefix = (*NULL, "--output-prefix", tmp_path / "o")
    assert "a row has more or fewer fields than the header" in fail("--input", tmp_path / "bad.csv", *prefix)
    (tmp_path / "bad.json").write_text('[{"text": "1"}, {"text": ]')
    assert "is no valid JSON array, near value 2" in fail("--input", tmp_path / "bad.json", *prefix)
    (tmp_path / "row.json").write_text('[{"text": "1"}, {"body": "1"}]')
    assert f"{tmp_path / 'row.json'}:2: missing key: no 'text'" in fail("--input", tmp_path / "row.json", *prefix)


@pytest.mark.slow
def test_a_large_json_array_is_read_in_pieces(tmp_path: Path) -> None:
    texts = [str(number % 1000) for number in range(150_000)]
    (tmp_path / "i.json").write_text(json.dumps([{"text": text} for text in texts]))
    assert _documents(tmp_path / "i.json", folder=tmp_path) == [[int(text)] for text in texts]


def test_parquet_arrow_and_saved_datasets(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the optional pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"text": TEXTS, "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "i.parquet", row_group_size=2)
    assert _documents(tmp_path / "i.parquet", folder=tmp_path) == DOCUMENTS
    with arrow.OSFile(str(tmp_path / "i.arrow"), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert _documents(tmp_path / "i.arrow", folder=tmp_path) == DOCUMENTS
    with arrow.OSFile(str(tmp_path / "j.arrow"), "wb") as sink, arrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert _documents(tmp_path / "j.arrow", folder=tmp_path) == DOCUMENTS
    (tmp_path / "k.parquet").write_bytes(b"PAR1 no")
    assert "is no valid parquet file" in fail(
        "--input", tmp_path / "k.parquet", *NULL, "--output-prefix", tmp_path / "o"
    )


@pytest.mark.slow
def test_folders_of_hugging_face_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional datasets is not installed")
    data = datasets.Dataset.from_dict({"text": ["3", "1 2", "4 5 6"]}).select([1, 0, 2])
    data.save_to_disk(str(tmp_path / "saved"))
    assert _documents(tmp_path / "saved", folder=tmp_path) == DOCUMENTS
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "parts"))
    prefix = (*NULL, "--output-prefix", tmp_path / "o")
    assert "holds the splits train, test: name one" in fail("--input", tmp_path / "parts", *prefix)
    assert _documents(tmp_path / "parts" / "train", folder=tmp_path) == DOCUMENTS


@pytest.mark.slow
def test_a_dataset_described_by_a_file(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the optional datasets is not installed")
    source = jsonl(tmp_path / "i.jsonl", TEXTS)
    params = tmp_path / "params.json"
    asked = {"path": "json", "data_files": str(source), "cache_dir": str(tmp_path / "cache")}
    given = ("--hf-datasets-params", params, *NULL, "--output-prefix", tmp_path / "o")
    params.write_text(json.dumps(asked))
    assert 'holds the splits train: name one, with "split": "train" in it' in fail(*given)
    for streaming in (False, True):
        params.write_text(json.dumps({**asked, "split": "train", "streaming": streaming}))
        succeed(*given)
        assert read(tmp_path / "o_text_document") == DOCUMENTS
    params.write_text("[]")
    assert "must be a JSON object" in fail(*given)
    assert "not allowed with argument" in fail(*given, "--input", source)


def test_folders_and_urls(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    jsonl(tmp_path / "in" / "b.jsonl", ["3"])
    jsonl(tmp_path / "in" / "a.jsonl", ["1 2"])
    jsonl(tmp_path / "in" / "deep" / "c.jsonl", ["4 5 6"])
    (tmp_path / "in" / "README.md").write_text("not data")
    assert _documents(tmp_path / "in", folder=tmp_path) == DOCUMENTS
    url = f"file://{tmp_path}/in/*.jsonl"
    assert _documents(url, folder=tmp_path) == [[1, 2], [3]]
    said = fail("--input", f"file://{tmp_path}/none*.jsonl", *NULL, "--output-prefix", tmp_path / "o")
    assert "nothing is there" in said
    assert "Protocol not known" in fail("--input", "nosuch://a/b", *NULL, "--output-prefix", tmp_path / "o")


@pytest.mark.slow
def test_sentences(trained: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("sentencex", reason="the optional sentencex is not installed")
    source = jsonl(tmp_path / "i.jsonl", ["Hello Mr. Smith. How are you?\n\nFine.", "One."])
    given = ("--input", source, "--tokenizer-type", "HFTokenizer", "--tokenizer-model", trained[1])
    succeed(*given, "--split-sentences", "--append-eod", "--output-prefix", tmp_path / "o")
    index = IndexedDataset(tmp_path / "o_text_sentence")
    assert index.index.documents.tolist() == [0, 3, 4]
    succeed(*given, "--output-prefix", tmp_path / "whole")
    # The white space between the sentences is gone, and an EOD follows each of the two documents.
    eod = int(index[3][-1])
    assert [int(index[number][-1]) == eod for number in range(4)] == [False, False, True, True]
    succeed(*given, "--split-sentences", "--keep-newlines", "--output-prefix", tmp_path / "k")
    assert len(IndexedDataset(tmp_path / "k_text_sentence")) == 4


def _kill_at(seconds: float, command: list[str]) -> bool:
    """Start the command and kill it; whether it was still running."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
    time.sleep(seconds)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_it_goes_on_to_the_same_files(
    trained: tuple[Path, Path], tmp_path: Path, workers: int
) -> None:
    """20 kills in all, each followed by the same command, until one is left alone."""
    packed = tmp_path / "p.jsonl.gz"
    packed.write_bytes(gzip.compress(trained[0].read_bytes(), 1))
    command = [
        *(sys.executable, str(TOOL), "--input", str(trained[0]), str(packed)),
        *("--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(trained[1]), "--tokenizer-engine", "own"),
        *("--workers", str(workers), "--resume-interval", "0"),
    ]
    started = time.monotonic()
    subprocess.run([*command, "--output-prefix", str(tmp_path / "whole")], check=True, cwd=ROOT, capture_output=True)
    duration = time.monotonic() - started
    rng = random.Random(workers)
    kills = 0
    while kills < 10:
        moment = rng.uniform(0.3, max(1.0, duration * 0.8))
        if _kill_at(moment, [*command, "--output-prefix", str(tmp_path / "o")]):
            kills += 1
        else:
            for path in tmp_path.glob("o_*"):
                path.unlink()
    done = subprocess.run(
        [*command, "--output-prefix", str(tmp_path / "o")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert digest(tmp_path / "o_text_document") == digest(tmp_path / "whole_text_document")
    assert leftovers(tmp_path) == sorted(
        [packed.name, *(f"{name}_text_document{end}" for name in ("o", "whole") for end in (".bin", ".idx"))]
    )
    assert "Processed" in done.stderr


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_says_so(trained: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ("--input", *[trained[0]] * 3, "--tokenizer-type", "HFTokenizer", "--tokenizer-model", trained[1])
    own = ("--tokenizer-engine", "own", "--resume-interval", 0, "--log-interval", 1)
    command = [sys.executable, str(TOOL), *map(str, (*flags, *own, "--output-prefix", tmp_path / "o"))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    for _ in range(2):  # An entry is written after a line, and before the next.
        while "Processed" not in process.stderr.readline():
            pass
    process.kill()
    process.communicate()
    assert "o.preprocess.json" in leftovers(tmp_path)
    said = succeed(*flags, *own, "--output-prefix", tmp_path / "o")
    assert "continuing an unfinished run after" in said
    succeed(*flags, "--output-prefix", tmp_path / "whole", "--workers", 2)
    assert digest(tmp_path / "o_text_document") == digest(tmp_path / "whole_text_document")


def _unfinished(tmp_path: Path, source: Path) -> None:
    """What a run leaves that was killed after its first chunk, by making the second chunk impossible to encode."""
    command = [
        *(sys.executable, str(TOOL), "--input", str(source), *NULL, "--output-prefix", str(tmp_path / "o")),
        *("--resume-interval", "0"),
    ]
    code = (
        "import sys, os, runpy\n"
        "from megatron.data.preprocess import journal\n"
        "write = journal.Journal.write\n"
        "def once(self, entry):\n    write(self, entry)\n    os.kill(os.getpid(), 9)\n"
        "journal.Journal.write = once\n"
        f"sys.argv = {command[1:]!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_an_unfinished_run_of_other_settings_or_inputs_is_not_continued(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "i.jsonl", ["1 2 3"] * 100_000)
    _unfinished(tmp_path, source)
    said = succeed("--input", source, *NULL, "--output-prefix", tmp_path / "o", "--append-eod")
    assert "an unfinished run is not continued, since it had other settings" in said
    assert read(tmp_path / "o_text_document")[0] == [1, 2, 3, 1000]
    _unfinished(tmp_path, source)
    os.utime(source, (0, 0))
    said = succeed("--input", source, *NULL, "--output-prefix", tmp_path / "o")
    assert "an unfinished run is not continued, since it had other inputs" in said
    assert len(read(tmp_path / "o_text_document")) == 100_000
    assert leftovers(tmp_path) == ["o_text_document.bin", "o_text_document.idx"]


def test_two_runs_do_not_write_the_same_dataset(tmp_path: Path) -> None:
    import fcntl

    source = jsonl(tmp_path / "i.jsonl", ["1"])
    with (tmp_path / "o.preprocess.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = fail("--input", source, *NULL, "--output-prefix", tmp_path / "o")
    assert "another process is writing o now" in said
