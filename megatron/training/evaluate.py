"""Mean loss over held-out data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from megatron.data.batch import Batch
from megatron.data.loader import BatchStream
from megatron.training.engine import Engine


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        loss: mean loss per unmasked token in nats; NaN if there was none.
        tokens: unmasked tokens.
    """

    loss: float
    tokens: float


def evaluate(engine: Engine, steps: Iterable[Sequence[Batch]]) -> EvaluationResult:
    """The mean over all unmasked tokens of all steps; called by all ranks with equally many steps.

    Args:
        engine: holds the model.
        steps: this rank's micro-batches of each step.
    """
    loss_sum = token_sum = 0.0
    for microbatches in steps:
        loss, tokens = engine.eval_step(microbatches)
        loss_sum += loss
        token_sum += tokens
    return EvaluationResult(loss=loss_sum / token_sum if token_sum else float("nan"), tokens=token_sum)


def evaluation_steps(stream: BatchStream, steps: int, microbatches: int) -> Iterator[list[Batch]]:
    """The micro-batches of each step of an evaluation.

    Args:
        stream: goes on where the last evaluation ended.
        steps: how many; -1 = the whole set from its beginning, whose last step may be shorter.
        microbatches: of a step.
    """
    if steps >= 0:
        for _ in range(steps):
            yield [next(stream) for _ in range(microbatches)]
        return
    stream.rewind()
    while batches := list(islice(stream, microbatches)):
        yield batches
