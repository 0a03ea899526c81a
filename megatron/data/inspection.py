"""What a corpus holds, and what is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.data.errors import DataError
from megatron.data.index_file import HEADER, read_index, token_dtype
from megatron.data.indexed_dataset import IndexedDataset, bin_path, idx_path

_PIECE = 1 << 24
_FLOATS = (6, 7)


@dataclass(kw_only=True)
class Inspection:
    """Numbers of one corpus; without `data` it cannot be read."""

    prefix: str
    data: IndexedDataset | None = None
    highest: int = 0
    lowest: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The report."""
        yield f"{self.prefix}"
        if self.data is not None:
            lengths, documents = self.data.lengths, self.data.index.documents
            tokens = self.data.index.num_tokens
            yield f"  {len(documents) - 1} documents, {len(lengths)} sequences, {tokens} tokens of {self.data.dtype}"
            if len(lengths):
                quarters = np.percentile(lengths, [0, 25, 50, 75, 100]).astype(int).tolist()
                yield f"  tokens of a sequence: {lengths.mean():.1f} on average, quartiles {quarters}"
            if tokens:
                yield f"  token ids from {self.lowest} to {self.highest}"
        yield from (f"  note: {note}" for note in self.notes)
        yield from (f"  PROBLEM: {problem}" for problem in self.problems)
        if not self.problems:
            yield "  no problems found"


def inspect_dataset(prefix: str, *, vocab_size: int | None = None, eod: int | None = None) -> Inspection:
    """Read all of a corpus and look for the damage that tools are known to make.

    Args:
        prefix: path without `.bin` and `.idx`.
        vocab_size: ids from there on are a problem.
        eod: token that should end every document and occur nowhere else.
    """
    found = Inspection(prefix=prefix)
    try:
        found.data = IndexedDataset(prefix)
    except DataError as error:
        found.problems.append(str(error))
        found.problems += _known_damage(prefix)
        return found
    _look_at_tokens(found, found.data, vocab_size)
    empty = int((found.data.lengths == 0).sum())
    if empty:
        found.notes.append(f"{empty} sequences are empty")
    if vocab_size is not None:
        _look_at_width(found, found.data, vocab_size)
    if eod is not None:
        _look_at_ends(found, found.data, eod)
    return found


def _known_damage(prefix: str) -> Iterator[str]:
    """Names of damage that the reader only calls contradictory."""
    if not idx_path(prefix).is_file() or idx_path(prefix).stat().st_size < HEADER.size:
        return
    content = idx_path(prefix).read_bytes()
    _, _, code, sequences, documents = HEADER.unpack(content[: HEADER.size])
    if code in _FLOATS:
        yield (
            "the token type is a float; 6 is float64 and 7 is float32 in Megatron, and the other way round in "
            "GPT-NeoX. Token ids were never meant to be floats: preprocess again"
        )
        return
    if len(content) != HEADER.size + 12 * sequences + 8 * documents or not bin_path(prefix).is_file():
        return
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
    itemsize = bin_path(prefix).stat().st_size // max(1, int(lengths.sum()))
    starts = (np.cumsum(lengths) - lengths) * itemsize
    if not np.array_equal(pointers, starts) and np.array_equal(pointers, starts.astype(np.int32)):
        yield "byte offsets were computed with 32 bits and overflowed beyond 2 GiB: preprocess again"


def _look_at_tokens(found: Inspection, data: IndexedDataset, vocab_size: int | None) -> None:
    highest, lowest = [0], [0]
    outside = 0
    for tokens in _pieces(data):
        highest.append(int(tokens.max()))
        lowest.append(int(tokens.min()))
        if vocab_size is not None:
            outside += int(((tokens >= vocab_size) | (tokens < 0)).sum())
    found.highest, found.lowest = max(highest), min(lowest)
    if outside:
        found.problems.append(
            f"{outside} token ids are outside of the vocabulary of {vocab_size}: made with another tokenizer"
        )
    elif found.lowest < 0:
        found.notes.append("some ids are negative, as in labels of instruction data")


def _look_at_width(found: Inspection, data: IndexedDataset, vocab_size: int) -> None:
    right = token_dtype(vocab_size)
    if np.iinfo(data.dtype).max < vocab_size - 1:
        found.problems.append(
            f"{data.dtype} cannot hold all ids of a vocabulary of {vocab_size}: larger ids have been cut off. "
            "Preprocess again"
        )
    elif data.dtype.itemsize > right.itemsize:
        found.notes.append(
            f"{right} would hold this vocabulary: tools/split_dataset.py --dtype {right} halves the file"
        )


def _look_at_ends(found: Inspection, data: IndexedDataset, eod: int) -> None:
    documents = data.index.documents
    filled = documents[1:][documents[1:] > documents[:-1]] - 1
    filled = filled[data.lengths[filled] > 0]
    lengths = data.lengths[filled].tolist()
    last = [int(data.read(sequence, n - 1, n)[0]) for sequence, n in zip(filled.tolist(), lengths, strict=True)]
    missing = sum(token != eod for token in last)
    inside = sum(int((tokens == eod).sum()) for tokens in _pieces(data)) - (len(filled) - missing)
    if missing and missing < len(filled):
        found.problems.append(f"{missing} of {len(filled)} documents do not end with EOD ({eod}), the others do")
    elif missing:
        found.notes.append(f"no document ends with EOD ({eod}): written without --append-eod")
    if inside:
        found.notes.append(f"EOD ({eod}) occurs {inside} times inside of documents")


def _pieces(data: IndexedDataset) -> Iterator[npt.NDArray[np.generic]]:
    total = data.index.num_tokens
    for first in range(0, total, _PIECE):
        yield data.read(0, first, min(first + _PIECE, total))


def checksum(prefix: str) -> Iterator[str]:
    """SHA-256 of both files, in the form of sha256sum."""
    for path in (bin_path(prefix), idx_path(prefix)):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        yield f"{digest.hexdigest()}  {path}"


def draw_histogram(prefix: str, file: Path) -> None:
    """A PNG of how long the sequences are.

    Raises:
        DataError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DataError("--histogram needs matplotlib: pip install matplotlib") from error
    lengths = read_index(idx_path(prefix)).lengths
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    top = max(2, int(lengths.max(initial=1)))
    axes.hist(np.maximum(lengths, 1), bins=np.geomspace(1, top, 60).tolist())
    axes.set_xscale("log")
    axes.set_xlabel("tokens of a sequence")
    axes.set_ylabel("sequences")
    axes.set_title(f"{Path(prefix).name}: {len(lengths)} sequences, {int(lengths.sum(dtype=np.int64))} tokens")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
