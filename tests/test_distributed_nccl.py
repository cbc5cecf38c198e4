"""The same on GPUs over NCCL: one process for each of up to two GPUs; with one GPU, all exchanges of one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import distributed as dist

from agsurgery import AGS, GradientSurgery, PCGrad, Replicas, agreement, distributed
from tests._distributed import alone, checks, equal_everywhere, outcomes
from tests.test_distributed_ddp import Net, batches, losses_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def exchanging(world: int) -> Iterator[None]:
    """With a single process, exchange as if there were more."""
    if world > 1:
        yield
        return
    kinds = distributed.Processes
    before = agreement.several_processes, kinds._all_groups, kinds.averaging
    agreement.several_processes = lambda: True
    kinds._all_groups = lambda self: [self._group]
    kinds.averaging = property(lambda self: True)
    try:
        yield
    finally:
        agreement.several_processes, kinds._all_groups, kinds.averaging = before


def _pair(rank: int, world: int, method, **options):
    net, single = Net().to(DEVICE), Net().to(DEVICE)
    base = lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)  # noqa: E731
    optimizer = GradientSurgery(base(net), method(), process_group=Replicas(**options))
    reference = GradientSurgery(base(single), method())

    def step(number: int) -> None:
        parts = [part.to(DEVICE) for part in batches(number, [8 // world] * world)]
        for model, surgery, x in (
            (net, optimizer, parts[rank]),
            (single, reference, torch.cat(parts)),
        ):
            surgery.zero_grad()
            losses = losses_of(model(x))
            if surgery is reference:
                with alone():
                    surgery.backward(losses)
            else:
                with exchanging(world):
                    surgery.backward(losses)
            surgery.step()

    return net, single, step


def check_several_gpus_equal_one(rank, world):
    for method in (AGS, lambda: PCGrad(seed=4)):
        for exchange in ("reduce_scatter", "all_reduce"):
            net, single, step = _pair(rank, world, method, exchange=exchange)
            for number in range(3):
                step(number)
            for mine, other in zip(net.parameters(), single.parameters(), strict=True):
                torch.testing.assert_close(mine, other)
            assert equal_everywhere(list(net.parameters()), world)


def check_nothing_waits_for_the_gpu_once_the_processes_have_agreed(rank, world):
    net, _, _ = _pair(rank, world, AGS)
    optimizer = GradientSurgery(
        torch.optim.SGD(net.parameters(), 0.1), process_group=Replicas(agree="once")
    )
    x = batches(0, [8 // world] * world)[rank].to(DEVICE)
    for number in range(3):
        losses = losses_of(net(x))
        optimizer.zero_grad()
        if number and DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with exchanging(world):
                optimizer.backward(losses)
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def check_a_zero_on_the_cpu_stands_for_an_absent_task(rank, world):
    net = Net().to(DEVICE)
    optimizer = GradientSurgery(torch.optim.SGD(net.parameters(), 0.1), process_group=True)
    losses = losses_of(net(batches(0, [8 // world] * world)[rank].to(DEVICE)))
    first = {"a": torch.zeros(())} if rank == world - 1 else {}
    with exchanging(world):
        report = optimizer.backward(losses | first)
    assert report.losses.device.type == torch.device(DEVICE).type
    assert dist.get_world_size() == world


@pytest.fixture(scope="module")
def found():
    return outcomes(__name__, world=min(2, torch.cuda.device_count()), backend="nccl")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("check", checks(__name__))
def test_over_nccl(check, found):
    assert found[check] == "", found[check]
