"""FSDP2 (`fully_shard`): surgery on sharded parameters, clipping, and a distributed checkpoint.

    torchrun --nproc-per-node 2 examples/integrations/fsdp2.py

Uses GPUs over NCCL if there are enough, else the CPU over gloo. FSDP2 averages each task's gradient itself, and no
`process_group` is needed. `fsdp_model` keeps the parameters gathered between the backward passes of a step; `tasks`
gives what a method remembers its place in the state, so that a checkpoint can restore it.
"""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from agsurgery import GradientSurgery, GradVac

TASKS = ("small", "large")
BATCH = 32
"""Samples of one step, over all processes."""


class Model(nn.Module):
    """A trunk of two features under two regressions that want different ones."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(2, 1) for name in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """`(rows, 1)` predictions by task name."""
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()}


def start() -> torch.device:
    """Join the other processes."""
    local, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.device_count() >= world:
        torch.cuda.set_device(local)
        distributed.init_process_group()
        return torch.device("cuda", local)
    distributed.init_process_group("gloo")
    return torch.device("cpu")


def prepare(device: torch.device) -> tuple[nn.Module, GradientSurgery]:
    """A sharded model, and an optimizer made after it was sharded."""
    torch.manual_seed(0)
    model = Model().to(device)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for part in (model.trunk, model):
        fully_shard(part, mesh=mesh)
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, GradientSurgery(base, GradVac(), fsdp_model=model, tasks=TASKS)


def train(model: nn.Module, optimizer: GradientSurgery, steps: range, device: torch.device) -> None:
    """Each process takes its part of every batch."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    for step in steps:
        x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step)).to(device)
        x = x.chunk(world)[rank]
        small, large = x[:, :3].sum(1, keepdim=True), 3 * x[:, 2:6].sum(1, keepdim=True)
        targets = {"small": small, "large": large}
        losses = {
            name: (output - targets[name]).square().mean() for name, output in model(x).items()
        }
        optimizer.zero_grad()
        optimizer.backward(losses)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()


def main() -> None:
    """Train, save, go on; load into a new model, go on from there; print the last losses of both."""
    device = start()
    folder: list[str | None] = [None]
    if distributed.get_rank() == 0:
        folder = [tempfile.mkdtemp()]
    distributed.broadcast_object_list(folder)

    model, optimizer = prepare(device)
    train(model, optimizer, range(40), device)
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder[0])
    train(model, optimizer, range(40, 60), device)

    again, resumed = prepare(device)
    weights, state = get_state_dict(again, resumed)
    checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=folder[0])
    set_state_dict(again, resumed, model_state_dict=weights, optim_state_dict=state)
    train(again, resumed, range(40, 60), device)
    if distributed.get_rank() == 0:
        for done in (optimizer, resumed):
            assert done.report is not None
            print(" ".join(f"{value:.5f}" for value in done.report.losses.tolist()))
    distributed.barrier()  # whoever leaves early closes connections that others still use
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
