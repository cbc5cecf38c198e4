"""Pairs of quadratics whose Pareto set is known, and where theory says that methods end on them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, optimize

Array = NDArray[np.float64]

DIMENSIONS, PAIRS = 10, 5
LARGER = (1.0, 100.0)  # scale of the second loss over the first


class Pair(NamedTuple):
    """Two losses (p - a_i)' A_i (p - a_i) / 2; `matrices` `(2, n, n)`, `centres` `(2, n)`."""

    matrices: Array
    centres: Array

    @classmethod
    def draw(cls, seed: int, larger: float) -> Pair:
        """Eigenvalues from 1 to 10, the second matrix times `larger`."""
        generator = np.random.default_rng(seed)
        matrices = []
        for scale in (1.0, larger):
            basis = np.linalg.qr(generator.normal(size=(DIMENSIONS, DIMENSIONS)))[0]
            matrices.append(scale * (basis * np.geomspace(1, 10, DIMENSIONS)) @ basis.T)
        return cls(np.stack(matrices), generator.normal(size=(2, DIMENSIONS)))

    def gradients(self, point: Array) -> Array:
        """`(2, n)` gradients."""
        found: Array = np.einsum("kij,kj->ki", self.matrices, point - self.centres)
        return found

    def best(self, share: float) -> Array:
        """The minimum of share L_1 + (1 - share) L_2: for 0 <= share <= 1 these are the Pareto set."""
        first, second = share * self.matrices[0], (1 - share) * self.matrices[1]
        found: Array = np.linalg.solve(
            first + second, first @ self.centres[0] + second @ self.centres[1]
        )
        return found

    def distance(self, point: Array) -> float:
        """Distance of a point to the Pareto set."""

        def squared(logit: float) -> float:
            return float(((self.best(1 / (1 + np.exp(-logit))) - point) ** 2).sum())

        grid = np.linspace(-25, 25, 501)  # the ends are the minima of the losses, to 1e-11
        middle = grid[int(np.argmin([squared(v) for v in grid]))]
        bounds = (middle - 0.1, middle + 0.1)
        found = optimize.minimize_scalar(
            squared, bounds=bounds, method="bounded", options={"xatol": 1e-10}
        )
        return float(np.sqrt(found.fun))

    @property
    def rate(self) -> float:
        """A small learning rate: a hundredth of what the sum is stable with."""
        return float(0.02 / np.linalg.eigvalsh(self.matrices.sum(0))[-1])


def start_of(pair: Pair) -> Array:
    """On neither side: a point off the Pareto set, the same in every run."""
    return pair.centres.mean(0) + 2.0


def flow_pcgrad(a: Array, b: Array) -> Array:
    """PCGrad for two vectors."""
    inner = a @ b
    if inner >= 0:
        return a + b
    return a + b - inner / (b @ b) * b - inner / (a @ a) * a


def flow_ags(a: Array, b: Array) -> Array:
    """AGS for two vectors, with its cap."""
    update = flow_pcgrad(a, b)
    return min(10.0, float(np.linalg.norm(a + b) / np.linalg.norm(update))) * update


def flow_mgda(a: Array, b: Array) -> Array:
    """Twice the shortest convex combination of two vectors."""
    apart = b - a
    share = np.clip(b @ apart / (apart @ apart), 0, 1)
    return 2 * (share * a + (1 - share) * b)


def flow_config(a: Array, b: Array) -> Array:
    """The bisector, as long as the sum of both projections on it."""
    bisector = a / np.linalg.norm(a) + b / np.linalg.norm(b)
    bisector = bisector / np.linalg.norm(bisector)
    return ((a + b) @ bisector) * bisector


def flow_dualproj(a: Array, b: Array) -> Array:
    """The sum, without its component against the vector that it opposes."""
    total = a + b
    for vector in (a, b):
        if total @ vector < 0:
            return total - total @ vector / (vector @ vector) * vector
    return total


FLOWS = {
    "AGS": flow_ags,
    "PCGrad": flow_pcgrad,
    "ConFIG": flow_config,
    "MGDA": flow_mgda,
    "DualProj": flow_dualproj,
}
OF_THE_SUM = ("Sum", "CAGrad")
"""Methods that end at the minimum of the sum."""


def predicted(method: str, pair: Pair, duration: float) -> Array | None:
    """Where a method must end, by a linear system or an ODE solver; None where neither tells."""
    if method in OF_THE_SUM:
        return pair.best(0.5)
    if method not in FLOWS:
        return None
    flow = FLOWS[method]

    def velocity(_: float, point: Array) -> Array:
        return -flow(*pair.gradients(point))

    tolerances = {"rtol": 1e-8, "atol": 1e-10}
    solved = integrate.solve_ivp(
        velocity, (0, duration), start_of(pair), method="LSODA", **tolerances
    )
    end: Array = solved.y[:, -1]
    return end
