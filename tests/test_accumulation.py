"""Micro-batches come to exactly what the full batch comes to, whoever counts them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agsurgery import AGS, GradDrop, GradientSurgery, GradVac, PCGrad, Smoothed, TrimmedMean
from tests._optimizer_cases import FourTasks, values

NAMES = ("a", "b", "c", "d")
ROWS = 12


def data(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(500 + batch)
    x = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(4, ROWS, generator=generator, dtype=torch.float64)


def part(
    model: FourTasks, batch: int, rows: slice, tasks: Iterable[str] = NAMES
) -> dict[str, Tensor]:
    """This part's share of the mean losses of a batch."""
    x, targets = data(batch)
    outputs = dict(zip(NAMES, model(x[rows]), strict=True))
    goals = dict(zip(NAMES, targets, strict=True))
    return {name: (outputs[name] - 3 * goals[name][rows]).square().sum() / ROWS for name in tasks}


PARTS = (slice(0, 5), slice(5, 6), slice(6, 12))
WHOLE = slice(0, ROWS)

Accumulate = Callable[[GradientSurgery, list[Callable[[], dict[str, Tensor]]]], Any]


def by_call(optimizer: GradientSurgery, micro: list[Callable[[], dict[str, Tensor]]]) -> Any:
    report = None
    for number, losses in enumerate(micro, 1):
        report = optimizer.backward(losses(), combine=number == len(micro))
        assert (report is None) == (number < len(micro))
    return report


def by_option(optimizer: GradientSurgery, micro: list[Callable[[], dict[str, Tensor]]]) -> Any:
    for losses in micro:
        report = optimizer.backward(losses())
    return report


def by_task(optimizer: GradientSurgery, micro: list[Callable[[], dict[str, Tensor]]]) -> Any:
    for losses in micro:
        for name, loss in losses().items():
            with optimizer.task(name):
                loss.backward(retain_graph=True)
    return optimizer.combine()


def by_task_and_option(
    optimizer: GradientSurgery, micro: list[Callable[[], dict[str, Tensor]]]
) -> Any:
    for losses in micro:
        report = by_task(optimizer, [losses])
    return report


WAYS: dict[str, tuple[Accumulate, dict[str, Any]]] = {
    "combine": (by_call, {}),
    "option": (by_option, {"accumulation": "tasks"}),
    "task": (by_task, {}),
    "task and option": (by_task_and_option, {"accumulation": "tasks"}),
}
every_way = pytest.mark.parametrize("way", WAYS)

METHODS: dict[str, Callable[[], Any]] = {
    "ags": lambda: AGS(seed=3),
    "pcgrad": lambda: PCGrad(seed=3),  # draws an order: it must draw once for each step
    "cagrad": lambda: "cagrad",
    "grad_vac": lambda: GradVac(beta=0.3),  # remembers: it must update once for each step
    "smoothed": lambda: Smoothed(PCGrad(seed=3)),
    "grad_drop": lambda: GradDrop(seed=3),
    "trimmed": lambda: TrimmedMean(),
    "callable": lambda: lambda gramian: gramian.sum(1) / gramian.diagonal().max(),
}


def assert_equal(model: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, **tolerance)


def pair(method: Any, way: str, **options: Any) -> tuple[Any, Any, Any, Any]:
    model, twin = FourTasks(), FourTasks()
    extra = WAYS[way][1]
    optimizer = GradientSurgery(
        torch.optim.AdamW(model.parameters(), lr=0.01), method(), **options, **extra
    )
    reference = GradientSurgery(torch.optim.AdamW(twin.parameters(), lr=0.01), method(), **options)
    return model, optimizer, twin, reference


