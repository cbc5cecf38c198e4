"""Many small networks of two coordinates at once, with the derivatives that an equation needs."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

SIZES = (2, 20, 20, 20, 1)  # of the layers


class Jet(NamedTuple):
    """R functions of two coordinates at n points each, with first and pure second derivatives, all `(R, n)`."""

    value: Tensor
    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]


def initial(generator: torch.Generator) -> Tensor:
    """Parameters of one tanh network from two coordinates to one value, in a row: Xavier weights, zero biases."""
    parts = []
    for before, after in itertools.pairwise(SIZES):
        spread = math.sqrt(2 / (before + after))
        parts += [spread * torch.randn(before * after, generator=generator), torch.zeros(after)]
    return torch.cat(parts)


def layers(parameters: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Weights `(R, before, after)` and biases `(R, 1, after)` of R networks, views of `(R, p)` parameters."""
    found, start = [], 0
    for before, after in itertools.pairwise(SIZES):
        weight = parameters.narrow(1, start, before * after).view(-1, before, after)
        bias = parameters.narrow(1, start + before * after, after).unsqueeze(1)
        found.append((weight, bias))
        start += (before + 1) * after
    return found


def values(parameters: Tensor, points: Tensor) -> Tensor:
    """`(R, n)` values of R networks at `(R, n, 2)` points."""
    *hidden, (weight, bias) = layers(parameters)
    for inner, offset in hidden:
        points = torch.tanh(torch.baddbmm(offset, points, inner))
    return torch.baddbmm(bias, points, weight).squeeze(-1)


def jet(parameters: Tensor, points: Tensor) -> Jet:
    """The values with their derivatives, carried forward through the layers: one graph, one backward pass."""
    units = torch.eye(2, dtype=points.dtype, device=points.device)
    value, first = points, [unit.expand_as(points) for unit in units.unbind()]
    second = [torch.zeros_like(points)] * 2
    *hidden, last = layers(parameters)
    for weight, bias in hidden:
        moved = torch.cat([value, *first, *second], 1) @ weight
        value, x, y, xx, yy = moved.chunk(5, 1)
        value = torch.tanh(value + bias)
        slope = 1 - value.square()
        bend = -2 * value * slope
        first = [slope * x, slope * y]
        second = [slope * xx + bend * x.square(), slope * yy + bend * y.square()]
    moved = (torch.cat([value, *first, *second], 1) @ last[0]).squeeze(-1)
    value, x, y, xx, yy = moved.chunk(5, 1)
    return Jet(value + last[1].squeeze(-1), (x, y), (xx, yy))
