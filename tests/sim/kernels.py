"""Measures every kernel of a device on the simulated one: error against float64, and whether it stays on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron import accelerators
from megatron.ops import OPERATIONS, implementations, reference
from megatron.ops.registry import Implementation
from megatron.ops.samples import Sample, prepare, relative_error, samples
from tests.sim.build import Device
from tests.sim.run import Counts, counted

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Finding:
    """Error of one implementation over all samples in one dtype, and what happened on the device meanwhile."""

    error: float
    counts: tuple[Counts, ...]


def known(device: Device) -> list[tuple[str, str]]:
    """(operation, implementation) for everything the device has, references included; needs no vendor package."""
    accelerator = accelerators.load(device)
    return [(op, candidate.name) for op in OPERATIONS for candidate in implementations(accelerator, op)]


def measure(device: Device) -> dict[tuple[str, str, torch.dtype], Finding]:
    """Run everything `known` in the dtypes it supports; on a process of the simulated device."""
    accelerator = accelerators.select(device)
    place = accelerator.set_device(0)
    found = {}
    for op in OPERATIONS:
        for candidate in implementations(accelerator, op):
            if reason := candidate.why_unavailable():
                raise AssertionError(f"{op}={candidate.name} is unavailable on the simulated {device}: {reason}")
            for dtype in (dtype for dtype in DTYPES if dtype in candidate.tolerance):
                found[op, candidate.name, dtype] = _finding(device, candidate, dtype, place)
    return found


def _finding(device: Device, candidate: Implementation, dtype: torch.dtype, place: torch.device) -> Finding:
    errors, counts = [], []
    for sample in samples(candidate.op, dtype, torch.device("cpu"), large=False):
        oracle = prepare(candidate.op, getattr(reference, candidate.op), sample.to(torch.float64))()
        call = prepare(candidate.op, candidate.function, _on(sample, place))
        with counted(device) as counter:
            results = call()
            counts.append(counter())
        errors.append(relative_error([result.cpu() for result in results], oracle))
    return Finding(max(errors), tuple(counts))


def _on(sample: Sample, place: torch.device) -> Sample:
    return sample.map(lambda tensor: tensor.to(place))
