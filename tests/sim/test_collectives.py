"""Collectives of the simulated devices: right numbers, for their own tensors only, once they are waited for."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.sim.build import Device
from tests.sim.run import DEVICES, counted, run_on_sim

pytestmark = pytest.mark.slow
every_device = pytest.mark.parametrize("device", DEVICES)


def _numbers(device: Device, *values: float) -> Tensor:
    return torch.tensor(values, device=device)


def _collectives(device: Device) -> None:
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    x = _numbers(device, rank + 1.0, 10.0)
    dist.all_reduce(x)
    assert x.tolist() == [3.0, 20.0]
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    parts = [torch.empty(1, device=device) for _ in range(2)]
    dist.all_gather(parts, _numbers(device, float(rank)))
    assert [part.item() for part in parts] == [0.0, 1.0]
    whole = torch.empty(2, device=device)
    dist.all_gather_into_tensor(whole, _numbers(device, float(rank)))
    assert whole.tolist() == [0.0, 1.0]
    part = torch.empty(1, device=device)
    dist.reduce_scatter_tensor(part, _numbers(device, 1.0 + rank, 5.0 + rank))
    assert part.item() == [3.0, 11.0][rank]
    dist.reduce_scatter(part, [_numbers(device, 1.0), _numbers(device, 2.0)])
    assert part.item() == [2.0, 4.0][rank]
    y = _numbers(device, float(rank))
    dist.broadcast(y, src=1)
    assert y.item() == 1.0
    dist.reduce(y, dst=0)
    assert rank == 1 or y.item() == 2.0
    swapped = torch.empty(2, device=device)
    dist.all_to_all_single(swapped, _numbers(device, 10.0 * rank, 10.0 * rank + 1))
    assert swapped.tolist() == [float(rank), 10.0 + rank]
    gathered = [torch.empty(1, device=device) for _ in range(2)] if rank == 0 else None
    dist.gather(_numbers(device, float(rank)), gathered, dst=0)
    assert rank == 1 or (gathered is not None and [z.item() for z in gathered] == [0.0, 1.0])
    dist.scatter(part, [_numbers(device, 7.0), _numbers(device, 8.0)] if rank == 0 else None, src=0)
    assert part.item() == 7.0 + rank
    received = torch.empty(1, device=device)
    requests = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, _numbers(device, float(rank)), other), dist.P2POp(dist.irecv, received, other)]
    )
    for request in requests:
        request.wait()
    assert received.item() == other
    objects: list[object] = [None, None]
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": 0}, {"rank": 1}]
    alone = [dist.new_group([number]) for number in range(2)][rank]
    z = _numbers(device, float(rank))
    dist.all_reduce(z, group=alone)
    assert z.item() == rank
    dist.barrier()


@every_device
def test_collectives_give_the_right_numbers(device):
    run_on_sim(device, _collectives, device, world_size=2)


def _misuse(device: Device) -> None:
    with pytest.raises(RuntimeError, match="cpu"):
        dist.all_reduce(torch.ones(2))
    if device == "npu":
        with pytest.raises(RuntimeError, match="Double"):
            dist.all_reduce(torch.ones(2, dtype=torch.float64, device=device))
    if device == "hpu":
        with pytest.raises(RuntimeError, match="AVG"):
            dist.all_reduce(torch.ones(2, device=device), op=dist.ReduceOp.AVG)
    else:
        x = _numbers(device, float(dist.get_rank()))
        dist.all_reduce(x, op=dist.ReduceOp.AVG)
        assert x.item() == 0.5


@every_device
def test_what_the_backends_refuse(device):
    run_on_sim(device, _misuse, device, world_size=2)


def _forgotten_wait(device: Device) -> None:
    x = torch.ones(2, device=device)
    work = dist.all_reduce(x, async_op=True)
    dist.barrier()
    assert x.tolist() == [1.0, 1.0], "the result is not there before it is waited for"
    work.wait()
    assert x.tolist() == [2.0, 2.0]
    with counted(device) as counts:
        dist.all_reduce(x)
        found = counts()
    assert found.collectives == {"allreduce": 1}
    assert (found.to_device, found.to_host) == (0, 0), "staging is part of the simulated network, not of the program"


@every_device
def test_a_result_arrives_when_it_is_waited_for(device):
    run_on_sim(device, _forgotten_wait, device, world_size=2)