@every_way
@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_train_as_the_full_batch_does(method, way):
    model, optimizer, twin, reference = pair(METHODS[method], way)
    for batch in range(3):
        optimizer.zero_grad()
        micro = [lambda rows=rows: part(model, batch, rows) for rows in PARTS]  # noqa: B023
        report = WAYS[way][0](optimizer, micro)
        reference.zero_grad()
        expected = reference.backward(part(twin, batch, WHOLE))
        torch.testing.assert_close(report.gramian, expected.gramian)
        torch.testing.assert_close(report.weights, expected.weights, equal_nan=True)
        if "task" not in way:
            torch.testing.assert_close(report.losses, expected.losses)
        assert_equal(model, twin)
        optimizer.step()
        reference.step()
    for one, two in zip(values(model), values(twin), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("batch", range(5))
def test_surgery_of_each_micro_batch_is_something_else(batch):
    # Otherwise the test above could not see a difference.
    model, optimizer, twin, reference = pair(PCGrad, "combine")
    for rows in PARTS:
        optimizer.backward(part(model, batch, rows))
    reference.backward(part(twin, batch, WHOLE))
    one, two = model.trunk.weight.grad, twin.trunk.weight.grad
    assert (one - two).norm() > 0.1 * two.norm()


OPTIONS: dict[str, Callable[[FourTasks], dict[str, Any]]] = {
    "weighted heads": lambda model: {"heads": "weighted"},
    "a Gramian for each parameter": lambda model: {"granularity": "parameter"},
    "named shared": lambda model: {"shared": [model.trunk.bias]},
    "engine accumulate": lambda model: {"engine": "accumulate"},
}


@every_way
@pytest.mark.parametrize("name", OPTIONS)
def test_options_hold_for_micro_batches(name, way):
    accumulate, extra = WAYS[way]
    model, twin = FourTasks(), FourTasks()
    build = lambda m, **more: GradientSurgery(  # noqa: E731
        torch.optim.SGD(m.parameters(), lr=0.1), PCGrad(), **OPTIONS[name](m), **more
    )
    optimizer, reference = build(model, **extra), build(twin)
    for batch in range(2):
        optimizer.zero_grad()
        reference.zero_grad()
        micro = [lambda rows=rows: part(model, batch, rows) for rows in PARTS]  # noqa: B023
        report = accumulate(optimizer, micro)
        expected = reference.backward(part(twin, batch, WHOLE))
        torch.testing.assert_close(report.gramian, expected.gramian)
        assert report.blocks == expected.blocks
        assert_equal(model, twin)


@every_way
def test_rows_are_summed_in_the_dtype_of_the_buffer(way):
    model, optimizer, twin, _ = pair(AGS, way, buffer_dtype=torch.bfloat16)
    WAYS[way][0](optimizer, [lambda rows=rows: part(model, 0, rows) for rows in PARTS])
    exact = GradientSurgery(torch.optim.SGD(twin.parameters(), lr=0.1), AGS())
    exact.backward(part(twin, 0, WHOLE))
    one, two = model.trunk.weight.grad, twin.trunk.weight.grad
    assert one.dtype == torch.float64
    assert 0 < (one - two).norm() < 0.02 * two.norm()


# -- tasks that are absent from some micro-batches -------------------------------------------------

PRESENT: dict[str, list[tuple[str, ...]]] = {
    "one task each": [("a",), ("b",)],  # no micro-batch has anything shared
    "later ones": [("a", "b"), ("b", "c"), ("d", "a")],
    "fewer": [NAMES, ("a",), ("c", "b")],
    "another order": [("d", "c", "b", "a"), NAMES],
    "alone": [("c",), ("c",), ("c",)],
}


@every_way
@pytest.mark.parametrize("present", PRESENT)
def test_tasks_may_be_absent_from_some_micro_batches(present, way):
    model, optimizer, twin, reference = pair(lambda: AGS(seed=1), way)
    for batch in range(2):  # the second time into rows laid out before
        optimizer.zero_grad()
        reference.zero_grad()
        micro = [
            lambda rows=rows, tasks=tasks: part(model, batch, rows, tasks)  # noqa: B023
            for rows, tasks in zip(PARTS, PRESENT[present], strict=False)
        ]
        report = WAYS[way][0](optimizer, micro)
        whole: dict[str, Tensor] = {}
        for rows, tasks in zip(PARTS, PRESENT[present], strict=False):
            for name, loss in part(twin, batch, rows, tasks).items():
                whole[name] = whole[name] + loss if name in whole else loss
        expected = reference.backward(whole)
        assert report.tasks == expected.tasks
        torch.testing.assert_close(report.gramian, expected.gramian)
        assert_equal(model, twin)


@pytest.mark.parametrize("way", ["combine", "option"])
def test_a_constant_zero_stands_for_an_absent_task(way):
    model, optimizer, twin, reference = pair(AGS, way)
    absent = {"b": torch.zeros(())}
    WAYS[way][0](
        optimizer,
        [lambda: part(model, 0, PARTS[0], "ab"), lambda: part(model, 0, PARTS[1], "a") | absent],
    )
    first, second = part(twin, 0, PARTS[0], "ab"), part(twin, 0, PARTS[1], "a")
    reference.backward({"a": first["a"] + second["a"], "b": first["b"]})
    assert_equal(model, twin)


# -- kinds of gradients ----------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 3, sparse=sparse)
        self.mix = nn.Linear(3, 2)

    def losses(self, words: list[int]) -> dict[str, Tensor]:
        out = self.mix(torch.tanh(self.table(torch.tensor(words))))
        return {"a": (out[:, 0] - 2).square().sum(), "b": (out.sum(1) + 1).square().sum()}


@every_way
def test_sparse_gradients_add_up(way):
    accumulate, extra = WAYS[way]
    model, twin = Words(sparse=True), Words(sparse=False)
    optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), AGS(), **extra)
    reference = GradientSurgery(torch.optim.SGD(twin.parameters(), lr=0.1), AGS())
    for words in ([1, 2, 2], [4, 1, 8]):
        optimizer.zero_grad()
        reference.zero_grad()
        accumulate(optimizer, [lambda w=w: model.losses([w]) for w in words])
        reference.backward(twin.losses(words))
        assert model.table.weight.grad.is_sparse
        torch.testing.assert_close(model.table.weight.grad.to_dense(), twin.table.weight.grad)
        torch.testing.assert_close(model.mix.weight.grad, twin.mix.weight.grad)


