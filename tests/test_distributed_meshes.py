"""Four processes: replicas of shards (HSDP), tensor parallel inside of data parallel or of FSDP2."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import agsurgery
from agsurgery import AGS, PCGrad, Replicas
from tests import test_distributed_ddp as ddp
from tests._distributed import checks, outcomes
from tests.test_distributed_ddp import Net
from tests.test_distributed_sharded import compare, optimizer_of, sharded

PLAN = {"first": ColwiseParallel(), "second": RowwiseParallel()}


def batch_of(part: int, parts: int):
    """A part of the batch, whose mean loss is averaged with that of the others."""

    def batch(step: int) -> torch.Tensor:
        return torch.cat(ddp.batches(step)).chunk(parts)[part]

    return batch


def check_replicas_of_shards_equal_one_process(rank, world):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for method in (AGS, lambda: PCGrad(seed=4), agsurgery.UW, agsurgery.TrimmedMean):
        compare(sharded(Net(), mesh), method, batch_of(rank, world))
    options = lambda net: {"granularity": "parameter"}  # noqa: E731
    compare(sharded(Net(), mesh), AGS, batch_of(rank, world), options=options)


def check_one_shard_of_each_replica_equals_one_process(rank, world):
    mesh = init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicate", "shard"))
    compare(sharded(Net(), mesh), AGS, batch_of(rank, world))


def check_draws_for_coordinates_are_the_same_in_replicas(rank, world):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net = sharded(Net(), mesh)
    optimizer = optimizer_of(net, agsurgery.GradDrop())
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(ddp.losses_of(net(batch_of(rank, world)(step))))
        optimizer.step()
    group = mesh.get_group("replicate")
    for parameter in net.parameters():
        part = parameter.to_local().detach().contiguous()
        both = [torch.empty_like(part) for _ in range(2)]
        dist.all_gather(both, part, group=group)
        assert torch.equal(*both)


def check_tensor_parallel_inside_data_parallel_equals_one_process(rank, world):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    group, part = mesh.get_group("data"), mesh.get_local_rank("data")
    for exchange in ("reduce_scatter", "all_reduce"):
        for method in (AGS, agsurgery.UW, agsurgery.TrimmedMean):
            net = parallelize_module(Net(width=34), mesh["tensor"], PLAN)
            extra = {"process_group": Replicas(group, exchange=exchange)}
            compare(net, method, batch_of(part, 2), extra=extra)
    net = parallelize_module(Net(width=34), mesh["tensor"], PLAN)
    options = lambda net: {"heads": "weighted", "granularity": "global"}  # noqa: E731
    compare(net, AGS, batch_of(part, 2), options=options, extra={"process_group": group})


def check_tensor_parallel_inside_fsdp_equals_one_process(rank, world):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for method in (AGS, agsurgery.UW):
        net = parallelize_module(Net(width=34), mesh["tensor"], PLAN)
        for layer in (net.first, net.second, net):
            fully_shard(layer, mesh=mesh["data"])
        compare(net, method, batch_of(mesh.get_local_rank("data"), 2))


@pytest.fixture(scope="module")
def found():
    return outcomes(__name__, world=4)


@pytest.mark.parametrize("check", checks(__name__))
def test_in_four_processes(check, found):
    assert found[check] == "", found[check]
