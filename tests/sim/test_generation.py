"""Text is written on the simulated devices as on the CPU: token by token, keys and values kept on the device."""

from __future__ import annotations

import pytest
import torch

from megatron.generation import Ending, Reader, Sampled, Sampling, generate
from megatron.generation.session import start
from tests.model.helpers import FAMILIES
from tests.sim import snapshot
from tests.sim.build import Device
from tests.sim.run import DEVICES, Counts, counted, run_on_sim
from tests.sim.test_llama import _model

pytestmark = pytest.mark.slow

LENGTH = 12
PROMPTS = ((5, 17, 42, 8, 61, 30), (11,), (3, 14, 15))


def _written(device: str) -> list[list[int]]:
    session = start(device, tp=1, pp=1, env={})
    texts = []
    for family in ("llama", "bloom"):
        arch = FAMILIES[family]
        model = _model(arch, session.ops, session.device, torch.float32)
        endings = [Ending(tokens=frozenset(), length=LENGTH)] * len(PROMPTS)
        search = Sampled(PROMPTS, endings, sampling=Sampling(temperature=0.0), seeds=[0] * len(PROMPTS))
        written = generate(Reader(model, arch, session.groups), PROMPTS, search, new_tokens=LENGTH)
        texts += [text.tokens for text in written]
    return texts


def _counted(device: Device) -> tuple[list[list[int]], Counts]:
    with counted(device) as counts:
        return _written(device), counts()


@pytest.mark.parametrize("device", DEVICES)
def test_text_equals_the_cpus(device):
    ((texts, counts),) = run_on_sim(device, _counted, device)
    assert len(texts) == 2 * len(PROMPTS)
    assert texts == _written("cpu")
    assert (counts.to_host, counts.host_reads) == (2 * LENGTH, {}), "the logits of each token of the two models"
    if device != "neuron":  # its vendor publishes no table of operators
        assert sorted(counts.torch_operators() - set(snapshot.read(device)["native"])) == []
