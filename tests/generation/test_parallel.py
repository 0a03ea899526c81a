"""Tensor-parallel ranks and pipeline stages write what one process writes, and all of them know it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.formats.lazy import in_memory
from megatron.checkpoint.formats.model import StoredModel
from megatron.generation import BeamSettings, Continuation, Sampling
from megatron.generation.prompts import from_first_rank
from megatron.generation.restore import restore
from megatron.generation.session import start
from megatron.model import hf
from megatron.model.hf_config import architecture_from_hf_config
from megatron.tokenizer import TokenizerSettings, build_tokenizer
from tests.generation.helpers import PROMPTS, reader_of, sampled, searched
from tests.model.test_hf import CASES, _random_model
from tests.support import run_ranks

LAYERS = {"llama-gqa": "num_hidden_layers", "bloom": "n_layer", "gpt2": "n_layer"}
ENDS = frozenset({2, 7, 19, 23, 40, 55, 66, 81})
LAYOUTS = ((4, 1), (2, 2), (1, 4))


def _four_layers(case: str) -> Any:
    kind, settings = CASES[case]
    return _random_model(kind, {**settings, LAYERS[case]: 4}).eval()


def _all_ways(read: object) -> list[list[Continuation]]:
    return [
        sampled(read, ends=ENDS, length=10),
        sampled(read, sampling=Sampling(temperature=1.2, top_k=30), length=6),
        searched(read, BeamSettings(width=3), ends=ENDS, length=8),
    ]


def _on_ranks() -> dict[tuple[str, int, int], list[list[Continuation]]]:
    found = {}
    tokenizer = build_tokenizer(TokenizerSettings(type="NullTokenizer", vocab_size=82))
    for tp, pp in LAYOUTS:
        session = start("cpu", tp=tp, pp=pp, env={"WORLD_SIZE": "4", "RANK": str(dist.get_rank())})
        for case in LAYERS:
            theirs = _four_layers(case)
            arch = architecture_from_hf_config(theirs.config.to_dict())
            source = StoredModel(arch=arch, weights=in_memory(hf.from_hf(theirs.state_dict(), arch)))
            found[case, tp, pp] = _all_ways(restore(source, tokenizer, session, dtype=torch.float32).reader)
    assert from_first_rank(["a", "b"] if dist.get_rank() == 0 else None) == ["a", "b"]
    return found


@pytest.mark.slow
def test_every_layout_writes_the_same() -> None:
    expected = {case: _all_ways(reader_of(_four_layers(case))) for case in LAYERS}
    ranks = run_ranks(4, _on_ranks, timeout=600)
    assert len(ranks[0]) == len(LAYERS) * len(LAYOUTS)
    for found in ranks:
        for (case, tp, pp), results in found.items():
            assert results == expected[case], (case, tp, pp)
            assert len(results[0]) == len(PROMPTS)
