"""The equations of the benchmark of physics-informed networks, with their solutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks._pinn_networks import Jet

VISCOSITY = 0.05 / math.pi
WAVES = (1, 2)  # half periods of the Helmholtz solution on [0, 1]
INSIDE, BORDER = 128, 64  # points of a step


@dataclass(frozen=True)
class Problem:
    """An equation on a box.

    Attributes:
        title: for the table.
        low: lower corner.
        high: upper corner.
        residual: violation of the equation, from points and jet.
        border: draws points at which the solution is given, for some steps, with its values.
        reference: `(n,)` solution at `(n, 2)` points, float64.
    """

    title: str
    low: tuple[float, float]
    high: tuple[float, float]
    residual: Callable[[Tensor, Jet], Tensor]
    border: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    reference: Callable[[np.ndarray], np.ndarray]

    def inside(self, steps: int, generator: torch.Generator) -> Tensor:
        """`(steps, INSIDE, 2)` uniform points."""
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        return low + (high - low) * torch.rand(steps, INSIDE, 2, generator=generator)

    def grid(self, count: int = 101) -> np.ndarray:
        """`(count * count, 2)` points to judge the error at."""
        axes = [np.linspace(a, b, count) for a, b in zip(self.low, self.high, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def burgers_reference(points: np.ndarray, nodes: int = 200) -> np.ndarray:
    """Solution of Burgers at `(n, 2)` points x, t by the Cole-Hopf formula.

    u = -int sin(pi y) f(y) e dz / int f(y) e dz, with y = x - 2 sqrt(nu t) z, f(y) = exp(-cos(pi y) / (2 pi nu)) and
    e = exp(-z^2), the weight of Gauss-Hermite quadrature (Basdevant et al., 1986).
    """
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    x, t = points[:, :1], points[:, 1:]
    y = x - 2 * np.sqrt(VISCOSITY * t) * z
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    with np.errstate(divide="ignore"):  # the outermost weights underflow
        exponent = exponent + np.log(weights)
    mass = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    found: np.ndarray = -(mass * np.sin(np.pi * y)).sum(1) / mass.sum(1)
    return found


def burgers_residual(points: Tensor, jet: Jet) -> Tensor:
    """u_t + u u_x - nu u_xx."""
    return jet.first[1] + jet.value * jet.first[0] - VISCOSITY * jet.second[0]


def burgers_border(steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`(steps, BORDER, 2)` points with their values: half of them at t = 0, a quarter at each end."""
    half = BORDER // 2
    x = 2 * torch.rand(steps, half, generator=generator) - 1
    t = torch.rand(steps, half, generator=generator)
    zero = torch.zeros(steps, half)
    ends = torch.where(torch.arange(half) % 2 == 0, -1.0, 1.0).expand(steps, half)
    points = torch.cat([torch.stack([x, zero], -1), torch.stack([ends, t], -1)], 1)
    return points, torch.cat([-torch.sin(math.pi * x), zero], 1)


def helmholtz_reference(points: np.ndarray) -> np.ndarray:
    """sin(pi x) sin(4 pi y)."""
    found: np.ndarray = np.prod(np.sin(np.pi * np.array(WAVES) * points), axis=1)
    return found


def helmholtz_residual(points: Tensor, jet: Jet) -> Tensor:
    """u_xx + u_yy + u - f."""
    waves = math.pi * torch.tensor(WAVES, dtype=points.dtype, device=points.device)
    solution = torch.sin(waves * points).prod(-1)
    force = (1 - waves.square().sum()) * solution
    return jet.second[0] + jet.second[1] + jet.value - force


def helmholtz_border(steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`(steps, BORDER, 2)` points, a quarter on each side, where the solution is zero."""
    along = 2 * torch.rand(steps, BORDER, generator=generator) - 1
    side = torch.arange(BORDER) % 4
    fixed = torch.where(side % 2 == 0, -1.0, 1.0).expand(steps, BORDER)
    vertical = side < 2
    points = torch.stack(
        [torch.where(vertical, fixed, along), torch.where(vertical, along, fixed)], -1
    )
    return points, torch.zeros(steps, BORDER)


PROBLEMS = {
    "burgers": Problem(
        "Burgers", (-1.0, 0.0), (1.0, 1.0), burgers_residual, burgers_border, burgers_reference
    ),
    "helmholtz": Problem(
        "Helmholtz",
        (-1.0, -1.0),
        (1.0, 1.0),
        helmholtz_residual,
        helmholtz_border,
        helmholtz_reference,
    ),
}
