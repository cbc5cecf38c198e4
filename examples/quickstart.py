"""Two losses, one network: the plain sum beside AGS. Needs torch and agsurgery only; runs in a second.

    python -m examples.quickstart

A trunk of four features must serve two regressions. The second has targets ten times as large, so its gradient
outvotes the first in the plain sum wherever they conflict.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agsurgery import AGS, GradientSurgery, Sum


def train(method: AGS | Sum, steps: int = 300) -> tuple[dict[str, float], float]:
    """Final losses, and the share of steps in which the two gradients conflicted."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    small, large = x[:, :6].sin().sum(1, keepdim=True), 10 * x[:, 6:12].cos().sum(1, keepdim=True)
    trunk = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4), nn.Tanh())
    heads = nn.ModuleDict({"small": nn.Linear(4, 1), "large": nn.Linear(4, 1)})
    model = nn.ModuleList([trunk, heads])

    optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.01), method)
    conflicts: list[Tensor] = []
    for _ in range(steps):
        features = trunk(x)
        losses = {
            "small": (heads["small"](features) - small).square().mean(),
            "large": (heads["large"](features) - large).square().mean(),
        }
        optimizer.zero_grad()
        report = optimizer.backward(losses)
        optimizer.step()
        conflicts.append(report.conflict)  # stays on the device; read once, below
    share = torch.stack(conflicts).float().mean().item()
    return dict(zip(report.tasks, report.losses.tolist(), strict=True)), share


if __name__ == "__main__":
    for chosen in (Sum(), AGS()):
        final, share = train(chosen)
        values = ", ".join(f"{name} {value:.3f}" for name, value in final.items())
        print(
            f"{type(chosen).__name__:4} losses: {values}; gradients conflicted in {share:.0%} of the steps"
        )
