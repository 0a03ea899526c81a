"""SIMULATION of torch_xla.distributed.xla_backend: importing it makes the collective backend "xla"."""

from __future__ import annotations

from tests.sim import runtime

runtime.register_collectives("neuron", "xla", averages=False, not_reduced=frozenset())
