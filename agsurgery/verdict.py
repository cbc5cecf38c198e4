"""What the numbers of a `ConflictMonitor` say: a table, and whether surgery is worth its price."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import fill
from typing import Literal, TypeAlias

FEW = 30
"""Steps below which a share of steps says nothing."""

RARE = 0.05
"""Share of the steps that is too small to care about."""

SAME = 0.99
"""Cosine between update and plain sum from which on they are called the same direction (8 degrees)."""

SHOWN = 10
"""Pairs in the table, and tasks in the answer: 40 tasks have 780 pairs."""

Verdict: TypeAlias = Literal[
    "unknown",
    "nothing shared",
    "no conflict",
    "sum suffices",
    "same direction",
    "no gain",
    "worth trying",
]


@dataclass(frozen=True)
class MonitorSummary:
    """What a `ConflictMonitor` gathered, in words; `print` it.

    The verdict is the first of these that applies. It is about the first order in the shared parameters, on the
    batches seen, with the method that was in use: whether a metric improves it cannot say.

    - `"unknown"`: fewer than 30 steps had a Gramian.
    - `"nothing shared"`: in no step two tasks had gradients on shared parameters.
    - `"no conflict"`: in fewer than 5 % of the steps any two gradients had a negative cosine.
    - `"sum suffices"`: in fewer than 5 % of the steps the plain sum would have raised the loss of any task.
    - `"unknown"`, again: the method has no weights (`GradDrop`, `TrimmedMean`), so its update was not seen.
    - `"same direction"`: the mean cosine between the update and the plain sum is 0.99 or more.
    - `"no gain"`: for no task the share of steps that raise its loss is lower by 5 points with the update.
    - `"worth trying"`: else.

    Attributes:
        tasks: names.
        values: see `ConflictMonitor.to_dict`.
    """

    tasks: tuple[str, ...]
    values: dict[str, float]

    @property
    def verdict(self) -> Verdict:
        """The rule above."""
        values = self.values
        if values["measured"] < FEW:
            return "unknown"
        if "conflict" not in values:
            return "nothing shared"
        if values["conflict"] < RARE:
            return "no conflict"
        if values["sum_raises"] < RARE:
            return "sum suffices"
        if "update_raises" not in values:
            return "unknown"
        if values.get("sum_cosine", 0.0) >= SAME:
            return "same direction"
        return "worth trying" if self.gaining else "no gain"

    @property
    def gaining(self) -> tuple[str, ...]:
        """Tasks whose loss the update raises in fewer steps than the plain sum would have, by 5 points or more."""
        return tuple(t for t in self.tasks if self._change("raises", t) <= -RARE)

    @property
    def paying(self) -> tuple[str, ...]:
        """Tasks whose gradient has a lower mean cosine with the update than with the plain sum, by 0.05 or more."""
        return tuple(t for t in self.tasks if self._change("cosine", t) <= -RARE)

    @property
    def answer(self) -> str:
        """The verdict in a few sentences, with the numbers it rests on."""
        return "Is surgery worth it here? " + " ".join(self._sentences())

    def __str__(self) -> str:
        """The table, then the answer, in lines of up to 100 characters."""
        return "\n".join([*self._table(), fill(self.answer, width=100)])

    def _change(self, kind: Literal["raises", "cosine"], task: str) -> float:
        """By how much a number of a task is larger with the update than with the plain sum; 0 if not known."""
        names = {
            "raises": ("update_raises", "sum_raises"),
            "cosine": ("cosine_with_update", "cosine_with_sum"),
        }
        update, plain = (self.values.get(f"{name}/{task}") for name in names[kind])
        return 0.0 if update is None or plain is None else update - plain

    def _sentences(self) -> Iterator[str]:
        values, verdict = self.values, self.verdict
        measured = int(values["measured"])
        if verdict == "unknown":
            if measured >= FEW:
                yield "Not known: the method has no weights, so what its update does to the tasks was not seen."
                yield f"The plain sum would have raised some loss in {values['sum_raises']:.0%} of the steps."
                return
            yield f"Not known: {measured} steps had a Gramian, and {FEW} are the least to judge by."
            if values["steps"] > measured:
                yield "Methods that weigh losses by their values, and steps between with `every`, have none."
            return
        if verdict == "nothing shared":
            yield (
                "No: in no step two tasks had gradients on shared parameters, so there is nothing to reconcile."
            )
            return
        often = f"gradients conflict in {values['conflict']:.0%} of the steps"
        if verdict == "no conflict":
            yield f"No: {often}. Without conflict the plain sum lowers every loss to first order,"
            yield "and surgery that only resolves conflicts (AGS, PCGrad, UPGrad) equals it at K backward passes."
            yield from self._imbalance()
            return
        raised = f"the plain sum would have raised some loss in {values['sum_raises']:.0%}"
        if verdict == "sum suffices":
            yield f"Hardly: {often}, but {raised}: it lowers every loss all the same."
            yield from self._imbalance()
            return
        yield from self._against_the_sum(f"{often}, and {raised}", verdict)

    def _against_the_sum(self, seen: str, verdict: Verdict) -> Iterator[str]:
        values = self.values
        cosine = values.get("sum_cosine")
        turned = "" if cosine is None else f" (mean cosine with the plain sum {cosine:.3f})"
        if verdict == "same direction":
            yield f"Not with this method: {seen}, but the update has the direction of the sum{turned}."
            yield f"Its length, {values['norm_ratio']:.2f} times that of the sum, is what a learning rate sets."
            yield "If this is no method but `Sum` or `Mean`, the conflicts are a reason to try one."
            return
        done = f"the update did in {values['update_raises']:.0%}{turned}"
        if verdict == "no gain":
            yield f"Not with this method: {seen}; {done}, and spares no task by {RARE:.0%} of its steps or more."
            return
        yield f"Perhaps: {seen}; {done}."
        gains = [
            f"{t} ({values[f'sum_raises/{t}']:.0%} -> {values[f'update_raises/{t}']:.0%})"
            for t in self.gaining
        ]
        yield f"Raised less often: {_listed(gains)}."
        losses = [
            f"{t} (cosine {values[f'cosine_with_sum/{t}']:+.2f} -> {values[f'cosine_with_update/{t}']:+.2f})"
            for t in self.paying
        ]
        if losses:
            yield f"Served less well than by the sum: {_listed(losses)}."
        yield (
            "This is the first order, on the training batches: compare validation metrics with a plain sum whose "
            "weights and learning rate were tuned as long."
        )

    def _imbalance(self) -> Iterator[str]:
        ratio = self.values.get("imbalance", 1.0)
        if ratio >= 3:
            yield (
                f"The largest gradient is {ratio:.3g} times the smallest: if a task is neglected, try weights in the "
                "sum first."
            )

    def _table(self) -> Iterator[str]:
        values = self.values
        yield f"{int(values['steps'])} steps, {int(values['measured'])} with a Gramian"
        if self.tasks:
            width = max(len(task) for task in (*self.tasks, "task"))
            yield ""
            yield (f"{'':<{width}}  {'':>9}  {'':>8}  {'loss raised by':>17}  {'cosine with':>15}")
            yield f"{'task':<{width}}  {'norm':>9}  {'weight':>8}  {'sum':>8} {'update':>8}  {'sum':>7} {'update':>7}"
            for task in self.tasks:
                yield (
                    f"{task:<{width}}  {self._shown('norm', task, '.3g', 9)}  {self._shown('weight', task, '.3g', 8)}"
                    f"  {self._shown('sum_raises', task, '.1%', 8)} {self._shown('update_raises', task, '.1%', 8)}"
                    f"  {self._shown('cosine_with_sum', task, '+.2f', 7)} "
                    f"{self._shown('cosine_with_update', task, '+.2f', 7)}"
                )
        yield from self._pairs()
        lines = {
            "any pair conflicts": self._shown("conflict", "", ".1%"),
            "any loss raised by the sum": self._shown("sum_raises", "", ".1%"),
            "any loss raised by the update": self._shown("update_raises", "", ".1%"),
            "largest norm over smallest": self._shown("imbalance", "", ".3g"),
            "cosine of update and sum": self._shown("sum_cosine", "", "+.3f"),
            "length of update over sum": self._shown("norm_ratio", "", ".3g"),
        }
        yield ""
        yield from (f"{name:<30} {value:>9}" for name, value in lines.items())
        yield ""

    def _pairs(self) -> Iterator[str]:
        pairs = [
            (task, other)
            for i, task in enumerate(self.tasks)
            for other in self.tasks[:i]
            if f"cosine/{task}/{other}" in self.values
        ]
        if not pairs:
            return
        pairs.sort(key=lambda pair: self.values["conflict/{}/{}".format(*pair)], reverse=True)
        width = max(len(f"{other}, {task}") for task, other in [*pairs[:SHOWN], ("pair", "")])
        yield ""
        yield f"{'pair':<{width}}  {'conflict':>8}  {'cosine':>7}  10 % to 90 %"
        for task, other in pairs[:SHOWN]:
            pair = f"{task}/{other}"
            low, high = (self._shown(name, pair, "+.2f") for name in ("cosine_q10", "cosine_q90"))
            yield (
                f"{f'{other}, {task}':<{width}}  {self._shown('conflict', pair, '.1%', 8)}  "
                f"{self._shown('cosine', pair, '+.2f', 7)}  {low} to {high}"
            )
        if len(pairs) > SHOWN:
            yield f"and {len(pairs) - SHOWN} pairs that conflict less often"

    def _shown(self, name: str, of: str, form: str, width: int = 0) -> str:
        value = self.values.get(f"{name}/{of}" if of else name)
        return f"{'-' if value is None else format(value, form):>{width}}"


def _listed(items: list[str]) -> str:
    more = len(items) - SHOWN
    return "; ".join(items[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
