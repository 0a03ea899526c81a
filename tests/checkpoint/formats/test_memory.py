"""Conversions hold a few tensors at a time, however many layers there are: what torch allocates is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron.checkpoint.formats import FORMATS, ReadOptions, WriteOptions, convert, open_model
from tests.checkpoint.formats.samples import FAMILIES, random_model

ARCH = replace(FAMILIES["llama"], hidden_size=256, head_dim=32, ffn_hidden_size=512)
LARGEST = 2 * 512 * 256 * torch.float32.itemsize
"""Bytes of gate and up-projection of a layer, one tensor in most formats; in float32, as universal has them."""
TENSORS_AT_A_TIME = 2
"""A tensor, and what it is made of; the parts of ranks come after it."""


def peak_bytes(work: Callable[[], None], source: Path) -> int:
    """Most bytes that were allocated at a time, without the mapped files of `source`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    mapped = {path.stat().st_size for path in source.rglob("*") if path.is_file()}
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if abs(event.nbytes()) not in mapped), default=0)


def _peaks(kind: str, layers: int, folder: Path) -> dict[str, int]:
    layout = {"tp": 2, "pp": 2} if FORMATS[kind].sharded else {}
    convert(random_model(replace(ARCH, num_layers=layers)), "hf", folder / "hf", WriteOptions())

    def there() -> None:
        convert(open_model(folder / "hf", "hf", ReadOptions()), kind, folder / "x", WriteOptions(**layout))

    def back() -> None:
        convert(open_model(folder / "x", kind, ReadOptions()), "hf", folder / "back", WriteOptions())

    return {"there": peak_bytes(there, folder / "hf"), "back": peak_bytes(back, folder / "x")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FORMATS.keys() - {"hf"}))
def test_memory_does_not_grow_with_the_model(kind: str, tmp_path: Path) -> None:
    few, many = _peaks(kind, 2, tmp_path / "few"), _peaks(kind, 8, tmp_path / "many")
    for way in ("there", "back"):
        assert many[way] <= TENSORS_AT_A_TIME * LARGEST, way
        assert many[way] - few[way] <= LARGEST / 10, way