@pytest.mark.parametrize("way", ["combine", "option"])
def test_gradients_through_features_add_up(way):
    _, extra = WAYS[way]
    model, optimizer, twin, reference = pair(AGS, way)
    x, targets = data(0)
    for number, rows in enumerate(PARTS, 1):
        features = torch.tanh(model.trunk(x[rows]))
        losses = [
            (head(features).squeeze(1) - 3 * target[rows]).square().sum() / ROWS
            for head, target in zip(model.heads, targets, strict=True)
        ]
        last = bool(extra) or number == len(PARTS)
        optimizer.backward(losses, features=features, combine=last)
    reference.backward(list(part(twin, 0, WHOLE).values()))
    assert_equal(model, twin)


# -- scaling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["combine", "option"])
def test_scaled_micro_batches_with_clipping_equal_the_full_batch(way):
    model, optimizer, twin, reference = pair(AGS, way)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for batch in range(2):
        optimizer.zero_grad()
        for number, rows in enumerate(PARTS, 1):
            last = bool(WAYS[way][1]) or number == len(PARTS)
            report = optimizer.backward(part(model, batch, rows), scaler=scaler, combine=last)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        reference.zero_grad()
        expected = reference.backward(part(twin, batch, WHOLE))
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(twin.parameters(), 0.5))
        torch.testing.assert_close(report.gramian, expected.gramian)
        reference.step()
    for one, two in zip(values(model), values(twin), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("clear", ["optimizer", "model"])
@pytest.mark.parametrize("way", ["combine", "option"])
def test_an_infinity_in_one_micro_batch_skips_the_step_and_leaves_no_trace(way, clear):
    # The scaler then never calls `step`: clearing the gradients must forget the rows too.
    model, optimizer, twin, reference = pair(lambda: GradVac(beta=0.3), way)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = values(model)
    for spoiled in (True, False):
        for number, rows in enumerate(PARTS, 1):
            losses = part(model, 0, rows)
            if spoiled and number == 2:
                losses["c"] = losses["c"] * torch.inf
            last = bool(WAYS[way][1]) or number == len(PARTS)
            optimizer.backward(losses, scaler=scaler, combine=last)
        scaler.step(optimizer)
        scaler.update()
        if spoiled:
            assert scaler.get_scale() == 2.0**9
            assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))
        (optimizer if clear == "optimizer" else model).zero_grad()
    reference.backward(part(twin, 0, WHOLE))
    reference.step()
    for one, two in zip(values(model), values(twin), strict=True):
        torch.testing.assert_close(one, two)


# -- where a step ends -----------------------------------------------------------------------------

