"""`ConflictMonitor`: what the surgery saw and did over many steps, gathered on the device."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from agsurgery.methods._cosine import NOISE, cosines
from agsurgery.report import SurgeryReport
from agsurgery.series import Series
from agsurgery.verdict import MonitorSummary

if TYPE_CHECKING:  # an extra
    from matplotlib.figure import Figure

BUCKETS = 40
"""Of the histogram of cosines, from -1 to 1: quantiles are good to 0.05."""

QUANTILES = {"cosine_q10": 0.1, "cosine_q50": 0.5, "cosine_q90": 0.9}

OF_STEPS = (
    *("conflict", "sum_raises", "update_raises"),
    *("sum_cosine", "norm_ratio", "imbalance", "scale"),
)
OF_TASKS = (
    *("loss", "weight", "norm"),
    *("sum_raises", "update_raises", "cosine_with_sum", "cosine_with_update"),
)
OF_PAIRS = ("cosine", "conflict", "norm_ratio")

LOGARITHMIC = {"norm_ratio", "imbalance", "norm"}
"""Lengths and ratios of lengths, whose means are geometric."""


class Writer(Protocol):
    """What `add_to` needs of TensorBoard's `SummaryWriter`, or of one that looks like it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> Any:
        """Log one number."""


class ConflictMonitor:
    """Gathers reports over many steps, to say whether surgery is worth its price here.

    `update` takes the `SurgeryReport` of a step. All numbers stay on its device and nothing waits for it; they are
    read when `summary`, `to_dict`, `to_csv`, `add_to`, `plot` or a printed summary asks for them.

    - Tasks are followed by name: they may be absent, come in another order, or join later. A task with a zero
      gradient counts as absent.
    - A step without a Gramian, or with one that is not finite, counts for losses and weights only.
    - Blocks (`granularity`) are summed. A task's weight is then the mean of its weights in the blocks, by the squared
      length of its gradient in each.
    - Memory is fixed: running sums, and a history of `history` bins over all steps since the start, whose bins
      grow wider as these go on.
    - With several processes the Gramian of a report is that of all of them already, so each process gathers the same
      and there is nothing to reduce; only the losses are a process's own. Log from one of them.

    Of a step with a Gramian it keeps, for every pair of tasks, the cosine, whether it is negative (a conflict), and
    the ratio of the norms; for every task the norm, the weight, its gradient's cosine with the plain sum and with the
    update, and whether the one or the other raises its loss to first order, by more than the rounding of float32
    can tell; and for the step whether any pair conflicts, the ratio of the largest to the smallest norm, the cosine
    and the ratio of lengths between the update and the plain sum, and the method's `scale`.

    Args:
        history: number of bins, an even number >= 2.

    Raises:
        ValueError: `history` is not.

    Example:
        >>> import torch
        >>> from agsurgery import GradientSurgery
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = GradientSurgery(torch.optim.SGD([w], lr=0.01), "pcgrad")
        >>> monitor = ConflictMonitor()
        >>> for _ in range(40):
        ...     losses = {"a": w[0] + w[1], "b": w[0] - 4 * w[1]}
        ...     optimizer.zero_grad()
        ...     monitor.update(optimizer.backward(losses))
        ...     optimizer.step()
        >>> monitor.summary().verdict
        'worth trying'
        >>> round(monitor.to_dict()["cosine/b/a"], 4)  # -3 / sqrt(2 * 17)
        -0.5145

    Note:
        An update costs some hundred small operations on K x K tensors. Under a CUDA graph call it outside, after the
        replay: the tensors of the captured report hold the numbers of the last one.
    """

    def __init__(self, *, history: int = 200) -> None:
        if isinstance(history, bool) or not isinstance(history, int) or history < 2 or history % 2:
            raise ValueError(f"`history` must be an even number >= 2. Got {history!r}.")
        self._history = history
        self.reset()

    def reset(self) -> None:
        """Forget everything, tasks included: for numbers by epoch, or since the last logging."""
        self._series = Series((OF_STEPS, OF_TASKS, OF_PAIRS), self._history)
        # Its bins are of no use, two is the least.
        self._cosines = Series(((), (), [f"bucket {i}" for i in range(BUCKETS)]), 2)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks seen so far."""
        return self._series.tasks

    @property
    def steps(self) -> int:
        """Number of reports."""
        return self._series.steps

    @torch.no_grad()
    def update(self, report: SurgeryReport) -> None:
        """Take in the report of one step. Never synchronises.

        Raises:
            TypeError: `report` is not a `SurgeryReport`.
        """
        if not isinstance(report, SurgeryReport):
            raise TypeError(
                f"`report` must be a SurgeryReport. Got {report!r}. With `backward(losses, combine=False)` there "
                "is one only after the last micro-batch."
            )
        steps, tasks, pairs = statistics(report)
        self._series.add(report.tasks, (steps, tasks, pairs))
        buckets = _buckets(pairs.select(0, OF_PAIRS.index("cosine")))
        self._cosines.add(report.tasks, (steps.narrow(0, 0, 0), tasks.narrow(0, 0, 0), buckets))

    # -- what it gathered: all of these synchronise -------------------------------------------------

    def to_dict(self) -> dict[str, float]:
        """Flat numbers for a logger: `wandb.log(monitor.to_dict())`. Synchronises.

        `steps` and `measured` (steps with a finite Gramian); `conflict`, `sum_raises` and `update_raises` (shares of
        the steps, in which any two tasks conflict, or any task's loss rises), `sum_cosine` and `norm_ratio` (update
        beside plain sum), `imbalance`, `scale`; `conflict/a/b`, `cosine/a/b`, `cosine_q10/a/b` (and `q50`, `q90`),
        `norm_ratio/a/b`; `loss/a`, `weight/a`, `norm/a`, `sum_raises/a`, `update_raises/a`, `cosine_with_sum/a`,
        `cosine_with_update/a`. Means over the steps in which they were known, geometric for norms and their ratios.
        A number that never was is left out.
        """
        flat: dict[str, float] = {"steps": self.steps, "measured": 0}
        if self.steps == 0:
            return flat
        totals = self._series.total()
        flat["measured"] = int(totals[0][1][OF_STEPS.index("sum_raises")])
        flat |= _flatten(totals, self.tasks)
        counts = self._cosines.total()[2][0]
        for name, share in QUANTILES.items():
            flat |= _of_pairs(name, _quantile(counts, share), self.tasks)
        return flat

    def rows(self, points: int | None = None) -> list[dict[str, float]]:
        """The history: one dict for each bin of steps, like `to_dict` without quantiles. Synchronises.

        `steps` is the number of steps up to the end of the bin.

        Args:
            points: join bins, so that there are at most this many; None: all.
        """
        bins = self._series.history(self._history if points is None else points)
        return [{"steps": end, **_flatten(totals, self.tasks)} for end, totals in bins]

    def summary(self) -> MonitorSummary:
        """A table to print, and an answer to "is surgery worth it here?". Synchronises."""
        return MonitorSummary(self.tasks, self.to_dict())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the history (`rows`), one line for each bin; empty cells where nothing is known. Synchronises."""
        rows = self.rows()
        columns = list(dict.fromkeys(key for row in rows for key in row)) or ["steps"]
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    def add_to(self, writer: Writer, step: int, *, prefix: str = "surgery/") -> None:
        """Log all numbers of `to_dict` to TensorBoard. Synchronises.

        Args:
            writer: a `torch.utils.tensorboard.SummaryWriter`, or whatever has its `add_scalar`.
            step: the global step.
            prefix: what the names start with.
        """
        for name, value in self.to_dict().items():
            writer.add_scalar(prefix + name, value, step)

    def plot(self) -> Figure:
        """Draw conflicts, cosines and weights over the steps, and tasks by tasks. Synchronises.

        Returns:
            A matplotlib figure that belongs to no window: `monitor.plot().savefig("conflicts.png")`.

        Raises:
            ImportError: matplotlib, the extra `plot`, is not installed.
            RuntimeError: there was no step.
        """
        from agsurgery.plotting import plot_monitor

        return plot_monitor(self)

    # -- checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything gathered, to be saved."""
        return {"series": self._series.state_dict(), "cosines": self._cosines.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: it comes from a monitor with another `history`.
        """
        self._series.load_state_dict(state_dict["series"])
        self._cosines.load_state_dict(state_dict["cosines"])


# -- one step -------------------------------------------------------------------------------------


def statistics(report: SurgeryReport) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the step `(7,)`, of the tasks `(7, K)` and of the pairs `(3, K, K)`, in the order of their names.

    NaN or infinite where a number is not known; lengths and their ratios as logarithms.
    """
    single = report.blocks is None
    gramian = report.gramian if single else report.gramian.sum(0)
    gramian = gramian + 0 * gramian.sum()  # all NaN, if one entry is not finite
    split = cosines(gramian)
    norms, matrix = split.norms, split.matrix
    logs = norms.log()  # minus infinity for an absent task
    absent = (norms > 0).logical_not()

    # The plain sum and the update side by side, (2, ..., K); what is said of gradients is summed over blocks.
    weights = torch.stack([torch.ones_like(report.weights), report.weights])
    by_block = norms if single else report.norms
    gains = (report.gramian @ weights.unsqueeze(-1)).squeeze(-1)
    parts = weights.abs() * by_block
    # What an inner product must exceed to be more than rounding of the Gramian.
    doubt = NOISE * by_block * parts.sum(-1, keepdim=True)
    inner = gains if single else gains.sum(1)
    rises = _less(inner, -(doubt if single else doubt.sum(1))) + 0 * gramian.sum()
    lengths = _length((weights * gains).flatten(1).sum(1), parts.square().flatten(1).sum(1))
    length_of_sum, length = lengths.unbind()

    unpaired = absent.unsqueeze(-1) | absent.unsqueeze(-2)
    unpaired = unpaired | torch.eye(len(report.tasks), dtype=torch.bool, device=gramian.device)
    cosine = matrix.masked_fill(unpaired, torch.nan)
    conflict = _less(cosine, 0)
    any_conflict = conflict.nan_to_num(-1).amax().sqrt()  # NaN without a pair
    lowest = logs.masked_fill(absent, torch.inf).amin()

    steps = [
        any_conflict,
        *rises.amax(-1).unbind(),
        (inner.select(0, 1).sum() / length_of_sum / length).clamp(-1, 1),
        length.log() - length_of_sum.log(),
        logs.amax() - lowest + 0 * any_conflict,
        _scale(report),
    ]
    tasks = [
        report.losses.to(gramian),
        _weights(report, norms),
        logs,
        *(rises + 0 * logs).unbind(),
        *(inner / norms / lengths.unsqueeze(-1))
        .clamp(-1, 1)
        .masked_fill(absent, torch.nan)
        .unbind(),
    ]
    pairs = [cosine, conflict, logs.unsqueeze(-1) - logs.unsqueeze(-2)]
    return torch.stack(steps), torch.stack(tasks), torch.stack(pairs)


def _less(value: Tensor, bound: Tensor | float) -> Tensor:
    """1 or 0, and NaN where `value` is: a comparison would call that False."""
    return (value < bound) + 0 * value


def _length(squared: Tensor, parts: Tensor) -> Tensor:
    """Length of a sum of vectors; NaN where rounding alone is left of the squared lengths of its `parts`."""
    return squared.masked_fill(squared <= NOISE * parts, torch.nan).sqrt()


def _weights(report: SurgeryReport, norms: Tensor) -> Tensor:
    """`(K,)` weights; NaN for a task without a gradient, whose weight means nothing."""
    if report.blocks is None:
        return report.weights.masked_fill(norms == 0, torch.nan)
    squares = report.gramian.diagonal(dim1=-2, dim2=-1)
    return (report.weights * squares).sum(0) / squares.sum(0)


def _scale(report: SurgeryReport) -> Tensor:
    """The scale; with blocks its mean over those in which some task has a gradient."""
    if report.blocks is None:
        return report.scale.to(report.gramian) + 0 * report.gramian.sum()
    used = (report.norms > 0).any(-1)
    return report.scale.masked_fill(used.logical_not(), 0).sum() / used.sum()


def _buckets(cosines: Tensor) -> Tensor:
    """`(BUCKETS, K, K)`: 1 in the bucket of each cosine; NaN where there is none."""
    edges = torch.arange(BUCKETS, device=cosines.device, dtype=cosines.dtype).view(-1, 1, 1)
    place = ((cosines + 1) * (BUCKETS / 2)).floor().clamp(0, BUCKETS - 1)
    return (place == edges) + 0 * cosines


# -- many steps -----------------------------------------------------------------------------------


def _flatten(totals: list[tuple[Tensor, Tensor]], tasks: tuple[str, ...]) -> dict[str, float]:
    """Means by name, of what was counted at least once."""
    flat: dict[str, float] = {}
    for order, names in enumerate((OF_STEPS, OF_TASKS, OF_PAIRS)):
        sums, counts = totals[order]
        means = sums / counts
        for name, value in zip(names, means.unbind(), strict=True):
            value = value.exp() if name in LOGARITHMIC else value
            if order == 0:
                flat |= _finite({name: float(value)})
            elif order == 1:
                listed = zip(tasks, value.tolist(), strict=True)
                flat |= _finite({f"{name}/{task}": number for task, number in listed})
            else:
                flat |= _of_pairs(name, value, tasks)
    return flat


def _of_pairs(name: str, matrix: Tensor, tasks: tuple[str, ...]) -> dict[str, float]:
    rows = matrix.tolist()
    return _finite(
        {
            f"{name}/{task}/{other}": rows[i][j]
            for i, task in enumerate(tasks)
            for j, other in enumerate(tasks[:i])
        }
    )


def _finite(numbers: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if value == value}


def _quantile(counts: Tensor, share: float) -> Tensor:
    """Quantile of each histogram along the first dimension, linear inside a bucket; NaN for an empty one."""
    total = counts.sum(0)
    reached = counts.cumsum(0)
    place = (reached >= share * total).to(torch.int8).argmax(0, keepdim=True)
    inside = counts.gather(0, place).squeeze(0)
    before = reached.gather(0, place).squeeze(0) - inside
    fraction = (share * total - before) / inside
    return (place.squeeze(0) + fraction) * (2 / BUCKETS) - 1
