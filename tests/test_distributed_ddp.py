"""Two processes with batches of their own make the step that one process makes with the whole batch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import agsurgery
from agsurgery import AGS, GradientSurgery, PCGrad, Replicas, distributed
from tests._distributed import alone, checks, equal_everywhere, outcomes

TASKS = ("a", "b", "c")
SIZES = (4, 4)
"""Samples of each process."""


class Net(nn.Module):
    """A trunk under three heads of conflicting aims, and a layer that nobody uses."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, *, mixed: bool = False, width: int = 33
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 2) for _ in TASKS)
        self.idle = nn.Linear(2, 2)
        self.to(dtype)
        if mixed:  # shared parameters of two dtypes
            self.first.to(torch.float32)

    def forward(self, x: Tensor, reentrant: bool = False) -> dict[str, Tensor]:
        hidden = self.first(x.to(self.first.weight.dtype)).to(x.dtype)
        hidden = torch.tanh(hidden)
        if reentrant:
            self.features = checkpoint(self._deep, hidden, use_reentrant=True)
        else:
            self.features = self._deep(hidden)
        return {t: h(self.features) for t, h in zip(TASKS, self.heads, strict=True)}

    def _deep(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.second(hidden))


AIMS = {"a": 2.0, "b": -3.0, "c": 1.0}


def losses_of(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        t: ((i + 1) * (out - AIMS[t])).square().mean() for i, (t, out) in enumerate(outputs.items())
    }


