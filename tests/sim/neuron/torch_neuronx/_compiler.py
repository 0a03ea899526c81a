"""SIMULATION of `torch.compile(backend="neuron")`: counts what it is asked to compile and runs it as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.sim import runtime


def register() -> None:
    """Make the backend known to torch.compile; imports the machinery of that, which takes seconds."""
    from torch._dynamo.backends.registry import register_backend

    register_backend(_compile, "neuron")


def _compile(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    if options.get("options"):
        raise ValueError(f"unknown options of the neuron backend: {options['options']}")
    if any(isinstance(value, torch.SymInt) for value in inputs):
        raise RuntimeError("NCC_EMOD025: dynamic dimensions are not supported")
    runtime.library("neuron").count_event("compile")
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(graph, inputs)
