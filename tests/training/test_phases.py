"""A run whose samples get longer and whose batch then grows, in one process: alike in every layout, and resumed."""

from __future__ import annotations

import pytest
import torch

from megatron.data.batch import Batch
from megatron.training.metrics import read_metrics
from tests.parity import FLOAT32_TOLERANCE, MODEL, TRAINING, difference, train
from tests.support import run_ranks

PARTS = (
    *("--scheduler-batch-size", "8", "8", "16", "--batch-sched-samples", "0", "12", "40"),
    *("--scheduler-seq-length", "16", "32", "32", "--global-batch-size", "16", "--train-samples", "72"),
)
SAMPLES = [8, 16, 24, 32, 40, 56, 72]
TOKENS = [8 * 16, 16 * 16, *(16 * 16 + n * 32 for n in (8, 16, 24, 40, 56))]
"""After every step: 2 steps of 8 half samples, as 12 is no multiple of 8; 3 of 8; 2 of 16."""


def _run(folder, ranks, *flags):
    folder.mkdir(exist_ok=True)
    metrics = folder / "metrics.jsonl"
    arguments = [*MODEL, *TRAINING, "--mock-data", "--device", "cpu", *PARTS, "--log-json", str(metrics), *flags]
    run_ranks(ranks, train, arguments, init=False)
    return [record for record in read_metrics(metrics) if record["kind"] == "train"]


@pytest.mark.slow
def test_parts_of_a_run_are_the_same_in_every_layout_and_after_a_stop(tmp_path):
    whole = _run(tmp_path / "whole", 1)
    assert [record["consumed_samples"] for record in whole] == SAMPLES
    assert [record["consumed_tokens"] for record in whole] == TOKENS
    saved = ("--save", str(tmp_path / "saved"), "--save-interval", "100")
    first = _run(tmp_path / "first", 2, *saved, "--stop-after-num-samples", "16")
    second = _run(tmp_path / "second", 1, "--load", str(tmp_path / "saved"))
    joined = [*first, *second]
    assert [record["consumed_tokens"] for record in joined] == TOKENS and len(first) == 2
    for name in ("lm_loss", "grad_norm"):
        assert difference([r[name] for r in joined], [r[name] for r in whole]) <= FLOAT32_TOLERANCE


def test_a_cut_batch_has_every_token_once_with_its_label():
    tokens = torch.arange(16).view(2, 8)
    batch = Batch(
        tokens=tokens, labels=tokens + 1, loss_mask=torch.rand(2, 8), document_ids=tokens // 3, dropout_seed=7
    )
    pieces = batch.cut(4)
    for name in ("tokens", "labels", "loss_mask", "document_ids"):
        parts = [getattr(piece, name) for piece in pieces]
        assert all(part.shape == (2, 2) and part.is_contiguous() for part in parts)
        assert torch.equal(torch.cat(parts, dim=1), getattr(batch, name))
    assert len({piece.dropout_seed for piece in pieces}) == 4 and pieces[0].position_ids is None
    assert batch.cut(1) == [batch]
