"""Training of many networks at once with a method and an optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import agsurgery
from benchmarks._multitask_data import Problem
from benchmarks._multitask_methods import Entry, Trial, combine, instances
from benchmarks._multitask_networks import Networks, losses_of
from benchmarks._optimizers import SGD, Adam, Optimizer

HIDDEN = (64, 32)  # widths of the trunk
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
SGD_RATES = tuple(5e-4 * 2**power for power in range(12))  # to 1
WATCHED = 20  # every n-th step is looked at for conflicts


class Kind(NamedTuple):
    """An optimizer, the learning rates to try with it, and with how many of the tuning seeds."""

    make: Callable[[Tensor, Tensor], Optimizer]
    rates: tuple[float, ...]
    tuning_seeds: int


OPTIMIZERS = {"adam": Kind(Adam, RATES, 2), "sgd": Kind(SGD, SGD_RATES, 4)}


class Trained(NamedTuple):
    """R networks, the share of steps in which two gradients conflict, the usual imbalance, and seconds of a run.

    The imbalance is the median of longest over shortest gradient norm.
    """

    networks: Networks
    conflict: float
    imbalance: float
    seconds: float


def batches(count: int, batch: int, steps: int, generators: Sequence[torch.Generator]) -> Tensor:
    """`(R, steps or more, batch)` places of examples: epoch after epoch in random order, what remains left out."""
    epoch = count // batch
    orders = [
        torch.stack([torch.randperm(count, generator=g)[: epoch * batch] for g in generators])
        for _ in range(-(-steps // epoch))
    ]
    return torch.cat(orders, 1).unflatten(1, (-1, batch))


def train(
    problem: Problem,
    entry: Entry,
    trials: Sequence[Trial],
    seeds: Sequence[int],
    steps: int,
    make_optimizer: Callable[[Tensor, Tensor], Optimizer] = Adam,
) -> Trained:
    """Some runs at once; seed for seed the same initial weights and batches for every method."""
    begin = time.perf_counter()
    examples = problem.train
    device, count = examples.inputs.device, len(examples.inputs)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sizes = (examples.inputs.shape[1], *HIDDEN)
    networks = Networks(sizes, problem.tasks, generators, device)
    batch = min(problem.batch, count)
    order = batches(count, batch, steps, generators).to(device)
    rates = torch.tensor([trial.rate for trial in trials], device=device)
    optimizer = make_optimizer(networks.flat, rates)
    methods = instances(entry, trials, seeds)
    gramians_seen = []
    for step in range(steps):
        chosen = order[:, step]
        inputs, targets = examples.inputs[chosen], examples.targets[chosen]
        losses = losses_of(problem.tasks, networks(inputs), targets)
        rows, own = networks.gradients(losses)
        gramians = rows.double() @ rows.double().mT
        if step % WATCHED == 0:
            gramians_seen.append(gramians)
        values = torch.stack(losses, 1).detach().double()
        update = torch.cat([combine(methods, rows, values, gramians), own], 1)
        optimizer.step(networks.flat, update, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for method in methods:
            if isinstance(method, agsurgery.DWA) and (step + 1) % (count // batch) == 0:
                method.end_epoch()
        if isinstance(methods[0], agsurgery.FAMO):
            with torch.no_grad():
                after = losses_of(problem.tasks, networks(inputs), targets)
            for method, improved in zip(methods, torch.stack(after, 1).double(), strict=True):
                method.update(improved)
    conflict, imbalance = conflicts(torch.cat(gramians_seen))
    return Trained(networks, conflict, imbalance, (time.perf_counter() - begin) / len(seeds))


def conflicts(gramians: Tensor) -> tuple[float, float]:
    """Share of `(S, K, K)` Gramians with a negative entry, and median ratio of the longest norm to the shortest."""
    negative = (gramians < 0).flatten(1).any(1).double().mean()
    norms = gramians.diagonal(dim1=1, dim2=2).sqrt()
    ratio = norms.amax(1) / norms.amin(1)
    return float(negative), float(ratio.nanmedian())