def batches(
    step: int, sizes: Sequence[int] = SIZES, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    whole = torch.randn(sum(sizes), 5, generator=generator, dtype=torch.float64)
    return list(whole.to(dtype).split(list(sizes)))


Absent = Callable[[int, int], set[str]]
"""From step and process to the tasks that its batch lacks."""


def nobody(step: int, rank: int) -> set[str]:
    return set()


def with_zeros(losses: dict[str, Tensor], missing: set[str]) -> dict[str, Tensor]:
    return {t: torch.zeros(()) if t in missing else loss for t, loss in losses.items()}


class Pair:
    """The same training in one process, on all batches, and in all processes, each on its own."""

    def __init__(
        self,
        rank: int,
        method: Any,
        *,
        wrap: bool = True,
        reduce_in_backward: bool = False,
        no_sync: bool = False,
        features: bool = False,
        level: str = "parameters",
        absent: Absent = nobody,
        base: Any = None,
        dtype: torch.dtype = torch.float64,
        mixed: bool = False,
        sizes: Sequence[int] = SIZES,
        reentrant: bool = False,
        exchange: str = "reduce_scatter",
        agree: str = "always",
        options: Callable[[Net], dict[str, Any]] = lambda net: {},
    ) -> None:
        self.rank, self.features, self.level, self.absent = rank, features, level, absent
        self.dtype, self.sizes, self.reentrant = dtype, sizes, reentrant
        base = base or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
        self.single, self.net = Net(dtype, mixed=mixed), Net(dtype, mixed=mixed)
        self.reference = GradientSurgery(
            base(self.single.parameters()), method(), **options(self.single)
        )
        self.optimizer = GradientSurgery(
            base(self.net.parameters()),
            method(),
            process_group=Replicas(exchange=exchange, agree=agree),
            **options(self.net),
        )
        self.model: Any = self.net
        if wrap:
            self.model = DistributedDataParallel(
                self.net, find_unused_parameters=reduce_in_backward
            )
        self.quiet = self.model.no_sync if no_sync else nullcontext

    def single_step(self, step: int, **kwargs: Any) -> None:
        """The mean over the processes of the losses of each is what they minimise together."""
        total: dict[str, Tensor] = {}
        features = []
        parts = batches(step, self.sizes, self.dtype)
        for rank, part in enumerate(parts):
            losses = losses_of(self.single(part))
            features.append(self.single.features)
            for task in TASKS:
                if task not in self.absent(step, rank):
                    total[task] = total.get(task, 0) + losses[task] / len(parts)
        losses = {t: total.get(t, torch.zeros(())) for t in TASKS}
        if self.features:
            kwargs |= {"features": features, "level": self.level}
        self.reference.zero_grad()
        with alone():
            self.reference.backward(losses, **kwargs)
        self.reference.step()

    def step(self, step: int, **kwargs: Any) -> None:
        with self.quiet():
            part = batches(step, self.sizes, self.dtype)[self.rank]
            losses = losses_of(self.model(part, self.reentrant))
            losses = with_zeros(losses, self.absent(step, self.rank))
            if self.features:
                kwargs |= {"features": self.net.features, "level": self.level}
            self.optimizer.zero_grad()
            self.optimizer.backward(losses, **kwargs)
        self.optimizer.step()

    def compare(self, steps: int = 3, *, rtol: float = 1e-9, **kwargs: Any) -> None:
        for step in range(steps):
            self.single_step(step, **kwargs)
            self.step(step, **kwargs)
            expected, found = self.reference.report, self.optimizer.report
            assert found.tasks == expected.tasks
            for name in ("losses", "gramian", "weights", "scale"):
                torch.testing.assert_close(
                    getattr(found, name),
                    getattr(expected, name),
                    rtol=rtol,
                    atol=rtol,
                    equal_nan=True,
                    check_dtype=False,
                    msg=lambda text, name=name, step=step: f"{name} of step {step}: {text}",
                )
            mine = dict(self.net.named_parameters())
            for name, other in self.single.named_parameters():
                assert (mine[name].grad is None) == (other.grad is None), name
                if other.grad is not None:
                    torch.testing.assert_close(mine[name].grad, other.grad, rtol=rtol, atol=rtol)
                torch.testing.assert_close(mine[name], other, rtol=rtol, atol=rtol)
        assert equal_everywhere(list(self.net.parameters()), dist.get_world_size())


# -- equal to one process --------------------------------------------------------------------------


def check_methods_of_the_gramian_equal_one_process(rank, world):
    for method in (
        AGS,
        lambda: PCGrad(seed=4),
        agsurgery.GradVac,
        agsurgery.CAGrad,
        agsurgery.UPGrad,
        agsurgery.NashMTL,
        lambda: agsurgery.Smoothed(agsurgery.MGDA()),
        lambda: lambda gramian: gramian.diagonal().rsqrt(),  # a callable of the user's
    ):
        # Solvers amplify rounding: 1e-12 in the Gramian may be 1e-8 in the weights.
        Pair(rank, method).compare(rtol=1e-7)


def check_one_all_reduce_equals_one_process(rank, world):
    Pair(rank, lambda: PCGrad(seed=4), exchange="all_reduce").compare()
    Pair(rank, agsurgery.GradDrop, exchange="all_reduce").compare()


def check_a_model_that_is_not_wrapped_equals_one_process(rank, world):
    Pair(rank, AGS, wrap=False).compare()


def check_agreement_made_once_equals_one_process(rank, world):
    Pair(rank, AGS, agree="once").compare()


def check_a_broken_promise_about_what_is_reached_is_an_error(rank, world):
    net = Net()
    group = Replicas(agree="once")
    optimizer = GradientSurgery(torch.optim.SGD(net.parameters(), lr=0.1), process_group=group)
    for missing in ({"c"}, set()):
        optimizer.zero_grad()
        losses = with_zeros(losses_of(net(batches(0)[rank])), missing)
        with nullcontext() if missing else pytest.raises(RuntimeError, match="always"):
            optimizer.backward(losses)


def check_single_precision_equals_one_process(rank, world):
    # Three steps of training at float32 rounding.
    Pair(rank, AGS, dtype=torch.float32).compare(rtol=1e-4)


def check_shared_parameters_of_two_dtypes_equal_one_process(rank, world):
    Pair(rank, AGS, mixed=True).compare(rtol=1e-4)
    Pair(rank, agsurgery.GradDrop, mixed=True).compare(rtol=1e-4)


def check_narrow_rows_stay_close_to_one_process(rank, world):
    for exchange in ("reduce_scatter", "all_reduce"):
        for dtype, rtol in ((torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
            options = lambda net, dtype=dtype: {"buffer_dtype": dtype}  # noqa: E731
            Pair(rank, AGS, exchange=exchange, options=options).compare(rtol=rtol)


def check_blocks_equal_one_process(rank, world):
    for granularity in (
        lambda net: "parameter",
        lambda net: "group",
        lambda net: {"bias": [net.first.bias, net.second.bias]},
    ):
        for exchange in ("reduce_scatter", "all_reduce"):
            options = lambda net, g=granularity: {"granularity": g(net)}  # noqa: E731
            Pair(rank, AGS, exchange=exchange, options=options).compare()


def check_weighted_heads_and_named_parameters_equal_one_process(rank, world):
    Pair(rank, AGS, options=lambda net: {"heads": "weighted"}).compare()
    Pair(rank, AGS, options=lambda net: {"shared": list(net.second.parameters())}).compare()


def check_features_equal_one_process(rank, world):
    Pair(rank, AGS, features=True).compare()


def check_surgery_at_features_equals_one_process(rank, world):
    for method in (AGS, agsurgery.TrimmedMean):
        for options in ({}, {"heads": "weighted"}):
            if method is AGS or not options:
                options_of = lambda net, options=options: options  # noqa: E731
                Pair(rank, method, features=True, level="features", options=options_of).compare()


def check_draws_at_features_equal_one_process(rank, world):
    net, single = Net(), Net()
    group = Replicas()
    method, reference = agsurgery.GradDrop(), agsurgery.GradDrop()
    for step in range(3):
        outputs = net(batches(step)[rank])
        agsurgery.backward(
            losses_of(outputs),
            net.parameters(),
            method,
            features=net.features,
            level="features",
            process_group=group,
        )
        outputs = single(torch.cat(batches(step)))
        with alone():
            agsurgery.backward(
                losses_of(outputs),
                single.parameters(),
                reference,
                features=single.features,
                level="features",
            )
    for mine, other in zip(net.first.parameters(), single.first.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def check_methods_of_rows_equal_one_process(rank, world):
    for method in (agsurgery.GradDrop, agsurgery.TrimmedMean):
        Pair(rank, method).compare()


def check_methods_of_losses_equal_one_process(rank, world):
    for method in (
        agsurgery.UW,
        agsurgery.DWA,
        agsurgery.RLW,
        agsurgery.GLS,
        agsurgery.FAMO,
        agsurgery.STCH,
    ):
        Pair(rank, method).compare()
    Pair(rank, agsurgery.UW, options=lambda net: {"heads": "own"}).compare()
    Pair(rank, agsurgery.UW, no_sync=True, options=lambda net: {"engine": "accumulate"}).compare()


def check_kept_weights_equal_one_process(rank, world):
    Pair(rank, AGS, options=lambda net: {"every": 2}).compare(5)
    Pair(
        rank, AGS, options=lambda net: {"every": 2, "engine": "reweight"}, reduce_in_backward=True
    ).compare(5)


def check_plain_backward_passes_under_no_sync_equal_one_process(rank, world):
    Pair(rank, AGS, no_sync=True, options=lambda net: {"engine": "accumulate"}).compare()
    Pair(rank, AGS, no_sync=True, reentrant=True).compare()


def check_the_last_pass_averaged_by_ddp_equals_one_process(rank, world):
    for options in (
        {},
        {"heads": "weighted"},
        {"shared": None},
    ):

        def of(net, options=options):
            named = {"shared": list(net.second.parameters())} if "shared" in options else options
            return {"engine": "reweight", **named}

        Pair(rank, AGS, options=of, reduce_in_backward=True).compare()
    Pair(rank, AGS, reduce_in_backward=True, options=lambda net: {"heads": "weighted"}).compare()
    Pair(
        rank, agsurgery.UW, options=lambda net: {"engine": "reweight"}, reduce_in_backward=True
    ).compare()


def check_gradients_add_to_those_that_are_there(rank, world):
    for exchange in ("reduce_scatter", "all_reduce"):
        net, single = Net(), Net()
        optimizer = GradientSurgery(
            torch.optim.SGD(net.parameters(), lr=0.1), process_group=Replicas(exchange=exchange)
        )
        reference = GradientSurgery(torch.optim.SGD(single.parameters(), lr=0.1))
        net.first.bias.grad = torch.ones_like(net.first.bias)  # by somebody else
        single.first.bias.grad = torch.ones_like(single.first.bias)
        for step in range(3):
            optimizer.backward(losses_of(net(batches(step)[rank])))
            with alone():
                reference.backward(losses_of(single(torch.cat(batches(step)))))
        for mine, other in zip(net.parameters(), single.parameters(), strict=True):
            if other.grad is not None:
                torch.testing.assert_close(mine.grad, other.grad)


def check_batches_of_different_size_count_as_ddp_counts_them(rank, world):
    Pair(rank, AGS, sizes=(2, 6)).compare()


def check_the_function_equals_one_process(rank, world):
    net, single = Net(), Net()
    for step in range(2):
        agsurgery.backward(
            losses_of(net(batches(step)[rank])), net.parameters(), "pcgrad", process_group=True
        )
        with alone():
            agsurgery.backward(
                losses_of(single(torch.cat(batches(step)))), single.parameters(), "pcgrad"
            )
    for mine, other in zip(net.parameters(), single.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad)


def check_tasks_one_by_one_equal_one_process(rank, world):
    pair = Pair(rank, AGS, no_sync=True)
    pair.absent = lambda step, rank: {"c"} if (step, rank) == (1, 0) else set()
    for step in range(3):
        pair.single_step(step)
        with pair.model.no_sync():
            losses = losses_of(pair.model(batches(step)[rank]))
            pair.optimizer.zero_grad()
            for task, loss in losses.items():
                with pair.optimizer.task(task):
                    if task not in pair.absent(step, rank):
                        loss.backward(retain_graph=True)
        pair.optimizer.combine()
        pair.optimizer.step()
        torch.testing.assert_close(pair.optimizer.report.gramian, pair.reference.report.gramian)
    for mine, other in zip(pair.net.parameters(), pair.single.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


class Whole(nn.Module):
    """A model that returns its losses."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return losses_of(self.net(x))


def check_losses_that_ddp_hands_out_tell_what_they_reach(rank, world):
    for engine in ("grad", "reweight"):
        net, single = Net(), Net()
        model = DistributedDataParallel(Whole(net), find_unused_parameters=True)
        optimizer = GradientSurgery(
            torch.optim.SGD(net.parameters(), 0.1), process_group=True, engine=engine
        )
        reference = GradientSurgery(torch.optim.SGD(single.parameters(), 0.1))
        for step in range(3):
            for losses, surgery in (
                (model(batches(step)[rank]), optimizer),
                (losses_of(single(torch.cat(batches(step)))), reference),
            ):
                surgery.zero_grad()
                with alone() if surgery is reference else nullcontext():
                    surgery.backward(losses)
                surgery.step()
        for mine, other in zip(net.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(mine, other)


def check_a_static_graph_is_refused(rank, world):
    net = Net()
    model = DistributedDataParallel(net, static_graph=True)
    losses = losses_of(model(batches(0)[rank]))
    with pytest.raises(RuntimeError, match="static_graph"):
        agsurgery.backward(losses, net.parameters(), process_group=True)


def check_tasks_that_came_in_one_process_only_are_an_error_in_all(rank, world):
    net = Net()
    optimizer = GradientSurgery(torch.optim.SGD(net.parameters(), 0.1), process_group=True)
    for task, loss in losses_of(net(batches(0)[rank])).items():
        if rank or task != "b":
            with optimizer.task(task):
                loss.backward(retain_graph=True)
    _refused(ValueError, r"same tasks.*around nothing", optimizer.combine)
    optimizer.zero_grad()
    if rank:
        with optimizer.task("a"):
            losses_of(net(batches(0)[rank]))["a"].backward()
    kind, message = (RuntimeError, "Another process") if rank else (RuntimeError, "needs gradients")
    _refused(kind, message, optimizer.combine)


def check_an_ordinary_ddp_step_in_between_is_right(rank, world):
    pair = Pair(rank, AGS, reduce_in_backward=True)
    pair.compare(2)
    whole = sum(losses_of(pair.single(torch.cat(batches(7)))).values())
    part = sum(losses_of(pair.model(batches(7)[rank])).values())
    for loss, optimizer in ((whole, pair.reference), (part, pair.optimizer)):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pair.compare(2)


# -- absent tasks ----------------------------------------------------------------------------------


def _absent_here_and_there(step: int, rank: int) -> set[str]:
    """All kinds: one task in one process, another in the other, all in one, one in both."""
    return [
        ({"a"}, set()),
        ({"b"}, {"a", "c"}),
        ({"a", "b", "c"}, set()),
        ({"c"}, {"c"}),
        ({"a", "b"}, {"b", "c"}),
        (set(), set()),
    ][step][rank]


def check_a_task_may_be_absent_from_one_process(rank, world):
    for options in ({}, {"heads": "weighted"}, {"granularity": "parameter"}):
        for exchange in ("reduce_scatter", "all_reduce"):
            of = lambda net, options=options: options  # noqa: E731
            Pair(rank, AGS, absent=_absent_here_and_there, exchange=exchange, options=of).compare(6)


def check_a_task_may_be_absent_with_every_kind_of_pass(rank, world):
    for method, kwargs in (
        (agsurgery.GradDrop, {}),
        (lambda: PCGrad(seed=2), {"options": lambda net: {"every": 2}}),
        (lambda: agsurgery.Fixed({"a": 1.0, "b": 2.0, "c": 3.0}), {"features": True}),
        (AGS, {"features": True, "level": "features"}),
        (agsurgery.TrimmedMean, {"features": True, "level": "features"}),
        (agsurgery.UW, {}),
        (AGS, {"no_sync": True, "options": lambda net: {"engine": "accumulate"}}),
        (agsurgery.UW, {"options": lambda net: {"heads": "own"}}),
    ):
        Pair(rank, method, absent=_absent_here_and_there, **kwargs).compare(6)


# -- the same everywhere ---------------------------------------------------------------------------


def check_parameters_stay_equal_to_the_last_bit(rank, world):
    for method, exchange in ((PCGrad, "reduce_scatter"), (AGS, "all_reduce")):
        net = Net(torch.float32)
        optimizer = GradientSurgery(
            torch.optim.AdamW(net.parameters(), lr=1e-2),
            method(),
            process_group=Replicas(exchange=exchange),
        )
        conflicts = 0.0
        for step in range(40):
            optimizer.zero_grad()
            losses = losses_of(net(batches(step, dtype=torch.float32)[rank]))
            conflicts += float(optimizer.backward(losses).conflict)
            optimizer.step()
        assert conflicts > 0
        assert equal_everywhere(list(net.parameters()), world)
        assert equal_everywhere([optimizer.report.gramian, optimizer.report.losses], world)


def check_what_is_not_finite_in_one_process_reaches_all(rank, world):
    for exchange in ("reduce_scatter", "all_reduce"):
        for level in ("parameters", "features"):
            net = Net()
            optimizer = GradientSurgery(
                torch.optim.SGD(net.parameters(), lr=0.1), process_group=Replicas(exchange=exchange)
            )
            losses = losses_of(net(batches(0)[rank]))
            if rank == 1:
                losses["b"] = losses["b"] * torch.inf
            features = net.features if level == "features" else None
            report = optimizer.backward(losses, features=features, level=level)
            assert not torch.isfinite(report.losses[1])
            assert not torch.isfinite(report.weights).any()
            for parameter in (*net.first.parameters(), *net.second.parameters()):
                assert not torch.isfinite(parameter.grad).any()
            assert torch.isfinite(net.heads[0].weight.grad).all()


def check_a_scaler_backs_off_everywhere(rank, world):
    net = Net(torch.float32)
    optimizer = GradientSurgery(torch.optim.SGD(net.parameters(), lr=0.1), process_group=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        losses = losses_of(net(batches(step, dtype=torch.float32)[rank]))
        if step == 1 and rank == 0:
            losses["a"] = losses["a"] * torch.inf
        optimizer.zero_grad()
        optimizer.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert equal_everywhere(list(net.parameters()), world)


def check_a_group_of_one_process_acts_alone(rank, world):
    groups = [dist.new_group([r]) for r in range(world)]
    net, single = Net(), Net()
    for model, group in ((net, groups[rank]), (single, None)):
        optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), 0.1), process_group=group)
        with alone() if group is None else nullcontext():
            optimizer.backward(losses_of(model(batches(0)[rank])))
    torch.testing.assert_close(net.first.weight.grad, single.first.weight.grad)


EXCHANGES = [Replicas(exchange=exchange) for exchange in ("reduce_scatter", "all_reduce")]


def check_sparse_gradients_are_averaged(rank, world):
    whole, part = (nn.Embedding(9, 3, sparse=True, dtype=torch.float64) for _ in range(2))
    part.load_state_dict(whole.state_dict())
    words = torch.tensor([[1, 4, 4], [2, 4, 7]])

    def losses(table, words):
        hidden = table(words).tanh()
        return [(hidden.mean(1) * (i + 1) - (-1) ** i).square().mean() for i in range(2)]

    for group in EXCHANGES:
        mine = losses(part, words[rank : rank + 1])
        agsurgery.backward(mine, part.parameters(), process_group=group)
    with alone():
        for _ in EXCHANGES:
            agsurgery.backward(losses(whole, words), whole.parameters())
    torch.testing.assert_close(part.weight.grad, whole.weight.grad.to_dense())


def check_complex_parameters_are_averaged(rank, world):
    whole, part = (nn.Linear(5, 4, dtype=torch.complex128) for _ in range(2))
    part.load_state_dict(whole.state_dict())

    def losses(layer, x):
        out = layer(x.to(torch.complex128))
        own = (out[:, :3].sum(1) * layer.bias[3]).abs().mean()
        return [own, *((out[:, :2] - 1j * i).abs().square().mean() for i in range(2))]

    for group in EXCHANGES:
        agsurgery.backward(losses(part, batches(0)[rank]), part.parameters(), process_group=group)
    with alone():
        for _ in EXCHANGES:
            agsurgery.backward(losses(whole, torch.cat(batches(0))), whole.parameters())
    torch.testing.assert_close(part.weight.grad, whole.weight.grad)
    torch.testing.assert_close(part.bias.grad, whole.bias.grad)


def check_a_zero_redundancy_base_makes_the_steps_of_a_plain_one(rank, world):
    # Its import compiles, and says that this is deprecated.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    adam = {"lr": 1e-2, "weight_decay": 0.1}
    nets = [Net(), Net()]
    bases = [
        ZeroRedundancyOptimizer(nets[0].parameters(), torch.optim.AdamW, **adam),
        torch.optim.AdamW(nets[1].parameters(), **adam),
    ]
    optimizers = [GradientSurgery(base, PCGrad(seed=1), process_group=True) for base in bases]
    for step in range(5):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            optimizer.backward(losses_of(net(batches(step)[rank])))
            optimizer.step()
    assert len(bases[0].state) < len(bases[1].state)  # it holds a part only
    for mine, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(mine, other)
    assert equal_everywhere(list(nets[0].parameters()), world)


# -- what is exchanged -----------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Kind and size of every exchange inside: the elements that go in."""
    sent: list[tuple[str, int]] = []

    def spy(name: str, place: int) -> tuple[Any, Any]:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            sent.append((name, args[place].numel()))
            return original(*args, **kwargs)

        return original, call

    places = {"all_reduce": 0, _name("reduce_scatter"): 1, _name("all_gather"): 1}
    spies = {name: spy(name, place) for name, place in places.items()}
    _forget()
    for name, (_, call) in spies.items():
        setattr(dist, name, call)
    try:
        yield sent
    finally:
        for name, (original, _) in spies.items():
            setattr(dist, name, original)
        _forget()


def _name(kind: str) -> str:
    old = {"reduce_scatter": "reduce_scatter_tensor", "all_gather": "all_gather_into_tensor"}[kind]
    return f"{kind}_single" if hasattr(dist, f"{kind}_single") else old


def _forget() -> None:
    distributed._reduce_scatter.cache_clear()
    distributed._all_gather.cache_clear()


def check_a_step_exchanges_what_the_documentation_says(rank, world):
    net = Net()
    shared = sum(p.numel() for p in (*net.first.parameters(), *net.second.parameters()))
    own = sum(p.numel() for p in net.heads.parameters())

    def exchanges(absent: bool = False, **kwargs: Any) -> list[tuple[str, int]]:
        optimizer = GradientSurgery(
            torch.optim.SGD(net.parameters(), 0.1), process_group=Replicas(**kwargs)
        )
        for _ in range(2):
            losses = losses_of(net(batches(0)[rank]))
            if absent and rank:
                losses["b"] = torch.zeros(())
            with counted() as sent:
                optimizer.backward(losses)
        return sent

    def padded(size: int) -> bool:
        return shared <= size < 1.2 * shared

    sent = exchanges(exchange="reduce_scatter")
    comparison, losses, *rows, gramian, gathered, heads = sent
    assert comparison == ("all_reduce", 13)
    assert losses == ("all_reduce", 3)
    assert [name for name, _ in rows] == [_name("reduce_scatter")] * 3
    assert all(padded(size) for _, size in rows)
    assert gramian == ("all_reduce", 9)
    assert gathered[0] == _name("all_gather")
    assert padded(gathered[1] * world)
    assert heads == ("all_reduce", own)
    assert exchanges(exchange="reduce_scatter", agree="once") == sent[1:]
    comparison, losses, rows, heads = exchanges()  # on the CPU
    assert rows[0] == "all_reduce"
    assert padded(rows[1] // 3)
    # A second comparison where different parameters are reached: two numbers for each, one for each task.
    assert exchanges(absent=True)[1] == ("all_reduce", 2 * len(list(net.parameters())) + 3)


# -- refusals --------------------------------------------------------------------------------------


def _refused(kind: type[Exception], message: str, action: Callable[[], object]) -> None:
    with pytest.raises(kind, match=message):
        action()


def check_differences_between_processes_are_an_error_in_all_of_them(rank, world):
    def attempt(losses, net=None, options=None, method=None, **kwargs):
        net = net or Net()
        optimizer = GradientSurgery(
            torch.optim.SGD(net.parameters(), 0.1), method, process_group=True, **(options or {})
        )
        return lambda: optimizer.backward(losses(losses_of(net(batches(0)[rank]))), **kwargs)

    other_name = lambda ls: {("d" if t == "b" and rank else t): v for t, v in ls.items()}  # noqa: E731
    _refused(ValueError, r"same tasks.*'b'.*'d'", attempt(other_name))
    fewer = lambda ls: dict(list(ls.items())[: 3 - rank])  # noqa: E731
    _refused(ValueError, r"same tasks.*zeros", attempt(fewer))
    order = lambda ls: dict(sorted(ls.items(), reverse=bool(rank)))  # noqa: E731
    _refused(ValueError, "same tasks in the same order", attempt(order))
    options = {"heads": "weighted" if rank else "own"}
    _refused(ValueError, "same step", attempt(dict, options=options))
    options = {"engine": "reweight"}
    absent = lambda ls: with_zeros(ls, {"b"} if rank else set())  # noqa: E731
    _refused(ValueError, r"0 \* loss", attempt(absent, options=options))
    _refused(ValueError, "same step", attempt(dict, method=AGS() if rank else PCGrad()))
    net = Net()
    if rank:
        net.idle.requires_grad_(False)
    _refused(ValueError, "same parameters", attempt(dict, net=net))
    # An error of one process, which the other hears of.
    not_scalar = lambda ls: {**ls, "b": ls["b"].expand(2) if rank else ls["b"]}  # noqa: E731
    kind, message = (ValueError, "must be a scalar") if rank else (RuntimeError, "Another process")
    _refused(kind, message, attempt(not_scalar))
    options = {"engine": "accumulate"}  # which compares a second time
    _refused(kind, message, attempt(not_scalar, options=options))
    _refused(ValueError, "same tasks", attempt(fewer, options=options))
    constant = lambda ls: {t: loss.detach() for t, loss in ls.items()}  # noqa: E731
    _refused(RuntimeError, "in one of the processes", attempt(constant))
    # And after all of that everything still works.
    assert attempt(dict)().tasks == TASKS


def check_what_cannot_be_exact_is_refused(rank, world):
    net = Net()

    def surgery(**kwargs):
        base = torch.optim.SGD(net.parameters(), 0.1)
        return GradientSurgery(base, **{"process_group": True, **kwargs})

    _refused(ValueError, "inner products of averaged", lambda: surgery(engine="lean"))
    _refused(TypeError, "process_group", lambda: surgery(process_group=3))
    _refused(ValueError, "exchange", lambda: Replicas(exchange="ring"))
    losses = losses_of(net(batches(0)[rank]))
    _refused(
        RuntimeError, "process_group=True", lambda: surgery(process_group=None).backward(losses)
    )
    _refused(ValueError, "pass `params`", lambda: agsurgery.backward(losses, process_group=True))
    _refused(
        RuntimeError, "DistributedDataParallel", lambda: surgery(engine="reweight").backward(losses)
    )
    model = DistributedDataParallel(net)
    losses = losses_of(model(batches(0)[rank]))
    _refused(RuntimeError, "no_sync", lambda: surgery(engine="accumulate").backward(losses))
    net.zero_grad()
    model = DistributedDataParallel(net)
    with model.no_sync():
        losses = losses_of(model(batches(0)[rank]))
        _refused(RuntimeError, "no_sync", lambda: surgery(engine="reweight").backward(losses))


def check_replicas_are_copied_and_pickled(rank, world):
    net = Net()
    optimizer = GradientSurgery(torch.optim.SGD(net.parameters(), 0.1), process_group=True)
    for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        model, twin = duplicate((net, optimizer))
        for m, o in ((net, optimizer), (model, twin)):
            o.zero_grad()
            o.backward(losses_of(m(batches(0)[rank])))
        assert torch.equal(model.first.weight.grad, net.first.weight.grad)
    group = dist.new_group(list(range(world)))
    optimizer = GradientSurgery(torch.optim.SGD(net.parameters(), 0.1), process_group=group)
    copy.deepcopy(optimizer)
    _refused(TypeError, "process_group=True", lambda: pickle.dumps(optimizer))


@pytest.fixture(scope="module")
def found():
    return outcomes(__name__)


@pytest.mark.parametrize("check", checks(__name__))
def test_in_two_processes(check, found):
    assert found[check] == "", found[check]
