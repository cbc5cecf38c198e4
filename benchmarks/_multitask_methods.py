"""The methods of the benchmark of several tasks, what they may try, and updates of many runs at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import agsurgery
from benchmarks._multitask_data import Problem


class Trial(NamedTuple):
    """A learning rate, and the weights of the losses where they are tuned."""

    rate: float
    weights: tuple[float, ...] | None = None


class Entry(NamedTuple):
    """How to make a method from a seed.

    A method that draws at random or looks at losses or coordinates has an instance for each run (`apart`), the others
    take all runs as one batch of Gramians.
    """

    make: Callable[[int], Any]
    apart: bool = False
    least: int = 1  # tasks


PLAIN, WEIGHTED = "Sum", "weighted sum"
METHODS: dict[str, Entry] = {
    "AGS": Entry(lambda seed: agsurgery.AGS(seed=seed), apart=True),
    "PCGrad": Entry(lambda seed: agsurgery.PCGrad(seed=seed), apart=True),
    "CAGrad": Entry(lambda _: agsurgery.CAGrad()),
    PLAIN: Entry(lambda _: agsurgery.Sum()),
    WEIGHTED: Entry(lambda _: None, apart=True),  # `Fixed` with the weights of the trial
    "UPGrad": Entry(lambda _: agsurgery.UPGrad()),
    "DualProj": Entry(lambda _: agsurgery.DualProj()),
    "MGDA": Entry(lambda _: agsurgery.MGDA()),
    "NashMTL": Entry(lambda _: agsurgery.NashMTL()),
    "FairGrad(2)": Entry(lambda _: agsurgery.FairGrad(2.0)),
    "IMTLG": Entry(lambda _: agsurgery.IMTLG()),
    "ConFIG": Entry(lambda _: agsurgery.ConFIG()),
    "AlignedMTL": Entry(lambda _: agsurgery.AlignedMTL()),
    "GradVac": Entry(lambda seed: agsurgery.GradVac(seed=seed), apart=True),
    "NormRestored(UPGrad)": Entry(lambda _: agsurgery.NormRestored(agsurgery.UPGrad())),
    "Smoothed(UPGrad)": Entry(lambda _: agsurgery.Smoothed(agsurgery.UPGrad())),
    "GradDrop": Entry(lambda seed: agsurgery.GradDrop(seed=seed), apart=True),
    "TrimmedMean": Entry(lambda _: agsurgery.TrimmedMean(), apart=True, least=3),
    "UW": Entry(lambda _: agsurgery.UW(), apart=True),
    "DWA": Entry(lambda _: agsurgery.DWA(), apart=True),
    "RLW": Entry(lambda seed: agsurgery.RLW(seed=seed), apart=True),
    "GLS": Entry(lambda _: agsurgery.GLS(), apart=True),
    "FAMO": Entry(lambda _: agsurgery.FAMO(), apart=True),
    "STCH": Entry(lambda _: agsurgery.STCH(), apart=True),
    "Random": Entry(lambda seed: agsurgery.Random(seed=seed), apart=True),
}


def trials_of(name: str, problem: Problem, rates: Sequence[float]) -> list[Trial]:
    """What a method may try: as many trials for each.

    The weighted sum tries its weightings with the middle ones of the rates; with one at least, however few there are.
    """
    if name != WEIGHTED:
        return [Trial(rate) for rate in rates]
    count = max(1, len(rates) // len(problem.weightings))
    first = (len(rates) - count + 1) // 2
    pairs = itertools.product(rates[first : first + count], problem.weightings)
    return [Trial(rate, weights) for rate, weights in pairs]


def instances(entry: Entry, trials: Sequence[Trial], seeds: Sequence[int]) -> list[Any]:
    """One method for all runs, or one for each."""
    if not entry.apart:
        return [entry.make(0)]
    made = []
    for trial, seed in zip(trials, seeds, strict=True):
        fixed = trial.weights is not None
        made.append(agsurgery.Fixed(trial.weights) if fixed else entry.make(seed))
    return made


def combine(methods: Sequence[Any], rows: Tensor, losses: Tensor, gramians: Tensor) -> Tensor:
    """`(R, n)` updates of R runs from `(R, K, n)` task gradients, `(R, K)` losses and `(R, K, K)` Gramians."""
    if methods[0].uses == "rows":
        return torch.stack([method(row) for method, row in zip(methods, rows, strict=True)])
    if methods[0].uses == "losses":
        weights = torch.stack([m(values) for m, values in zip(methods, losses, strict=True)])
    elif len(methods) == 1:
        weights = methods[0](gramians)
    else:
        weights = torch.stack([m(gramian) for m, gramian in zip(methods, gramians, strict=True)])
    return (weights.to(rows).unsqueeze(1) @ rows).squeeze(1)
