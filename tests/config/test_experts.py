"""Which layers have experts, how many parameters a token meets, and that a record describes experts again."""

from __future__ import annotations

import pytest

from megatron.checkpoint.formats.settings import settings_of
from megatron.config.architecture import Architecture
from megatron.config.experts import expert_layers, pattern_of
from megatron.config.presets import PRESETS
from megatron.config.record import architecture_of
from megatron.config.run import parse
from megatron.training.flops import forward_flops

RUN = "--mock-data --micro-batch-size 1 --seq-length 8 --lr 1 --train-iters 1 --no-pad-vocab-size"


def _architecture(*words: str, name: str = "mixtral-8x7b") -> Architecture:
    return parse([*RUN.split(), "--preset", name, *words], {}).architecture(PRESETS[name].vocab_size)


@pytest.mark.parametrize(
    ("interval", "pattern", "expected"),
    [
        (1, None, (0, 1, 2, 3, 4, 5)),
        (2, None, (1, 3, 5)),  # Megatron-DeepSpeed counts layers from 1
        (1, "2", (0, 2, 4)),  # Megatron-LM from 0
        (1, "[1]*2+[0,1]*2", (0, 1, 3, 5)),
        (1, "2*[0, 1, 1]", (1, 2, 4, 5)),
    ],
)
def test_layers_with_experts(interval: int, pattern: str | None, expected: tuple[int, ...]) -> None:
    assert expert_layers(6, interval, pattern) == expected
    assert expert_layers(6, 1, pattern_of(expected, 6)) == expected


@pytest.mark.parametrize("pattern", ["", "0", "[2]*6", "[1]*-1", "open('x')", "[1]*99999", "[1,"])
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="--moe-layer-freq"):
        expert_layers(6, 1, pattern)


def test_a_token_meets_two_experts_of_mixtral() -> None:
    arch = _architecture()
    unvisited = 32 * 6 * 3 * 4096 * 14336
    assert arch.num_parameters(active=True) == 46702792704 - unvisited
    matrices = arch.num_parameters(active=True) - 2 * 32000 * 4096 - 65 * 4096  # without vocabulary and norms
    assert forward_flops(arch, 128).projections == 2 * 128 * matrices


def test_a_record_describes_experts_again() -> None:
    words = ("--moe-layer-freq", "[0]*2+[1]*30", "--moe-shared-expert-intermediate-size", "64", "--topk", "1")
    arch = _architecture(*words)
    assert arch.experts is not None and arch.experts.pre_softmax and arch.expert_layers == 30
    assert architecture_of(settings_of(arch), arch.vocab_size).experts == arch.experts


def test_one_capacity_factor_of_megatron_lm_means_dropping() -> None:
    run = parse([*RUN.split(), "--preset", "mixtral-8x7b", "--moe-expert-capacity-factor", "1.5"], {})
    moe = run.moe
    assert moe.moe_token_dropping and moe.moe_train_capacity_factor == moe.moe_eval_capacity_factor == 1.5
