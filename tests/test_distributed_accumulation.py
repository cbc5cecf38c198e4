"""Micro-batches of two processes come to what the whole batch comes to in one; only a combination communicates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agsurgery import GradientSurgery, GradVac, Replicas
from tests._distributed import alone, checks, outcomes
from tests._optimizer_cases import FourTasks
from tests.test_accumulation import NAMES, part

PARTS = {  # by process and micro-batch: rows, and the tasks that are there
    (0, 0): (slice(0, 3), "abcd"),
    (0, 1): (slice(3, 6), "ab"),
    (1, 0): (slice(6, 9), "acd"),
    (1, 1): (slice(9, 12), "bd"),
}


def micro(model: FourTasks, step: int, rank: int, number: int) -> dict[str, Tensor]:
    """A process's losses, for the mean over the two; a task that is absent is a zero."""
    rows, tasks = PARTS[rank, number]
    there = part(model, step, rows, tasks)
    zero = torch.zeros((), dtype=torch.float64)
    return {name: 2 * there[name] if name in there else zero for name in NAMES}


def whole(model: FourTasks, step: int) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for rows, tasks in PARTS.values():
        for name, loss in part(model, step, rows, tasks).items():
            total[name] = total[name] + loss if name in total else loss
    return {name: total[name] for name in NAMES}


def trained_alike(rank: int, exchange: str, way: str) -> None:
    model, twin = FourTasks(), FourTasks()
    optimizer = GradientSurgery(
        torch.optim.AdamW(model.parameters(), lr=0.01),
        GradVac(beta=0.3),
        process_group=Replicas(exchange=exchange),
        accumulation="tasks" if "tasks" in way else "gradients",
    )
    reference = GradientSurgery(torch.optim.AdamW(twin.parameters(), lr=0.01), GradVac(beta=0.3))
    for step in range(3):
        optimizer.zero_grad()
        for number in range(2):
            losses = micro(model, step, rank, number)
            if way == "task":
                for name, loss in losses.items():
                    with optimizer.task(name):
                        if loss.requires_grad:
                            loss.backward(retain_graph=True)
                continue
            # With "held, then tasks" the first is combined together with the second, but kept by name.
            report = optimizer.backward(losses, combine=number == 1 or way == "tasks")
        if way == "task":
            report = optimizer.combine()
        with alone():
            reference.zero_grad()
            expected = reference.backward(whole(twin, step))
        torch.testing.assert_close(report.gramian, expected.gramian)
        if way != "task":
            torch.testing.assert_close(report.losses, expected.losses)
        for one, two in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad)
        optimizer.step()
        reference.step()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def check_calls_that_say_which_is_the_last(rank, world):
    trained_alike(rank, "reduce_scatter", "combine")
    trained_alike(rank, "all_reduce", "combine")


def check_an_update_that_is_replaced_after_each(rank, world):
    trained_alike(rank, "reduce_scatter", "tasks")
    trained_alike(rank, "all_reduce", "tasks")


def check_both_together(rank, world):
    trained_alike(rank, "reduce_scatter", "held, then tasks")
    trained_alike(rank, "all_reduce", "held, then tasks")


def check_tasks_one_by_one(rank, world):
    trained_alike(rank, "reduce_scatter", "task")
    trained_alike(rank, "all_reduce", "task")


def check_nothing_is_sent_before_the_last(rank, world):
    """One process holds two micro-batches and the other one: neither waits for the other until they combine."""
    model = FourTasks()
    optimizer = GradientSurgery(
        torch.optim.SGD(model.parameters(), lr=0.1), "cagrad", process_group=True
    )
    optimizer.backward(micro(model, 0, rank, 1), combine=False)
    if rank == 0:
        optimizer.backward(micro(model, 0, rank, 0), combine=False)
    optimizer.combine()
    twin = FourTasks()
    reference = GradientSurgery(torch.optim.SGD(twin.parameters(), lr=0.1), "cagrad")
    with alone():
        total = micro(twin, 0, 0, 0)
        for other in (micro(twin, 0, 0, 1), micro(twin, 0, 1, 1)):
            total = {name: total[name] + other[name] for name in NAMES}
        reference.backward({name: loss / 2 for name, loss in total.items()})
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.fixture(scope="module")
def found():
    return outcomes(__name__)


@pytest.mark.parametrize("check", checks(__name__))
def test_in_two_processes(check, found):
    assert found[check] == "", found[check]
