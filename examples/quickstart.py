"""Two losses, one network: the plain sum beside AGS. Needs torch and agsurgery only; runs in a second.

    python -m examples.quickstart

A trunk of four features must serve two regressions. The second has targets ten times as large, so its gradient
outvotes the first in the plain sum wherever they conflict.
"""

from __future__ import annotations

import torch
from torch import nn

from agsurgery import AGS, ConflictMonitor, GradientSurgery, Sum


def train(method: AGS | Sum, steps: int = 300) -> tuple[dict[str, float], dict[str, float]]:
    """Final losses, and what a monitor saw over all steps."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    small, large = x[:, :6].sin().sum(1, keepdim=True), 10 * x[:, 6:12].cos().sum(1, keepdim=True)
    trunk = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4), nn.Tanh())
    heads = nn.ModuleDict({"small": nn.Linear(4, 1), "large": nn.Linear(4, 1)})
    model = nn.ModuleList([trunk, heads])

    optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.01), method)
    monitor = ConflictMonitor()
    for _ in range(steps):
        features = trunk(x)
        losses = {
            "small": (heads["small"](features) - small).square().mean(),
            "large": (heads["large"](features) - large).square().mean(),
        }
        optimizer.zero_grad()
        report = optimizer.backward(losses)
        optimizer.step()
        monitor.update(report)  # stays on the device; `print(monitor.summary())` shows more
    return dict(zip(report.tasks, report.losses.tolist(), strict=True)), monitor.to_dict()


if __name__ == "__main__":
    for chosen in (Sum(), AGS()):
        final, seen = train(chosen)
        values = ", ".join(f"{name} {value:.3f}" for name, value in final.items())
        print(
            f"{type(chosen).__name__:4} losses: {values}; gradients conflicted in {seen['conflict']:.0%} of the steps, "
            f"and {seen['update_raises']:.0%} raised a loss"
        )
