"""A step, a log line and an evaluation with numbers that are easy to recognise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.training.report import Evaluation, TrainingReport, summarise


@dataclass(frozen=True, kw_only=True)
class Result:
    loss: Any
    grad_norm: Any = 1.0
    skipped: bool = False
    loss_scale: Any = 1.0
    num_zeros: Any = None
    router: Any = None


REPORT = TrainingReport(
    iteration=20,
    train_iterations=500,
    consumed_samples=640,
    consumed_tokens=81920,
    seconds_per_step=0.5126,
    learning_rate=3e-4,
    global_batch_size=32,
    interval=summarise([Result(loss=2.0, grad_norm=0.9), Result(loss=3.0, grad_norm=1.2345, loss_scale=4096)]),
    samples_per_second=62.4,
    tokens_per_second_per_device=1996.8,
    tflops=12.346,
)
EVALUATION = Evaluation(iteration=20, consumed_samples=640, consumed_tokens=81920, split="validation", loss=2.0)
