"""DistributedDataParallel: surgery on the task gradients averaged over all processes.

    torchrun --nproc-per-node 2 examples/integrations/ddp.py

Uses GPUs over NCCL if there are enough, else the CPU over gloo. The only change against one process is
`process_group=True`: DDP averages the gradient of one backward pass, and surgery needs those of all tasks.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from agsurgery import AGS, GradientSurgery

BATCH = 32
"""Samples of one step, over all processes."""


class Model(nn.Module):
    """A trunk of two features under two regressions that want different ones."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2), nn.Tanh())
        self.heads = nn.ModuleDict({"small": nn.Linear(2, 1), "large": nn.Linear(2, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """`(rows, 1)` predictions by task name."""
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()}


def dataset(rows: int = 256) -> TensorDataset:
    """Inputs and two targets, the same in every process."""
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :3].sum(1, keepdim=True), 3 * x[:, 2:6].sum(1, keepdim=True))


def start() -> torch.device:
    """Join the other processes. Without a backend, tensors on the CPU can be exchanged beside those on a GPU."""
    local, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.device_count() >= world:
        torch.cuda.set_device(local)
        distributed.init_process_group()
        return torch.device("cuda", local)
    distributed.init_process_group("gloo")
    return torch.device("cpu")


def main(epochs: int = 10) -> None:
    """Train, and print the last losses, which are means over all processes."""
    device = start()
    world = distributed.get_world_size()
    torch.manual_seed(0)
    model = Model().to(device)
    wrapped = DistributedDataParallel(model)
    optimizer = GradientSurgery(
        torch.optim.SGD(model.parameters(), lr=0.05), AGS(), process_group=True
    )
    sampler = DistributedSampler(dataset(), shuffle=False)
    loader = DataLoader(dataset(), batch_size=BATCH // world, sampler=sampler)
    for _ in range(epochs):
        for x, small, large in loader:
            targets = {"small": small.to(device), "large": large.to(device)}
            outputs = wrapped(x.to(device))
            losses = {
                name: (output - targets[name]).square().mean() for name, output in outputs.items()
            }
            optimizer.zero_grad()
            report = optimizer.backward(losses)
            optimizer.step()
    if distributed.get_rank() == 0:
        print(" ".join(f"{value:.5f}" for value in report.losses.tolist()))
    distributed.barrier()  # whoever leaves early closes connections that others still use
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
