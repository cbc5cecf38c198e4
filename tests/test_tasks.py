"""Tasks come by name, in any order, and go: storage, state and report follow the names."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import agsurgery
from agsurgery import DWA, UW, GradientSurgery, GradVac, NashMTL, Smoothed, UPGrad
from tests._optimizer_cases import FourTasks, losses, same

ENGINES = ["grad", "lean", "accumulate", "reweight"]
NAMES = "abcd"


def named(model: FourTasks, tasks: Iterable[str], batch: int = 0) -> dict[str, Tensor]:
    """Losses of some tasks, in the order asked for."""
    every = dict(zip(NAMES, losses(model, batch), strict=True))
    return {task: every[task] for task in tasks}


def wrap(model: FourTasks, method: Any = "cagrad", **options: Any) -> GradientSurgery:
    return GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.05), method, **options)


SEQUENCE = ["abcd", "ab", "dba", "c", "bcd", "abcd", "dcba"]


@pytest.mark.parametrize("engine", ENGINES)
def test_each_step_is_what_its_tasks_alone_would_give(engine):
    model = FourTasks()
    optimizer = wrap(model, engine=engine)
    for batch, tasks in enumerate(SEQUENCE):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        expected = agsurgery.backward(named(twin, tasks, batch), twin.parameters(), "cagrad")
        optimizer.zero_grad()
        report = optimizer.backward(named(model, tasks, batch))
        assert report.tasks == expected.tasks == tuple(tasks)
        assert report.losses.shape == (len(tasks),)
        torch.testing.assert_close(report.gramian, expected.gramian)
        torch.testing.assert_close(report.weights, expected.weights)
        for one, two in zip(model.parameters(), twin.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, two.grad)
        optimizer.step()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("present", ["abc", "ad", "b"])
def test_a_constant_zero_leaves_the_other_tasks_as_if_it_were_absent(present, engine):
    model, twin = FourTasks(), FourTasks()
    zeros = {task: torch.zeros(()) for task in NAMES if task not in present}
    terms = named(model, present) | zeros
    report = wrap(model, "upgrad", engine=engine).backward({task: terms[task] for task in NAMES})
    expected = wrap(twin, "upgrad", engine=engine).backward(named(twin, present))
    assert report.tasks == tuple(NAMES)
    flat = report.to_dict()
    for task, norm in zip(expected.tasks, expected.norms.tolist(), strict=True):
        assert flat[f"norm/{task}"] == pytest.approx(norm)
    for task in zeros:
        assert flat[f"norm/{task}"] == flat[f"loss/{task}"] == 0
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad)


REMEMBERING: dict[str, Any] = {
    "GradVac": lambda: GradVac(beta=0.3),
    "Smoothed": lambda: Smoothed(UPGrad(), momentum=0.7),
    "UW": lambda: UW(lr=0.1),
    "DWA": lambda: DWA(),
    "preferences": lambda: NashMTL(preference={"a": 4.0, "b": 1.0, "c": 2.0, "d": 0.5}),
}


@pytest.mark.parametrize("name", REMEMBERING)
def test_the_order_of_names_means_nothing_to_what_is_remembered(name):
    """Two tasks, so that methods which draw an order have none to draw."""
    model, twin = FourTasks(), FourTasks()
    optimizer, other = wrap(model, REMEMBERING[name]()), wrap(twin, REMEMBERING[name]())
    for batch in range(5):
        for module, opt, order in (
            (model, optimizer, "ab"),
            (twin, other, "ba" if batch % 2 else "ab"),
        ):
            opt.zero_grad()
            opt.backward(named(module, order, batch))
            opt.step()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", REMEMBERING)
def test_what_is_remembered_of_an_absent_task_goes_through_a_checkpoint(name):
    model = FourTasks()
    optimizer = wrap(model, REMEMBERING[name]())

    def train(module: FourTasks, opt: GradientSurgery, steps: range) -> None:
        for batch in steps:
            opt.zero_grad()
            opt.backward(named(module, SEQUENCE[batch], batch))
            opt.step()

    train(model, optimizer, range(4))  # the last one has a single task
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = FourTasks(1)
    other.load_state_dict(model.state_dict())
    resumed = wrap(other, REMEMBERING[name]())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer, range(4, 7))
    train(other, resumed, range(4, 7))
    assert same(model.parameters(), other.parameters())


def test_an_absent_task_keeps_what_is_remembered_of_it():
    model = FourTasks()
    optimizer = wrap(model, UW(lr=0.1))
    optimizer.backward(named(model, "abc"))
    before = optimizer.method.state()["value"].clone()
    for batch in range(3):
        optimizer.backward(named(model, "ca", batch))
    after = optimizer.method.state()["value"]
    assert after[1] == before[1]
    assert (after[[0, 2]] != before[[0, 2]]).all()


def test_unnamed_losses_are_named_by_their_places():
    model, twin = FourTasks(), FourTasks()
    optimizer, other = wrap(model, GradVac(beta=0.3)), wrap(twin, GradVac(beta=0.3))
    for batch in range(3):
        optimizer.zero_grad()
        optimizer.backward(losses(model, batch, tasks=2))
        optimizer.step()
        other.zero_grad()
        first, second = losses(twin, batch, tasks=2)
        report = other.backward({"1": second, "0": first})
        other.step()
    assert report.tasks == ("1", "0")
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)
