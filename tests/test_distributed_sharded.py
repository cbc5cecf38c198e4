"""Parameters sharded over two processes: FSDP2, tensor parallel, and plain ones beside them."""

from __future__ import annotations

import copy
import pickle
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import agsurgery
from agsurgery import AGS, GradientSurgery, PCGrad
from tests._distributed import alone, checks, outcomes
from tests.test_distributed_ddp import TASKS, Net, batches, losses_of


def sharded(net: Net, mesh: Any = None, **kwargs: Any) -> Net:
    """FSDP2: 33 rows over two processes are 17 and 16, and the idle layer has nothing to do."""
    for layer in (net.first, net.second):
        fully_shard(layer, mesh=mesh, **kwargs)
    fully_shard(net, mesh=mesh, **kwargs)
    return net


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def optimizer_of(net: nn.Module, method: Any, **options: Any) -> GradientSurgery:
    base = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, foreach=False)
    return GradientSurgery(base, method, **options)


def compare(
    net: Net,
    method: Callable[[], Any],
    batch: Callable[[int], Tensor],
    steps: int = 3,
    *,
    dtype: torch.dtype = torch.float64,
    rtol: float = 1e-9,
    options: Callable[[Net], dict[str, Any]] = lambda net: {},
    after: Callable[[Any], Any] = lambda net: None,
    extra: dict[str, Any] | None = None,
    same_draws: bool = True,
) -> GradientSurgery:
    """Train `net` on `batch(step)` of this process, and one process on all."""
    single = Net(dtype, width=net.second.in_features)
    reference = optimizer_of(single, method(), **options(single))
    optimizer = optimizer_of(net, method(), **options(net), **(extra or {}))
    for step in range(steps):
        for model, surgery, x in (
            (single, reference, torch.cat(batches(step, dtype=dtype))),
            (net, optimizer, batch(step)),
        ):
            surgery.zero_grad()
            losses = losses_of(model(x))
            if surgery is reference:
                with alone():
                    surgery.backward(losses)
            else:
                surgery.backward(losses)
        results = [after(model) for model in (single, net)]
        if results[0] is not None:
            torch.testing.assert_close(*map(whole, results))
        for name in ("losses", "gramian", "weights"):
            expected, found = (getattr(o.report, name) for o in (reference, optimizer))
            torch.testing.assert_close(
                found, expected, rtol=rtol, atol=rtol, equal_nan=True, check_dtype=False
            )
        for (key, mine), other in zip(net.named_parameters(), single.parameters(), strict=True):
            assert (mine.grad is None) == (other.grad is None), key
            if other.grad is not None:
                assert type(mine.grad) is type(mine.data), key
                torch.testing.assert_close(whole(mine.grad), other.grad, rtol=rtol, atol=rtol)
        reference.step()
        optimizer.step()
        for mine, other in zip(net.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(whole(mine), other, rtol=rtol, atol=rtol)
    return optimizer


def own(rank: int) -> Callable[[int], Tensor]:
    return lambda step: batches(step)[rank]


def the_same(step: int) -> Tensor:
    """Tensor parallel processes see the same batch."""
    return torch.cat(batches(step))


# -- FSDP2 -----------------------------------------------------------------------------------------


def check_fsdp_equals_one_process(rank, world):
    for method in (AGS, lambda: PCGrad(seed=4), agsurgery.UPGrad, agsurgery.TrimmedMean):
        compare(sharded(Net()), method, own(rank))


def check_fsdp_with_every_option_equals_one_process(rank, world):
    for options in (
        lambda net: {"heads": "weighted"},
        lambda net: {"granularity": "parameter"},
        lambda net: {"granularity": {"bias": [net.first.bias, net.second.bias]}},
        lambda net: {"shared": list(net.second.parameters())},
        lambda net: {"engine": "reweight", "heads": "weighted"},
        lambda net: {"engine": "accumulate", "every": 2, "heads": "weighted"},
    ):
        compare(sharded(Net()), AGS, own(rank), options=options)
    narrow = lambda net: {"buffer_dtype": torch.float32}  # noqa: E731
    compare(sharded(Net()), AGS, own(rank), options=narrow, rtol=1e-4)


def check_fsdp_with_methods_of_losses_equals_one_process(rank, world):
    for method in (agsurgery.UW, agsurgery.DWA, agsurgery.FAMO):
        compare(sharded(Net()), method, own(rank))


def check_fsdp_keeps_parameters_gathered_between_passes(rank, world):
    def gathered(**options):
        net = sharded(Net())
        extra = {"fsdp_model": net} if options.pop("keep") else {}
        optimizer = compare(net, AGS, own(rank), options=lambda _: options, extra=extra)
        losses = losses_of(net(own(rank)(9)))
        with CommDebugMode() as counter:
            optimizer.backward(losses)
        names = {str(op): n for op, n in counter.get_comm_counts().items()}
        return sum(n for op, n in names.items() if "gather" in op.lower())

    # Three units of parameters, of which the root's stays gathered after the forward pass.
    assert gathered(keep=False) == 2 + 3 + 3
    assert gathered(keep=True) == 2
    once_more = {"engine": "reweight", "heads": "weighted"}
    assert gathered(keep=False, **once_more) == 2 + 3 * 3
    assert gathered(keep=True, **once_more) == 2


def check_fsdp_frees_the_parameters_after_the_last_pass_and_after_an_error(rank, world):
    net = sharded(Net())
    optimizer = optimizer_of(net, AGS(), fsdp_model=net)
    told: list[bool] = []
    tell = net.set_reshard_after_backward
    net.set_reshard_after_backward = lambda free, **kwargs: (
        told.append(free),
        tell(free, **kwargs),
    )
    optimizer.backward({**losses_of(net(own(rank)(0))), "d": torch.zeros(())})
    assert told == [False, False, True, True]
    assert copy.deepcopy(optimizer._engine.options).resharding is None
    assert pickle.loads(pickle.dumps(optimizer._engine.options)).resharding is None
    told.clear()
    stranger = nn.Parameter(torch.ones((), dtype=torch.float64))
    with pytest.raises(ValueError, match="left no gradient"):
        optimizer.backward({"d": stranger * 2, **losses_of(net(own(rank)(0)))})
    assert told == [False, True]


def check_tasks_one_by_one_equal_one_process(rank, world):
    single, net = Net(), sharded(Net())
    optimizers = [optimizer_of(model, AGS()) for model in (single, net)]
    for step in range(2):
        inputs = (torch.cat(batches(step)), own(rank)(step))
        for model, x, optimizer in zip((single, net), inputs, optimizers, strict=True):
            optimizer.zero_grad()
            for task, loss in losses_of(model(x)).items():
                with optimizer.task(task):
                    loss.backward(retain_graph=True)
            with alone() if model is single else nullcontext():
                optimizer.combine()
            optimizer.step()
        for mine, other in zip(net.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(whole(mine), other)


def check_micro_batches_equal_one_process(rank, world):
    for options in ({}, {"accumulation": "tasks"}):
        single, net = Net(), sharded(Net())
        optimizer = optimizer_of(net, AGS(), fsdp_model=net, **options)
        reference = optimizer_of(single, AGS())
        for step in range(2):
            optimizer.zero_grad()
            halves = own(rank)(step).split(2)
            for i, half in enumerate(halves):
                losses = {t: loss / 2 for t, loss in losses_of(net(half)).items()}
                optimizer.backward(losses, combine=bool(options) or i == len(halves) - 1)
            optimizer.step()
            reference.zero_grad()
            with alone():
                reference.backward(losses_of(single(torch.cat(batches(step)))))
            reference.step()
            for mine, other in zip(net.parameters(), single.parameters(), strict=True):
                torch.testing.assert_close(whole(mine), other)


def check_what_differentiates_parts_of_the_graph_is_refused(rank, world):
    net = sharded(Net())
    losses = losses_of(net(own(rank)(0)))
    for engine, features in (("lean", None), ("grad", net.features)):
        with pytest.raises(ValueError, match="sharded parameters"):
            optimizer_of(net, AGS(), engine=engine).backward(losses, features=features)


def check_clipping_after_fsdp_surgery_equals_one_process(rank, world):
    clip = lambda net: nn.utils.clip_grad_norm_(net.parameters(), 0.5)  # noqa: E731
    compare(sharded(Net()), AGS, own(rank), after=clip)


def check_empty_shards_equal_one_process(rank, world):
    torch.manual_seed(1)
    single, net = nn.Linear(5, 1, dtype=torch.float64), nn.Linear(5, 1, dtype=torch.float64)
    net.load_state_dict(single.state_dict())
    fully_shard(net)
    assert net.weight.to_local().numel() == (5 if rank == 0 else 0)
    optimizers = [optimizer_of(model, AGS()) for model in (single, net)]
    for step in range(2):
        inputs = (torch.cat(batches(step)), batches(step)[rank])
        for model, x, optimizer in zip((single, net), inputs, optimizers, strict=True):
            out = model(x)
            optimizer.zero_grad()
            if model is single:
                with alone():
                    optimizer.backward([(out - 1).square().mean(), (out + 2).square().mean()])
            else:
                optimizer.backward([(out - 1).square().mean(), (out + 2).square().mean()])
            optimizer.step()
        for mine, other in zip(net.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(whole(mine.grad), other.grad)
            torch.testing.assert_close(whole(mine), other)


def check_plain_parameters_beside_fsdp_need_the_process_group(rank, world):
    def model():
        net = Net()
        plain = {net.second.weight, net.heads[1].weight}
        fully_shard(net.first)
        fully_shard(net, ignored_params=plain)
        return net

    compare(model(), AGS, own(rank), extra={"process_group": True})
    scattered = {"process_group": agsurgery.Replicas(exchange="reduce_scatter")}
    compare(model(), AGS, own(rank), extra=scattered)
    compare(model(), agsurgery.TrimmedMean, own(rank), extra=scattered)
    options = lambda net: {"heads": "weighted"}  # noqa: E731
    compare(model(), AGS, own(rank), options=options, extra={"process_group": True})
    compare(model(), agsurgery.UW, own(rank), extra={"process_group": True})
    net = model()
    with pytest.raises(RuntimeError, match="process_group=True"):
        optimizer_of(net, AGS()).backward(losses_of(net(own(rank)(0))))


def check_draws_for_coordinates_do_not_depend_on_uneven_shards(rank, world):
    net = Net()
    fully_shard(net.first)  # 17 and 16 rows, before a plain bucket
    fully_shard(net, ignored_params=set(net.second.parameters()))
    # With all-reduce every process draws for all coordinates of the plain bucket.
    group = agsurgery.Replicas(exchange="all_reduce")
    optimizer = optimizer_of(net, agsurgery.GradDrop(), process_group=group)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(losses_of(net(own(rank)(step))))
        optimizer.step()
    for parameter in net.second.parameters():
        both = [torch.empty_like(parameter.data) for _ in range(world)]
        dist.all_gather(both, parameter.data)
        assert torch.equal(*both)


def check_draws_for_coordinates_differ_between_shards(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    weight = nn.Parameter(distribute_tensor(torch.zeros(64), mesh, [Shard(0)]))
    # In every coordinate one task pulls up and the other down: the draw decides.
    losses = [whole(weight.sum()), whole(-weight.sum())]
    agsurgery.backward(losses, [weight], agsurgery.GradDrop())
    drawn = whole(weight.grad)
    assert set(drawn.tolist()) == {-1.0, 1.0}
    assert not torch.equal(*drawn.chunk(world))


def check_different_tasks_are_an_error_in_all_processes(rank, world):
    net = sharded(Net())
    losses = losses_of(net(own(rank)(0)))
    with pytest.raises(ValueError, match="same tasks"):
        optimizer_of(net, AGS()).backward(
            {("d" if t == "a" and rank else t): v for t, v in losses.items()}
        )
    if rank:
        losses["b"] = torch.zeros(())
    for combine in (True, False):
        with pytest.raises(ValueError, match=r"0 \* loss"):
            optimizer_of(net, AGS()).backward(losses, combine=combine)


# -- checkpoints -----------------------------------------------------------------------------------


def check_distributed_checkpoints_restore_methods_with_state(rank, world):
    for method in (lambda: PCGrad(seed=5), agsurgery.GradVac, agsurgery.NashMTL, agsurgery.FAMO):
        for flat in (False, True):
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            _round_trip(rank, method, options, tasks=TASKS)


def _round_trip(rank, method, options, **rest):
    """Saved to disk, loaded into a wrapper that has made no step, and trained on."""

    def train(net, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            optimizer.backward(losses_of(net(own(rank)(step))))
            optimizer.step()

    def fresh_net():
        net = Net()
        net.idle.requires_grad_(
            False
        )  # such a checkpoint misses the state of what was never stepped
        return sharded(net)

    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    net = fresh_net()
    optimizer = optimizer_of(net, method())
    train(net, optimizer, range(3))
    checkpoint.save(
        get_optimizer_state_dict(net, optimizer, options=options), checkpoint_id=folder[0]
    )
    other = fresh_net()
    other.load_state_dict(net.state_dict())
    fresh = optimizer_of(other, method(), **rest)
    content = get_optimizer_state_dict(other, fresh, options=options)
    checkpoint.load(content, checkpoint_id=folder[0])
    set_optimizer_state_dict(other, fresh, content, options=options)
    train(net, optimizer, range(3, 5))
    train(other, fresh, range(3, 5))
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(mine), whole(theirs)), (method, options)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])


# -- tensor parallel -------------------------------------------------------------------------------


def parallel(net: Net) -> Net:
    """The first layer by columns, the second by rows, the heads plain."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    return parallelize_module(net, mesh, plan)


def check_tensor_parallel_equals_one_process(rank, world):
    for method in (AGS, lambda: PCGrad(seed=4), agsurgery.TrimmedMean, agsurgery.UW):
        compare(parallel(Net(width=34)), method, the_same)
    for options in (
        lambda net: {"heads": "weighted"},
        lambda net: {"granularity": "parameter"},
        lambda net: {"every": 2},
    ):
        compare(parallel(Net(width=34)), AGS, the_same, options=options)


def check_parameters_that_are_dtensors_without_a_shard_count_once(rank, world):
    # The bias of the layer that is parallel by rows is a replicated DTensor.
    net = parallel(Net(width=34))
    assert all(p.is_replicate() for p in net.second.bias.placements)
    optimizer = compare(net, AGS, the_same)
    assert optimizer.report.gramian.isfinite().all()


def check_a_model_of_dtensors_alone_equals_one_process(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    single = nn.Parameter(torch.arange(12, dtype=torch.float64).view(6, 2) / 10)
    mine = nn.Parameter(distribute_tensor(single.detach().clone(), mesh, [Shard(0)]))

    def losses(w: Tensor) -> list[Tensor]:
        return [(w - 0.3).square().sum(), w.sin().sum(), (w * w.exp()).mean()]

    agsurgery.backward([whole(loss) for loss in losses(mine)], [mine], AGS())
    with alone():
        agsurgery.backward(losses(single), [single], AGS())
    torch.testing.assert_close(whole(mine.grad), single.grad)


def check_gradients_that_are_partial_sums_are_added_up(rank, world):
    # Replicated parameters under a batch that is a sharded DTensor: each process has a part of the sum.
    mesh = init_device_mesh("cpu", (world,))
    single = nn.Parameter(torch.arange(10, dtype=torch.float64).view(5, 2) / 10)
    mine = nn.Parameter(distribute_tensor(single.detach().clone(), mesh, [Replicate()]))
    x = torch.cat(batches(0))

    def losses(w: Tensor, x: Tensor) -> list[Tensor]:
        out = x @ w
        return [
            whole(loss) for loss in ((out - 1).square().sum(), out.sin().sum(), out.exp().sum())
        ]

    parts = distribute_tensor(x, mesh, [Shard(0)])
    first = losses(mine, parts)[0]
    first.backward()
    assert any(p.is_partial() for p in mine.grad.placements)
    mine.grad = None
    for _ in range(2):
        report = agsurgery.backward(losses(mine, parts), [mine], AGS())
        with alone():
            expected = agsurgery.backward(losses(single, x), [single], AGS())
    torch.testing.assert_close(report.gramian, expected.gramian)
    torch.testing.assert_close(whole(mine.grad), single.grad)


@pytest.fixture(scope="module")
def found():
    return outcomes(__name__)


@pytest.mark.parametrize("check", checks(__name__))
def test_in_two_processes(check, found):
    assert found[check] == "", found[check]


def test_a_model_that_is_not_sharded_has_nothing_to_keep_gathered():
    with pytest.raises(TypeError, match="fully_shard"):
        GradientSurgery(torch.optim.SGD(Net().parameters(), 0.1), fsdp_model=Net())