ENDS: dict[str, Callable[[nn.Module, GradientSurgery], None]] = {
    "zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad": lambda model, optimizer: model.zero_grad(),
    "step": lambda model, optimizer: (optimizer.step(), model.zero_grad(set_to_none=False)),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_new_step_starts_from_nothing(end):
    model, optimizer, twin, reference = pair(lambda: "cagrad", "option")
    optimizer.backward(part(model, 7, PARTS[0]))
    optimizer.backward(part(model, 7, PARTS[1]))
    ENDS[end](model, optimizer)
    twin.load_state_dict(model.state_dict())
    report = optimizer.backward(part(model, 0, WHOLE))
    expected = reference.backward(part(twin, 0, WHOLE))
    torch.testing.assert_close(report.gramian, expected.gramian)
    assert_equal(model, twin)


def test_zero_grad_drops_what_was_held():
    model, optimizer, twin, reference = pair(AGS, "combine")
    assert optimizer.backward(part(model, 7, PARTS[0]), combine=False) is None
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer.zero_grad()
    optimizer.backward(part(model, 0, WHOLE))
    reference.backward(part(twin, 0, WHOLE))
    assert_equal(model, twin)


def test_held_gradients_can_be_combined_without_another_batch():
    model, optimizer, twin, reference = pair(AGS, "combine")
    for rows in PARTS:
        optimizer.backward(part(model, 0, rows), combine=False)
    report = optimizer.combine()
    expected = reference.backward(part(twin, 0, WHOLE))
    torch.testing.assert_close(report.losses, expected.losses)
    assert_equal(model, twin)


def test_an_error_on_the_way_drops_what_was_held():
    model, optimizer, twin, reference = pair(AGS, "combine")
    optimizer.backward(part(model, 7, PARTS[0]), combine=False)
    freed = part(model, 7, PARTS[1])
    freed["d"].backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.backward(freed, combine=False)
    optimizer.backward(part(model, 0, WHOLE))
    reference.backward(part(twin, 0, WHOLE))
    assert_equal(model, twin)


def test_a_copy_starts_a_step_of_its_own():
    model, optimizer, twin, reference = pair(AGS, "combine")
    optimizer.backward(part(model, 7, PARTS[0]), combine=False)
    other, clone = copy.deepcopy((model, optimizer))
    clone.backward(part(other, 0, WHOLE))
    reference.backward(part(twin, 0, WHOLE))
    assert_equal(other, twin)


# -- gradients that are there besides --------------------------------------------------------------


@pytest.mark.parametrize("way", ["combine", "option"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_plain_backward_before_or_after_the_micro_batches_is_kept(when, way):
    model, optimizer, twin, reference = pair(AGS, way)

    def plain(module: FourTasks) -> None:
        sum(parameter.square().sum() for parameter in module.parameters()).backward()

    if when == "before":
        plain(model)
        plain(twin)
    WAYS[way][0](optimizer, [lambda rows=rows: part(model, 0, rows) for rows in PARTS])
    reference.backward(part(twin, 0, WHOLE))
    if when == "after":
        plain(model)
        plain(twin)
    assert_equal(model, twin)


CHANGES: dict[str, Callable[[FourTasks, GradientSurgery], Any]] = {
    "a plain backward": lambda model, optimizer: model.trunk.weight.sum().backward(),
    "a clip": lambda model, optimizer: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
    "another gradient": lambda model, optimizer: setattr(
        model.trunk.bias, "grad", torch.ones_like(model.trunk.bias)
    ),
    "one gradient dropped": lambda model, optimizer: setattr(model.trunk.bias, "grad", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_gradient_changed_between_micro_batches_is_not_lost_silently(change):
    model, optimizer, *_ = pair(AGS, "option")
    optimizer.backward(part(model, 0, PARTS[0]))
    CHANGES[change](model, optimizer)
    with pytest.raises(RuntimeError, match="nobody else may change"):
        optimizer.backward(part(model, 0, PARTS[1]))
    optimizer.zero_grad()
    optimizer.backward(part(model, 0, PARTS[1]))


def test_memory_of_the_update_is_reused_from_micro_batch_to_micro_batch():
    model, optimizer, *_ = pair(AGS, "option")
    places = set()
    for rows in PARTS:
        optimizer.backward(part(model, 0, rows))
        places.add(model.trunk.weight.grad.data_ptr())
    assert len(places) == 1


def test_held_gradients_lie_in_one_storage_for_all_micro_batches():
    model, optimizer, *_ = pair(AGS, "combine")
    for rows in PARTS[:2]:
        optimizer.backward(part(model, 0, rows), combine=False)
        held = optimizer._engine._micro_batches._collector._waiting
        places = {h[model.trunk.weight].untyped_storage().data_ptr() for h in held}
        assert len(places) == 1


def test_a_checkpoint_loaded_between_two_micro_batches_counts():
    model, optimizer, *_ = pair(lambda: PCGrad(seed=3), "option")
    saved = optimizer.state_dict()
    saved["param_groups"][0]["agsurgery_draws"] = torch.tensor(5)
    optimizer.backward(part(model, 0, PARTS[0]))
    optimizer.load_state_dict(saved)
    optimizer.backward(part(model, 0, PARTS[1]))
    assert optimizer.method.state()["draws"] == 6
