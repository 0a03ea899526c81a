"""A checkpoint fits every layout: tensor, data and pipeline parallelism, FSDP2, one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.checkpoint.manifest import read_manifest
from tests.checkpoint.helpers import SHAPES, WORDS, Layout, read_and_write_again, write_known
from tests.support import run_ranks

# Each is loaded from a checkpoint of the one before it; the padded vocabulary is 104, 112, 104, 128, 112, 104 rows.
CHAIN = (
    Layout(tp=2, dp=2, fsdp=True),
    Layout(dp=2, fsdp=True),
    Layout(tp=4, kv_shards=2),
    Layout(tp=2, pp=2),
    Layout(),
)


@pytest.mark.slow
def test_every_layout_reads_every_other_bit_for_bit(tmp_path: Path) -> None:
    write_known(str(tmp_path / "0"), Layout())
    for step, layout in enumerate(CHAIN):
        source, target = tmp_path / f"{step}", tmp_path / f"{step + 1}"
        if layout.size == 1:
            read_and_write_again(str(source), str(target), layout)
        else:
            run_ranks(layout.size, read_and_write_again, str(source), str(target), layout)
        folder = target / "iter_0000007"
        assert len(list(folder.glob("*.distcp"))) == layout.size
        records = read_manifest(folder).tensors
        assert {name: records[f"model.{name}"].shape for name in SHAPES} == SHAPES
    assert read_manifest(folder).tensors["optimizer.exp_avg.head.weight"].shape[0] == WORDS


def test_replicated_tensors_are_written_once(tmp_path: Path) -> None:
    write_known(str(tmp_path / "one"), Layout())
    run_ranks(2, write_known, str(tmp_path / "two"), Layout(dp=2))
    sizes = [sum(f.stat().st_size for f in (tmp_path / n / "iter_0000007").glob("*.distcp")) for n in ("one", "two")]
    assert sizes[0] == sizes[1]
    each = [f.stat().st_size for f in (tmp_path / "two" / "iter_0000007").glob("*.distcp")]
    # The ranks share the writing of what both hold.
    assert min(each) > max(each) / 2
