"""What one surgery saw and did, as device tensors that synchronise only when somebody reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agsurgery.methods._cosine import cosines


@dataclass(frozen=True, eq=False)
class SurgeryReport:
    """Record of one step over K tasks.

    Attributes:
        tasks: K names, in the order of all rows and columns below; `"0"`, `"1"`, ... for unnamed losses.
        losses: `(K,)` values of the losses, detached.
        gramian: `(K, K)` inner products of the task gradients over the shared parameters, float64, with the loss
            scale of a `GradScaler` divided out. All zero where the tasks share no parameter.
        weights: `(K,)` coefficients: the shared parameters received the weighted sum of the task gradients.
        scale: 0-d; factor by which the method stretched its update as a whole. For AGS the norm-restoring
            factor s, for methods without one 1.
    """

    tasks: tuple[str, ...]
    losses: Tensor
    gramian: Tensor
    weights: Tensor
    scale: Tensor

    @property
    def norms(self) -> Tensor:
        """`(K,)` norms of the task gradients over the shared parameters (0 for a single task, which shares nothing)."""
        return cosines(self.gramian).norms

    @property
    def cosines(self) -> Tensor:
        """`(K, K)` cosines between the task gradients; 0 beside a zero gradient."""
        return cosines(self.gramian).matrix

    @property
    def conflicts(self) -> Tensor:
        """`(K, K)` booleans: the two tasks' gradients have a negative cosine."""
        return self.cosines < 0

    @property
    def conflict(self) -> Tensor:
        """0-d boolean: at least two tasks conflict."""
        return self.conflicts.any()

    @property
    def update_norm(self) -> Tensor:
        """0-d norm of the combined gradient over the shared parameters."""
        return (self.weights @ self.gramian @ self.weights).clamp(min=0).sqrt()

    @property
    def sum_norm(self) -> Tensor:
        """0-d norm of the plain sum of the task gradients."""
        return self.gramian.sum().clamp(min=0).sqrt()

    @property
    def descent(self) -> Tensor:
        """`(K,)` inner product of each task's gradient with the update: negative means the step raises its loss."""
        return self.gramian @ self.weights

    @property
    def sum_descent(self) -> Tensor:
        """`(K,)` the same for the plain sum: what would have happened without surgery."""
        return self.gramian.sum(1)

    def to_dict(self) -> dict[str, float]:
        """Flat Python numbers for a logger (`loss/a`, `norm/a`, `weight/a`, `cosine/a/b`, ...). Synchronises."""
        flat: dict[str, float] = {"scale": float(self.scale), "conflict": float(self.conflict)}
        losses, norms, weights = self.losses.tolist(), self.norms.tolist(), self.weights.tolist()
        matrix = self.cosines.tolist()
        for i, task in enumerate(self.tasks):
            flat |= {
                f"loss/{task}": losses[i],
                f"norm/{task}": norms[i],
                f"weight/{task}": weights[i],
            }
            flat |= {
                f"cosine/{task}/{other}": matrix[i][j] for j, other in enumerate(self.tasks[:i])
            }
        return flat

    def __str__(self) -> str:
        """A small table, one line per task. Synchronises."""
        width = max(len(task) for task in (*self.tasks, "task"))
        lines = [
            f"{'task':<{width}}  {'loss':>10}  {'norm':>10}  {'weight':>8}  cosine to the others"
        ]
        matrix = self.cosines.tolist()
        rows = zip(self.losses.tolist(), self.norms.tolist(), self.weights.tolist(), strict=True)
        for i, (loss, norm, weight) in enumerate(rows):
            others = " ".join(f"{value:+.2f}" for j, value in enumerate(matrix[i]) if j != i)
            lines.append(
                f"{self.tasks[i]:<{width}}  {loss:10.4g}  {norm:10.4g}  {weight:8.4g}  {others}"
            )
        return "\n".join([*lines, f"scale {float(self.scale):.4g}"])


def detached_losses(losses: list[Tensor]) -> Tensor:
    """Values of the losses as one vector on the device of the first, in their widest dtype."""
    device, dtype = losses[0].device, losses[0].dtype
    for loss in losses[1:]:
        dtype = torch.promote_types(dtype, loss.dtype)
    return torch.stack([loss.to(device, dtype) for loss in losses]).detach()
