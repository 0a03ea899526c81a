"""Writes the golden files of this folder with the `megatron-core` package; see README.md. Not run by the tests."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import (
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
    _get_ltor_masks_and_position_ids,
)
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import get_blend_from_list

EOD = 0
VOCAB = 500
HERE = Path(__file__).parent

# name, number of documents, longest sequence, seed
CORPORA = [("a", 57, 60, 1), ("b", 31, 200, 2), ("c", 11, 15, 3)]

ORDER_CASES = [
    # data_path, per split paths, split, seq_length, seed, samples asked of train, valid, test
    (["a"], None, "95,5,0", 16, 1234, (40, 0, 0)),
    (["a"], None, "8,1,1", 16, 1234, (80, 4, 4)),
    (["a"], None, "90,10", 16, 7, (260, 30, 0)),
    (["a"], None, "50/30/20", 8, 0, (230, 50, 9)),
    (["a"], None, "1.0", 33, 99, (97, 0, 0)),
    (["a"], None, "0.7,0.2,0.1", 4, 42, (None, None, None)),
    (["c"], None, "100,0,0", 128, 5, (6, 0, 0)),
    (["1.0", "a"], None, "90,10,0", 16, 1234, (150, 12, 0)),
    (["0.3", "a", "0.7", "b"], None, "95,5,0", 16, 1234, (300, 0, 0)),
    (["30", "a", "60", "b", "10", "c"], None, "75,25,0", 10, 3, (700, 60, 0)),
    (["a", "b", "c"], None, "100,0,0", 16, 3, (None, None, None)),
    (["a", "b", "c"], None, "100,0,0", 16, 3, (90, 0, 0)),
    (None, (["a"], ["b"], None), None, 16, 11, (100, 20, 0)),
    (None, (["2", "a", "1", "b"], ["c"], ["a", "c"]), None, 12, 11, (210, 3, None)),
]


def write_corpus(folder: Path, name: str, documents: int, longest: int, seed: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype)
    for document in range(documents):
        parts = [int(rng.integers(0, longest)) for _ in range(2 if document % 5 == 4 else 1)]
        tokens = rng.integers(0, VOCAB, sum(parts))
        tokens[rng.random(len(tokens)) < 0.05] = EOD
        builder.add_document(torch.from_numpy(tokens), parts)
    builder.finalize(str(folder / f"{name}.idx"))


def tokenizer() -> SimpleNamespace:
    return SimpleNamespace(eod=EOD, vocab_size=VOCAB, unique_identifiers={"name": "golden"})


def config(folder: Path, blend, per_split, split, seq_length: int, seed: int) -> GPTDatasetConfig:
    def placed(entries):
        if entries is None:
            return None
        return get_blend_from_list([str(folder / e) if e in "abc" else e for e in entries])

    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=placed(blend),
        blend_per_split=None if per_split is None else [placed(part) for part in per_split],
        split=split,
        tokenizer=tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def digest(dataset) -> dict[str, object] | None:
    """How many samples a dataset has, and one hash over the tokens (with the last label) of all of them in order."""
    if dataset is None:
        return None
    sha = hashlib.sha256()
    first = []
    for index in range(len(dataset)):
        item = dataset[index]
        tokens = np.append(item["tokens"].numpy(), item["labels"].numpy()[-1]).astype("<i8")
        first.append(int(tokens[0]))
        sha.update(tokens.tobytes())
    return {"samples": len(dataset), "first_tokens": first[:12], "sha256": sha.hexdigest()}


def orders(folder: Path) -> list[dict[str, object]]:
    cases = []
    for blend, per_split, split, seq_length, seed, sizes in ORDER_CASES:
        settings = config(folder, blend, per_split, split, seq_length, seed)
        built = BlendedMegatronDatasetBuilder(GPTDataset, list(sizes), lambda: True, settings).build()
        results = [digest(dataset) for dataset in built]
        cases.append(
            {
                "data_path": blend,
                "per_split": per_split,
                "split": split,
                "seq_length": seq_length,
                "seed": seed,
                "asked": sizes,
                "datasets": results,
            }
        )
    return cases


def index_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The three index arrays of a few single datasets, to see where an order differs and not only that it does."""
    arrays = {}
    for number, (samples, seq_length, seed) in enumerate([(40, 16, 1234), (250, 16, 1), (299, 16, 1), (2000, 7, 5)]):
        settings = config(folder, ["a"], None, "100,0,0", seq_length, seed)
        dataset = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, settings).build()[0]
        arrays[f"case{number}"] = np.array([samples, seq_length, seed], dtype=np.int64)
        arrays[f"documents{number}"] = dataset.document_index
        arrays[f"samples{number}"] = dataset.sample_index
        arrays[f"shuffle{number}"] = dataset.shuffle_index
    return arrays


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 6, (12, 24))
    tokens[0] = 1
    tokens[1] = EOD
    arrays = {"tokens": tokens}
    for name, flags in {"plain": (False,) * 3, "all": (True,) * 3}.items():
        outputs = [_get_ltor_masks_and_position_ids(torch.from_numpy(row), EOD, *flags, True) for row in tokens]
        for part, values in zip(("attention", "loss", "positions"), zip(*outputs, strict=True), strict=True):
            arrays[f"{name}_{part}"] = torch.stack(values).numpy()
    return arrays


def mock() -> list[dict[str, object]]:
    cases = []
    for samples, seq_length, seed in [(64, 32, 1234), (20, 2048, 7)]:
        settings = config(HERE, None, None, None, seq_length, seed)
        built = BlendedMegatronDatasetBuilder(MockGPTDataset, [samples] * 3, lambda: True, settings).build()
        kept = [torch.utils.data.Subset(dataset, range(samples)) for dataset in built]
        cases.append(
            {
                "seq_length": seq_length,
                "seed": seed,
                "asked": samples,
                "lengths": [len(dataset) for dataset in built],
                "datasets": [digest(dataset) for dataset in kept],
            }
        )
    return cases


def main() -> None:
    for name, documents, longest, seed in CORPORA:
        write_corpus(HERE, name, documents, longest, seed, np.uint16)
    write_corpus(HERE, "wide", 7, 12, 4, np.int32)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, documents, longest, seed in CORPORA:
            write_corpus(folder, name, documents, longest, seed, np.uint16)
        answers = {"orders": orders(folder), "mock": mock()}
        (HERE / "orders.json").write_text(json.dumps(answers, indent=1) + "\n")
        np.savez_compressed(HERE / "index_arrays.npz", **index_arrays(folder))
        np.savez_compressed(HERE / "masks.npz", **masks())


if __name__ == "__main__":
    sys.exit(main())
