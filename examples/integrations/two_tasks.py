"""What the loops of this folder train: one trunk, two regressions that want different things of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class TwoTasks(nn.Module):
    """A trunk under two heads; the forward pass returns the losses by task name."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2), nn.Tanh())
            self.heads = nn.ModuleDict({"small": nn.Linear(2, 1), "large": nn.Linear(2, 1)})

    def forward(self, x: Tensor, small: Tensor, large: Tensor) -> dict[str, Tensor]:
        """Mean squared errors over the `(rows, 8)` inputs."""
        features = self.trunk(x)
        targets = {"small": small, "large": large}
        return {
            name: (head(features).squeeze(1) - targets[name]).square().mean()
            for name, head in self.heads.items()
        }


def dataset(rows: int = 64) -> TensorDataset:
    """Inputs and the two targets, always the same."""
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :3].sum(1), 3 * x[:, 2:6].sum(1))
