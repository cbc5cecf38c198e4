"""What one surgery saw and did, as device tensors that synchronise only when somebody reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agsurgery.methods._cosine import cosines


@dataclass(frozen=True, eq=False)
class SurgeryReport:
    """Record of one step over K tasks.

    Where the parameters are divided into B blocks (`granularity`), all that is said of gradients has a leading
    dimension of length B.

    Attributes:
        tasks: K names, in the order of all rows and columns below; `"0"`, `"1"`, ... for unnamed losses.
        losses: `(K,)` values of the losses, detached; NaN where only gradients were seen (`task`).
        gramian: `(..., K, K)` inner products of the task gradients over the shared parameters (over the features, with
            `level="features"`), float64, with the loss scale of a `GradScaler` divided out. All zero where the tasks
            share no parameter; NaN where nobody computed it.
        weights: `(..., K)` coefficients: the shared parameters received the weighted sum of the task gradients.
        scale: `(...)`; factor by which the method stretched its update as a whole. For AGS the norm-restoring
            factor s, for methods without one 1.
        blocks: B names; None without blocks.
    """

    tasks: tuple[str, ...]
    losses: Tensor
    gramian: Tensor
    weights: Tensor
    scale: Tensor
    blocks: tuple[str, ...] | None = None

    @property
    def norms(self) -> Tensor:
        """`(..., K)` norms of the task gradients over the shared parameters (0 for a single task)."""
        return cosines(self.gramian).norms

    @property
    def cosines(self) -> Tensor:
        """`(..., K, K)` cosines between the task gradients; 0 beside a zero gradient."""
        return cosines(self.gramian).matrix

    @property
    def conflicts(self) -> Tensor:
        """`(..., K, K)` booleans: the two tasks' gradients have a negative cosine."""
        return self.cosines < 0

    @property
    def conflict(self) -> Tensor:
        """`(...)` boolean: at least two tasks conflict."""
        return self.conflicts.flatten(-2).any(-1)

    @property
    def update_norm(self) -> Tensor:
        """`(...)` norm of the combined gradient over the shared parameters."""
        return (self.weights * self.descent).sum(-1).clamp(min=0).sqrt()

    @property
    def sum_norm(self) -> Tensor:
        """`(...)` norm of the plain sum of the task gradients."""
        return self.gramian.sum((-2, -1)).clamp(min=0).sqrt()

    @property
    def descent(self) -> Tensor:
        """`(..., K)` inner product of each task's gradient with the update: negative means its loss will rise."""
        return (self.gramian @ self.weights.unsqueeze(-1)).squeeze(-1)

    @property
    def sum_descent(self) -> Tensor:
        """`(..., K)` the same for the plain sum: what would have happened without surgery."""
        return self.gramian.sum(-1)

    def to_dict(self) -> dict[str, float]:
        """Flat Python numbers for a logger (`loss/a`, `norm/a`, `weight/a`, `cosine/a/b`, ...). Synchronises.

        With blocks, norms and cosines are those over all of them, and weights and scales have the name of the block
        (`weight/a/block`, `scale/block`).
        """
        total = self._total
        flat = {"conflict": float(total.conflict)}
        losses, norms, matrix = total.losses.tolist(), total.norms.tolist(), total.cosines.tolist()
        weights = self.weights.view(-1, len(self.tasks)).tolist()
        for name, scale in zip(self._suffixes, self.scale.view(-1).tolist(), strict=True):
            flat["scale" + name] = scale
        for i, task in enumerate(self.tasks):
            flat |= {f"loss/{task}": losses[i], f"norm/{task}": norms[i]}
            for name, row in zip(self._suffixes, weights, strict=True):
                flat[f"weight/{task}{name}"] = row[i]
            flat |= {
                f"cosine/{task}/{other}": matrix[i][j] for j, other in enumerate(self.tasks[:i])
            }
        return flat

    def __str__(self) -> str:
        """A small table, one line per task, then one per block if there are any. Synchronises."""
        total = self._total
        width = max(len(task) for task in (*self.tasks, "task"))
        lines = [
            f"{'task':<{width}}  {'loss':>10}  {'norm':>10}  {'weight':>8}  cosine to the others"
        ]
        matrix = total.cosines.tolist()
        single = self.weights if self.blocks is None else torch.full_like(total.norms, torch.nan)
        rows = zip(total.losses.tolist(), total.norms.tolist(), single.tolist(), strict=True)
        for i, (loss, norm, weight) in enumerate(rows):
            others = " ".join(f"{value:+.2f}" for j, value in enumerate(matrix[i]) if j != i)
            shown = f"{weight:8.4g}" if self.blocks is None else f"{'below':>8}"
            lines.append(f"{self.tasks[i]:<{width}}  {loss:10.4g}  {norm:10.4g}  {shown}  {others}")
        if self.blocks is None:
            return "\n".join([*lines, f"scale {float(self.scale):.4g}"])
        for name, weights, scale in zip(
            self.blocks, self.weights.tolist(), self.scale.tolist(), strict=True
        ):
            numbers = " ".join(f"{weight:.4g}" for weight in weights)
            lines.append(f"block {name}: weights {numbers}, scale {scale:.4g}")
        return "\n".join(lines)

    @property
    def _total(self) -> SurgeryReport:
        """The same with the blocks summed up, for norms and cosines."""
        return (
            self if self.blocks is None else replace(self, gramian=self.gramian.sum(0), blocks=None)
        )

    @property
    def _suffixes(self) -> list[str]:
        return [""] if self.blocks is None else [f"/{name}" for name in self.blocks]


def detached_losses(losses: list[Tensor]) -> Tensor:
    """Values of the losses as one vector on the device of the first, in their widest dtype."""
    device, dtype = losses[0].device, losses[0].dtype
    if any(loss.device != device or loss.dtype != dtype for loss in losses):
        for loss in losses[1:]:
            dtype = torch.promote_types(dtype, loss.dtype)
        losses = [loss.to(device, dtype) for loss in losses]
    return torch.stack(losses).detach()
