"""What one surgery saw and did, as device tensors that synchronise only when somebody reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agsurgery.methods._cosine import cosines


@dataclass(frozen=True, eq=False)
class SurgeryReport:
    r"""Record of one step over K tasks.

    Where the parameters are divided into B blocks (`granularity`), all that is said of gradients has a leading
    dimension of length B, written `...`.

    What the update does to each task is told to first order. With G the Gramian and w the weights, task i has the
    inner product :math:`\langle g_i, J^\top w \rangle = (G w)_i` with the update (`descent`), and :math:`(G 1)_i` with
    the plain sum of the gradients (`sum_descent`). A step of SGD with learning rate lr changes the loss of task i by
    :math:`-\mathrm{lr}\,(G w)_i` through the shared parameters (`first_order_change`). Momentum, adaptive learning
    rates, weight decay and clipping change the step; parameters that only task i has lower its loss further.

    Nothing is hidden: where nobody computed a Gramian (methods that weigh losses by their values, steps between
    with `every`), or it is not finite, all numbers made of it are NaN; `conflict` and `conflicts`, which are booleans,
    are False, and `known` tells. Methods that treat single coordinates have no weights: these, and all numbers about
    their update, are NaN. A task with a zero gradient conflicts with nobody.

    Attributes:
        tasks: K names, in the order of all rows and columns below; `"0"`, `"1"`, ... for unnamed losses.
        losses: `(K,)` values of the losses, detached; NaN where only gradients were seen (`task`).
        gramian: `(..., K, K)` inner products of the task gradients over the shared parameters (over the features, with
            `level="features"`, where the changes above are those that a step on the features would make), float64,
            with the loss scale of a `GradScaler` divided out. All zero where the tasks share no parameter; NaN where
            nobody computed it.
        weights: `(..., K)` coefficients: the shared parameters received the weighted sum of the task gradients. NaN
            for methods without weights.
        scale: `(...)`; factor by which the method stretched its update as a whole. For AGS the norm-restoring
            factor s, for methods without one 1.
        blocks: B names; None without blocks.

    Example:
        >>> import torch
        >>> from agsurgery import backward
        >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> report = backward({"a": x[0] + x[1], "b": x[0] - 4 * x[1]}, [x], "pcgrad")
        >>> report.first_order_change(lr=0.1)  # of the update: no loss rises
        tensor([-0.1471, -1.2500], dtype=torch.float64)
        >>> -0.1 * report.sum_descent  # of the plain sum: a rises
        tensor([ 0.1000, -1.4000], dtype=torch.float64)
    """

    tasks: tuple[str, ...]
    losses: Tensor
    gramian: Tensor
    weights: Tensor
    scale: Tensor
    blocks: tuple[str, ...] | None = None

    @property
    def known(self) -> Tensor:
        """`(...)` boolean: somebody computed the Gramian, and it is finite."""
        return torch.isfinite(self.gramian).flatten(-2).all(-1)

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
        """`(..., K, K)` booleans: the two tasks' gradients have a negative cosine; False where it is not known."""
        return self.cosines < 0

    @property
    def conflict(self) -> Tensor:
        """`(...)` boolean: at least two tasks conflict; False where it is not known."""
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

    def first_order_change(self, lr: float | Tensor) -> Tensor:
        """Return the `(..., K)` changes of the losses, to first order, that one step of SGD with the update makes.

        With blocks these are the parts of the change that come from each; the change itself is their sum.

        Args:
            lr: learning rate; with `granularity="group"` it may be a tensor of shape `(B,)`.
        """
        return -(lr.to(self.gramian).unsqueeze(-1) if isinstance(lr, Tensor) else lr) * self.descent

    def to_dict(self) -> dict[str, float]:
        """Flat Python numbers for a logger (`loss/a`, `norm/a`, `weight/a`, `cosine/a/b`, ...). Synchronises.

        `descent/a` and `sum_descent/a` are what the update does for a task, and what the plain sum would have done.
        With blocks, all that is said of gradients is over all of them, and weights and scales have the name of the
        block (`weight/a/block`, `scale/block`). Numbers that are not known are NaN.
        """
        total = self._total
        flat = {"conflict": float(torch.where(total.known, total.conflict, torch.nan))}
        for name in ("update_norm", "sum_norm"):  # blocks are orthogonal
            flat[name] = float(torch.linalg.vector_norm(getattr(self, name)))
        losses, norms, matrix = total.losses.tolist(), total.norms.tolist(), total.cosines.tolist()
        descents = {
            "descent": self.descent.view(-1, len(self.tasks)).sum(0).tolist(),
            "sum_descent": total.sum_descent.tolist(),
        }
        weights = self.weights.view(-1, len(self.tasks)).tolist()
        for name, scale in zip(self._suffixes, self.scale.view(-1).tolist(), strict=True):
            flat["scale" + name] = scale
        for i, task in enumerate(self.tasks):
            flat |= {f"loss/{task}": losses[i], f"norm/{task}": norms[i]}
            flat |= {f"{name}/{task}": values[i] for name, values in descents.items()}
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
