"""Many networks with several heads at once: their losses, gradients and metrics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._multitask_data import NOT_ASKED, Examples, Problem, Task

FAILED = -1.0  # R2 is cut off here: a constant has 0


class Networks:
    """R networks: linear layers with ReLU that all tasks share, and one linear head per task.

    Attributes:
        flat: `(R, n + h)` parameters, those of the trunk first; `trunk` and `heads` are views of it.
        shared: n.
        trunk: weights `(R, before, after)` and biases `(R, 1, after)` by turns.
        heads: the same for each task.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        tasks: Sequence[Task],
        generators: Sequence[torch.Generator],
        device: torch.device,
    ) -> None:
        pairs = [*itertools.pairwise(sizes), *((sizes[-1], task.outputs) for task in tasks)]
        # Bounds as in torch.nn.Linear.
        bounds = [before**-0.5 for before, after in pairs for _ in range((before + 1) * after)]
        drawn = torch.stack([torch.rand(len(bounds), generator=g) for g in generators])
        self.flat = ((2 * drawn - 1) * torch.tensor(bounds)).to(device)
        views, start = [], 0
        for before, after in pairs:
            for rows in (before, 1):
                view = self.flat.narrow(1, start, rows * after).view(-1, rows, after)
                views.append(view.detach().requires_grad_())
                start += rows * after
        depth = 2 * (len(sizes) - 1)
        self.trunk, rest = views[:depth], views[depth:]
        self.heads = [rest[i : i + 2] for i in range(0, len(rest), 2)]
        self.shared = sum(view[0].numel() for view in self.trunk)

    def __call__(self, inputs: Tensor) -> list[Tensor]:
        """`(R, n, outputs)` for each task, from `(R, n, d)` inputs."""
        for weight, bias in zip(self.trunk[::2], self.trunk[1::2], strict=True):
            inputs = torch.relu(torch.baddbmm(bias, inputs, weight))
        return [torch.baddbmm(bias, inputs, weight) for weight, bias in self.heads]

    def gradients(self, losses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`(R, K, n)` gradients of the trunk, and `(R, h)` of the heads, each from its own loss."""
        rows, own = [], []
        for place, (loss, head) in enumerate(zip(losses, self.heads, strict=True)):
            keep = place + 1 < len(losses)
            # The sum over the runs has the gradients of all of them.
            found = torch.autograd.grad(loss.sum(), [*self.trunk, *head], retain_graph=keep)
            flat = torch.cat([part.flatten(1) for part in found], 1)
            rows.append(flat[:, : self.shared])
            own.append(flat[:, self.shared :])
        return torch.stack(rows, 1), torch.cat(own, 1)


def losses_of(tasks: Sequence[Task], outputs: Sequence[Tensor], targets: Tensor) -> list[Tensor]:
    """`(R,)` losses for each task: cross-entropy over the examples it is asked about, or mean square."""
    found = []
    for task, output, target in zip(tasks, outputs, targets.unbind(-1), strict=True):
        if not task.classes:
            found.append((output.squeeze(-1) - target).square().mean(1))
            continue
        classes = target.long()
        loss = F.cross_entropy(
            output.mT, classes, reduction="none", ignore_index=NOT_ASKED
        )  # (R, n)
        found.append(loss.sum(1) / (classes != NOT_ASKED).sum(1).clamp(min=1))
    return found


def metrics_of(problem: Problem, networks: Networks, examples: Examples) -> Tensor:
    """`(R, K)` on the CPU: accuracy, or 1 - mean squared error over the variance of the target."""
    runs = len(networks.flat)
    with torch.no_grad():
        outputs = networks(examples.inputs.expand(runs, -1, -1))
    found = []
    for task, output, target in zip(
        problem.tasks, outputs, examples.targets.unbind(-1), strict=True
    ):
        if task.classes:
            asked = target != NOT_ASKED
            right = output.argmax(-1) == target
            found.append(right[:, asked].double().mean(1))
        else:
            error = (output.squeeze(-1) - target).double().square().mean(1)
            explained = 1 - error / target.double().var(correction=0)
            found.append(torch.where(explained > FAILED, explained, FAILED))
    return torch.stack(found, 1).cpu()
