"""Repairs the index of a corpus whose EOD tokens were not counted.

Some versions of Megatron-DeepSpeed appended an EOD to each document with `--append-eod` and left it out of the lengths
in the `.idx`, so that document number i is read i tokens too early. The tokens themselves are right.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from megatron.data.errors import DataError
from megatron.data.index_file import read_index, write_index
from megatron.data.indexed_dataset import IndexedDataset, bin_path, has_shifted_documents, idx_path, last_sequences


def repair_append_eod(prefix: str | Path) -> None:
    """Count the EOD tokens: replaces `prefix.idx` and keeps the old one as `prefix.idx.before-repair`.

    Raises:
        DataError: the pair does not have this damage.
    """
    index = read_index(idx_path(prefix))
    if not has_shifted_documents(bin_path(prefix), index):
        raise DataError(f"{prefix} does not have uncounted EOD tokens; nothing was changed.")
    lengths = np.array(index.lengths)
    lengths[last_sequences(index)] += 1
    target = idx_path(prefix)
    temporary = target.with_name(target.name + ".repaired.tmp")
    with temporary.open("wb") as file:
        write_index(file, index.dtype, lengths, index.documents)
        file.flush()
        os.fsync(file.fileno())
    backup = target.with_name(target.name + ".before-repair")
    backup.unlink(missing_ok=True)
    backup.hardlink_to(target)
    temporary.replace(target)
    IndexedDataset(prefix)


def main(arguments: list[str]) -> int:
    """Repair each prefix on the command line."""
    if not arguments:
        print("usage: python -m megatron.data.repair PREFIX ...", file=sys.stderr)
        return 2
    for prefix in arguments:
        try:
            repair_append_eod(prefix)
        except DataError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{prefix}: repaired")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
