"""Small corpora for the tests of the data path."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron.data.indexed_writer import IndexedDatasetWriter

GOLDEN = Path(__file__).parent.parent / "golden" / "data"
EOD = 0
VOCAB = 500


def write_corpus(prefix: Path, *, documents: int = 40, longest: int = 50, seed: int = 0) -> list[np.ndarray]:
    """Write random documents that end in EOD and return them."""
    rng = np.random.default_rng(seed)
    texts = [np.append(rng.integers(1, VOCAB, rng.integers(0, longest)), EOD) for _ in range(documents)]
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for text in texts:
            writer.add_document(text)
    return texts
