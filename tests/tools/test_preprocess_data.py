"""The preprocessing command: same bytes for any number of workers, bad records, interruptions, kinds of input."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"
NULL = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "1000")
EOD = 1000


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)


def succeed(*args: object) -> str:
    done = run(*args)
    assert done.returncode == 0, done.stderr
    return done.stderr


def fail(*args: object) -> str:
    done = run(*args)
    assert done.returncode not in (0, -signal.SIGKILL)
    assert "Traceback" not in done.stderr
    return done.stderr


def jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def read(prefix: Path) -> list[list[int]]:
    """The documents of a dataset, read by the published layout of the two files."""
    index = prefix.with_name(prefix.name + ".idx").read_bytes()
    magic, version, code, sequences, documents = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    dtype = {8: np.uint16, 4: np.int32}[code]
    lengths = np.frombuffer(index, np.int32, sequences, 34)
    offsets = np.frombuffer(index, np.int64, sequences, 34 + 4 * sequences)
    starts = np.frombuffer(index, np.int64, documents, 34 + 12 * sequences)
    assert starts.tolist() == list(range(sequences + 1))
    tokens = np.fromfile(prefix.with_name(prefix.name + ".bin"), dtype)
    assert tokens.size == lengths.sum()
    first = offsets // tokens.itemsize
    return [tokens[a : a + n].tolist() for a, n in zip(first, lengths, strict=True)]


def digest(prefix: Path) -> list[str]:
    return [hashlib.sha256(prefix.with_name(prefix.name + end).read_bytes()).hexdigest() for end in (".bin", ".idx")]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix not in (".jsonl", ".txt"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus of this project's sources, several chunks long, and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    sources = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("megatron/tokenizer/*.py"))]
    corpus = jsonl(
        folder / "corpus.jsonl", [f"{number} \u00e9\u5b57 {text}" for number in range(60) for text in sources]
    )
    assert corpus.stat().st_size > 2.5e6
    tool = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py")]
    command = [*tool, "--input", str(corpus), "--output", str(folder / "tokenizer"), "--vocab-size", "600"]
    subprocess.run(command, check=True, capture_output=True)
    return corpus, folder / "tokenizer"


@pytest.mark.slow
def test_same_bytes_for_any_number_of_workers_and_documents_decode_back(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    corpus, folder = trained
    flags = ("--input", corpus, "--tokenizer-type", "HFTokenizer", "--tokenizer-model", folder, "--append-eod")
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    prefixes = []
    for workers in (1, 2, 3):
        said = succeed(*flags, "--workers", workers, "--output-prefix", tmp_path / str(workers), "--log-interval", 100)
        prefixes.append(tmp_path / f"{workers}_text_document")
        assert f"Processed {len(texts)} documents (" in said
        assert said.count("docs/s") > 2
    assert digest(prefixes[0]) == digest(prefixes[1]) == digest(prefixes[2])
    import tokenizers

    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    eod = reference.token_to_id("<|endoftext|>")
    documents = read(prefixes[0])
    assert all(ids[-1] == eod for ids in documents)
    assert reference.decode_batch([ids[:-1] for ids in documents], skip_special_tokens=False) == texts
    files = ("--vocab-file", folder / "vocab.json", "--merge-file", folder / "merges.txt")
    kind = ("--tokenizer-type", "GPT2BPETokenizer", "--append-eod", "--output-prefix", tmp_path / "gpt2")
    succeed("--input", corpus, *files, *kind)
    assert digest(tmp_path / "gpt2_text_document") == digest(prefixes[0])


def test_kinds_of_input_and_their_order(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", ["1 2", "3"])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(tmp_path / "x.jsonl", ["4 5"]).read_bytes()))
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbf6\r\n\r\n7 8")
    (tmp_path / "x.jsonl").unlink()
    inputs = ("--input", tmp_path / "d.txt", tmp_path / "[bc].jsonl*")
    succeed(*inputs, *NULL, "--output-prefix", tmp_path / "o")
    assert read(tmp_path / "o_text_document") == [[6], [7, 8], [1, 2], [3], [4, 5]]
    succeed(*inputs, *NULL, "--output-prefix", tmp_path / "new" / "o", "--text-unit", "file", "--append-eod")
    expected = [[6, 7, 8], [1, 2], [3], [4, 5]]
    assert read(tmp_path / "new" / "o_text_document") == [[*ids, EOD] for ids in expected]


def test_every_json_key_becomes_a_dataset(tmp_path: Path) -> None:
    lines = [{"a": "1", "b": "2 3", "c": 0}, {"b": "4", "a": "5 6"}]
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, lines)))
    succeed("--input", tmp_path / "i.jsonl", "--json-keys", "a", "b", *NULL, "--output-prefix", tmp_path / "o")
    assert read(tmp_path / "o_a_document") == [[1], [5, 6]]
    assert read(tmp_path / "o_b_document") == [[2, 3], [4]]


BAD = [
    (b'{"text": "1"', "invalid JSON"),
    (b'["1"]', "invalid JSON: a list, not an object"),
    (b'{"body": "1"}', "missing key: no 'text'; it has 'body'"),
    (b'{"text": 7}', "not text: 'text' is a int, not a string"),
    (b'{"text": ""}', "empty: the text of 'text' is empty"),
    (b'{"text": " "}', "empty: gives no tokens"),
    (b'{"text": "\xff"}', "invalid UTF-8: byte 0xff at offset 10"),
    (b'{"text": "1 x"}', "invalid text: is not numbers"),
    (b"[" * 100_000, "invalid JSON"),
]


@pytest.mark.parametrize(("record", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_record_ends_the_run_and_is_named(tmp_path: Path, record: bytes, message: str) -> None:
    source = tmp_path / "i.jsonl"
    source.write_bytes(b'{"text": "1"}\n\n' + record + b'\n{"text": "2"}\n')
    said = fail("--input", source, *NULL, "--output-prefix", tmp_path / "o")
    assert f"{source}:3: {message}" in said
    assert "--on-error skip" in said
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_skipped_records_are_counted_and_named(tmp_path: Path, workers: int) -> None:
    source = tmp_path / "i.jsonl"
    source.write_bytes(b'{"text": "1"}\n' + b"\n".join(record for record, _ in BAD) + b'\n{"text": "2"}\n')
    said = succeed(
        "--input", source, *NULL, "--output-prefix", tmp_path / "o", "--on-error", "skip", "--workers", workers
    )
    assert read(tmp_path / "o_text_document") == [[1], [2]]
    assert (
        "Skipped 9 of 11 records: 2 empty, 3 invalid JSON, 1 invalid UTF-8, 1 invalid text, 1 missing key, 1 not text."
    ) in said
    assert all(f"{source}:{line}: {message}" in said for line, (_, message) in enumerate(BAD, start=2))
    assert "Processed 2 documents" in said


def test_lone_surrogates_are_bad_records(trained: tuple[Path, Path], tmp_path: Path) -> None:
    source = jsonl(tmp_path / "i.jsonl", ["fine", "a\ud800b"])
    said = fail(
        *("--input", source, "--tokenizer-type", "HFTokenizer", "--tokenizer-model", trained[1]),
        *("--output-prefix", tmp_path / "o"),
    )
    assert f"{source}:2: invalid text: is not valid Unicode: lone surrogate at character 1" in said


def test_inputs_that_cannot_be_used(tmp_path: Path) -> None:
    prefix = ("--output-prefix", tmp_path / "o", *NULL)
    assert "no such file, and no file matches" in fail("--input", tmp_path / "no*", *prefix)
    assert "is a folder without any of *.jsonl, " in fail("--input", tmp_path, *prefix)
    empty = jsonl(tmp_path / "e.jsonl", [])
    assert f"no documents in {empty}" in fail("--input", empty, *prefix)
    array = tmp_path / "a.jsonl"
    array.write_text('[{"text": "1"}, {"text"')
    assert "is no valid JSON array, near value 2" in fail("--input", array, *prefix)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(gzip.compress(b'{"text": "1"}\n' * 1000)[:-9])
    assert "cannot be read to its end" in fail("--input", cut, *prefix)
    text = tmp_path / "t.txt"
    text.write_text("1")
    assert ".txt files have no keys" in fail("--input", text, *prefix, "--json-keys", "body")
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_flags_that_cannot_be_obeyed(tmp_path: Path) -> None:
    given = ("--input", jsonl(tmp_path / "i.jsonl", ["1"]), "--output-prefix", tmp_path / "o")
    assert "--keep-newlines and --lang go with --split-sentences" in fail(*given, *NULL, "--keep-newlines")
    assert "--workers 0: must be at least 1" in fail(*given, *NULL, "--workers", 0)
    assert "names a key twice" in fail(*given, *NULL, "--json-keys", "a", "a")
    assert "invalid choice: 'lazy'" in fail(*given, *NULL, "--dataset-impl", "lazy")
    assert "did you mean NullTokenizer" in fail(*given, "--tokenizer-type", "nulltokenizer", "--vocab-size", "9")
    said = succeed(*given, *NULL, "--partitions", 4, "--workers", 2, "--keep-sequential-samples", "--seq-length=8")
    for flag in ("--partitions", "--keep-sequential-samples", "--seq-length"):
        assert f"{flag} changes nothing: " in said
    assert read(tmp_path / "o_text_document") == [[1]]


def _start(tmp_path: Path, trained: tuple[Path, Path]) -> subprocess.Popen[str]:
    """A run that is encoding in two workers and takes many seconds to end."""
    inputs = [str(trained[0])] * 40
    command = [
        *(sys.executable, str(TOOL), "--input", *inputs, "--output-prefix", str(tmp_path / "o"), "--workers", "2"),
        *("--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(trained[1]), "--log-interval", "1"),
        *("--tokenizer-engine", "own"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    assert "tokenization engine: " in process.stderr.readline()
    assert "Processed" in process.stderr.readline()
    return process


def _workers(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            is_child = f"\nPPid:\t{parent}\n" in status.read_text()
            if is_child and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
        except OSError:
            continue  # It ended while we looked.
    return found


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("how", ["worker killed", "interrupted", "terminated"])
def test_an_unfinished_run_ends_soon_and_leaves_nothing(trained: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    process = _start(tmp_path, trained)
    workers = _workers(process.pid)
    assert len(workers) == 2
    if how == "worker killed":
        os.kill(workers[0], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGINT if how == "interrupted" else signal.SIGTERM)
    started = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - started < 10
    expected = "was ended by SIGKILL" if how == "worker killed" else "interrupted; no dataset was written"
    assert expected in said
    assert "Traceback" not in said
    assert process.returncode == (1 if how == "worker killed" else 130)
    assert leftovers(tmp_path) == []
    assert not any(_alive(pid) for pid in workers)


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(trained: tuple[Path, Path], tmp_path: Path) -> None:
    process = _start(tmp_path, trained)
    workers = _workers(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(pid) for pid in workers)
    assert not any(name.endswith(("document.bin", "document.idx")) for name in leftovers(tmp_path))


def test_the_tool_starts_without_heavy_packages(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "i.jsonl", ["1"])
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['t', '--input', {str(source)!r}, '--output-prefix', {str(tmp_path / 'o')!r}, *{NULL!r}]\n"
        "try:\n    runpy.run_path('tools/preprocess_data.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'deepspeed', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_a_terminal_shows_a_bar_and_ctrl_c_ends_the_run(trained: tuple[Path, Path], tmp_path: Path) -> None:
    command = [
        *(sys.executable, str(TOOL), "--input", *[str(trained[0])] * 40, "--output-prefix", str(tmp_path / "o")),
        *("--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(trained[1]), "--workers", "2"),
        *("--tokenizer-engine", "own"),
    ]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(command[0], command)
    said = b""
    while b" documents, " not in said:
        assert select.select([terminal], [], [], 15)[0], said
        said += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error.
        while more := os.read(terminal, 4096):
            said += more
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert re.search(rb"\d+%\|.*\| [\d.]+M/[\d.]+M \[.* [\d,]+ documents, [\d.]+ MB/s", said)
    assert said.rstrip().endswith(b"error: interrupted; no dataset was written. The same command goes on from here")
    assert b"Traceback" not in said
    assert leftovers(tmp_path) == []
