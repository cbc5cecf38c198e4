"""Jacobians with a known property, float64, one row per task."""

import torch
from torch import Tensor


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(tasks: int, columns: int = 20, seed: int = 0) -> Tensor:
    """Independent directions of similar length."""
    return torch.randn(tasks, columns, dtype=torch.float64, generator=_generator(seed))


def imbalanced(tasks: int, ratio: float, columns: int = 20, seed: int = 0) -> Tensor:
    """Norms spread evenly, on a logarithmic scale, from 1 to `ratio`."""
    scales = torch.logspace(0, torch.log10(torch.tensor(ratio)).item(), tasks, dtype=torch.float64)
    return random(tasks, columns, seed) * scales.unsqueeze(1)


def aligned(tasks: int, columns: int = 20, seed: int = 0) -> Tensor:
    """All rows positive, so that no two of them conflict."""
    return random(tasks, columns, seed).abs()


def opposite(tasks: int, columns: int = 20, seed: int = 0, ratio: float = 0.3) -> Tensor:
    """The second row points exactly against the first, at `ratio` of its length."""
    rows = random(tasks, columns, seed)
    rows[1] = -ratio * rows[0]
    return rows


def rank_one(tasks: int, columns: int = 20, seed: int = 0) -> Tensor:
    """All rows on one line, on both sides of zero."""
    return torch.outer(random(tasks, 1, seed + 1)[:, 0], random(1, columns, seed)[0])


def duplicated(tasks: int, columns: int = 20, seed: int = 0) -> Tensor:
    """The last row repeats the first."""
    rows = random(tasks, columns, seed)
    rows[-1] = rows[0]
    return rows


def zero_row(tasks: int, columns: int = 20, seed: int = 0) -> Tensor:
    """The last task has no gradient, as one that is absent from a batch."""
    rows = random(tasks, columns, seed)
    rows[-1] = 0
    return rows


def low_rank(tasks: int, columns: int = 2, seed: int = 0) -> Tensor:
    """More tasks than dimensions."""
    return random(tasks, columns, seed)


def pair(cosine: float, first: float = 1.0, second: float = 1.0) -> Tensor:
    """Two rows of given lengths and cosine, in the plane."""
    sine = (1 - cosine**2) ** 0.5
    return torch.tensor([[first, 0.0], [second * cosine, second * sine]], dtype=torch.float64)


SAMPLERS = {
    "random": random,
    "imbalanced 1e3": lambda tasks, seed=0: imbalanced(tasks, 1e3, seed=seed),
    "imbalanced 1e6": lambda tasks, seed=0: imbalanced(tasks, 1e6, seed=seed),
    "aligned": aligned,
    "opposite": opposite,
    "rank one": rank_one,
    "duplicated": duplicated,
    "zero row": zero_row,
    "low rank": low_rank,
}
