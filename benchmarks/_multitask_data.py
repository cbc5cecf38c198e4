"""Real data with several tasks for each picture.

Two problems come with scikit-learn and need no download; three more are made where the files of their pictures are.
scikit-learn bundles no regression with several targets worth a benchmark: `load_linnerud` has 20 rows, and
`load_diabetes` one target. So the regressions here are made from the digits.

The pictures are split into three pools before anything is made from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from benchmarks._multitask_files import DataError, cifar100, mnist

SPLIT_SEED = 0  # of the pools, the same in every run
PAIRS = (60_000, 10_000, 20_000)  # of overlaid pictures of MNIST and FashionMNIST
NOT_ASKED = -1  # class of a picture that does not belong to a task


class Task(NamedTuple):
    """A head: so many `classes`, or a regression to one number where there are none."""

    name: str
    classes: int = 0

    @property
    def outputs(self) -> int:
        """Width of the head."""
        return self.classes or 1


class Examples(NamedTuple):
    """N examples: `inputs` `(N, d)`, `targets` `(N, K)`, and `sources` `(N, s)`, the pictures they are made from."""

    inputs: Tensor
    targets: Tensor
    sources: Tensor

    def to(self, device: torch.device) -> Examples:
        """The same on another device."""
        return Examples(*(part.to(device) for part in self))


@dataclass(frozen=True)
class Problem:
    """Several tasks on the same inputs.

    Attributes:
        title: for the table.
        tasks: K of them.
        train: to learn from.
        validation: to tune with.
        test: looked at once, with what was tuned.
        weightings: K weights each, for the weighted sum to try.
        batch: examples of a step.
        files: MD5 sums of the files, where there are any.
    """

    title: str
    tasks: tuple[Task, ...]
    train: Examples
    validation: Examples
    test: Examples
    weightings: tuple[tuple[float, ...], ...]
    batch: int = 64
    files: dict[str, str] = field(default_factory=dict)

    def only(self, place: int) -> Problem:
        """The problem with one task."""
        parts = {
            name: part._replace(targets=part.targets[:, place : place + 1])
            for name, part in self.pools().items()
        }
        return replace(self, tasks=(self.tasks[place],), weightings=(), **parts)

    def pools(self) -> dict[str, Examples]:
        """The three sets of examples by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def to(self, device: torch.device) -> Problem:
        """The same on another device."""
        return replace(self, **{name: part.to(device) for name, part in self.pools().items()})


# -- two pictures in one --------------------------------------------------------------------------


class Pictures(NamedTuple):
    """`values` `(N, h, w)` in [0, 1] and `labels` `(N,)`, in pools of indices."""

    values: Tensor
    labels: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


def place(pictures: Tensor, down: Tensor, right: Tensor, size: tuple[int, int]) -> Tensor:
    """`(N, h, w)` pictures on empty canvases of `size`, each moved by its own number of pixels."""
    count, height, width = pictures.shape
    canvas = pictures.new_zeros(count, *size)
    rows = (down[:, None] + torch.arange(height))[:, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, :]
    canvas[torch.arange(count)[:, None, None], rows, columns] = pictures
    return canvas


def overlay(pictures: Pictures, pool: Tensor, count: int, generator: torch.Generator) -> Examples:
    """Pairs from one pool: one picture at the left, one half a width further, the brighter pixel wins.

    As MultiMNIST (Sabour et al., 2017) has it, with a few pixels of chance in both directions.
    """
    height, width = pictures.values.shape[1:]
    size = (height + height // 4, width + width // 2)

    def chance(bound: int) -> Tensor:
        return torch.randint(bound + 1, (count,), generator=generator)

    sources = pool[torch.randint(len(pool), (count, 2), generator=generator)]
    left, right = sources.unbind(1)
    both = torch.maximum(
        place(pictures.values[left], chance(height // 4), chance(width // 8), size),
        place(pictures.values[right], chance(height // 4), width // 2 - chance(width // 8), size),
    )
    return Examples(both.flatten(1), pictures.labels[sources].float(), sources)


def overlaid(title: str, pictures: Pictures, counts: tuple[int, int, int]) -> Problem:
    """Which class is at the left, and which at the right?"""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    classes = int(pictures.labels.max()) + 1
    pools = (pictures.train, pictures.validation, pictures.test)
    made = [overlay(pictures, p, c, generator) for p, c in zip(pools, counts, strict=True)]
    tasks = (Task("left", classes), Task("right", classes))
    return Problem(title, tasks, *made, weightings=((1.2, 0.8), (0.8, 1.2)))


# -- bundled with scikit-learn --------------------------------------------------------------------


def digits() -> Pictures:
    """1,797 handwritten digits of 8 x 8 pixels: 1,000 to train, 297 to tune, 500 to test."""
    found = load_digits()
    values = torch.from_numpy(found.images / 16).float()
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return Pictures(values, torch.from_numpy(found.target), *order.split([1000, 297, 500]))


def overlaid_digits(root: Path | None = None) -> Problem:
    """Two digits in one picture."""
    return overlaid("Two overlaid digits", digits(), (6000, 2000, 4000))


INK_SCALE, SYMMETRY_SCALE = 10.0, 0.1


def four_questions(root: Path | None = None) -> Problem:
    """Class, parity, ink and symmetry of one digit.

    Ink is the mean pixel, symmetry minus the mean absolute difference to the mirror image. Both are standardised by
    the training pictures and then made ten times as large and as small: their squared errors start 10,000 apart. The
    weightings undo the scales, wholly or half way.
    """
    pictures = digits()
    values, labels = pictures.values, pictures.labels
    ink = values.mean((1, 2))
    symmetry = -(values - values.flip(2)).abs().mean((1, 2))
    columns = [labels.float(), (labels % 2).float()]
    for number, scale in ((ink, INK_SCALE), (symmetry, SYMMETRY_SCALE)):
        known = number[pictures.train]
        columns.append(scale * (number - known.mean()) / known.std())
    targets = torch.stack(columns, 1)

    def examples(pool: Tensor) -> Examples:
        return Examples(values[pool].flatten(1), targets[pool], pool[:, None])

    tasks = (Task("class", 10), Task("parity", 2), Task("ink"), Task("symmetry"))
    undone = (1.0, 1.0, INK_SCALE**-2, SYMMETRY_SCALE**-2)
    half = (1.0, 1.0, 1 / INK_SCALE, 1 / SYMMETRY_SCALE)
    return Problem(
        "Four questions about a digit, on unequal scales",
        tasks,
        examples(pictures.train),
        examples(pictures.validation),
        examples(pictures.test),
        (undone, half),
    )


# -- from files ------------------------------------------------------------------------------------


def in_pools(known: int, unseen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nine tenths of the `known` pictures to train, one to tune; the `unseen` that follow to test."""
    order = torch.randperm(known, generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, validation = order.split([known - known // 10, known // 10])
    return train, validation, torch.arange(known, known + unseen)


def overlaid_from(kind: str, title: str, root: Path | None) -> Problem:
    """Two pictures of MNIST or FashionMNIST in one."""
    found = mnist(kind, root)
    values = torch.cat([found.train.pictures, found.test.pictures]).float() / 255
    labels = torch.cat([found.train.labels, found.test.labels])
    pools = in_pools(len(found.train.labels), len(found.test.labels))
    return replace(overlaid(title, Pictures(values, labels, *pools), PAIRS), files=found.sums)


def multi_mnist(root: Path | None) -> Problem:
    """MultiMNIST."""
    return overlaid_from("MNIST", "MultiMNIST", root)


def multi_fashion(root: Path | None) -> Problem:
    """MultiFashion."""
    return overlaid_from("FashionMNIST", "MultiFashion", root)


def cifar_superclasses(root: Path | None) -> Problem:
    """CIFAR-100: one task for each of the 20 superclasses, which of its five classes is it? (Rosenbaum et al., 2018).

    A picture belongs to one task only. The pictures are halved in size, since the network has no convolutions.
    """
    found = cifar100(root)
    pictures = torch.cat([found.train.pictures, found.test.pictures])
    fine, coarse = torch.cat([found.train.labels, found.test.labels]).unbind(1)
    inputs = F.avg_pool2d(pictures.float() / 255 - 0.5, 2).flatten(1)
    # Classes are numbered within their superclass, in the order of their own numbers.
    group = torch.zeros(int(fine.max()) + 1, dtype=torch.long)
    group[fine] = coarse
    within = torch.stack([(group[:label] == group[label]).sum() for label in range(len(group))])
    targets = torch.full((len(fine), int(coarse.max()) + 1), float(NOT_ASKED))
    targets[torch.arange(len(fine)), coarse] = within[fine].float()

    def examples(pool: Tensor) -> Examples:
        return Examples(inputs[pool], targets[pool], pool[:, None])

    tasks = tuple(Task(f"superclass {i}", int(within.max()) + 1) for i in range(targets.shape[1]))
    made = [examples(pool) for pool in in_pools(len(found.train.labels), len(found.test.labels))]
    for name, pool in zip(("train", "validation", "test"), made, strict=True):
        if not (pool.targets != NOT_ASKED).any(0).all():
            raise DataError(
                f"CIFAR100 must have pictures of every superclass to train, to tune and to test. Those in the "
                f"{name} pool, {len(pool.targets):,}, lack one. Take the whole files."
            )
    draw = np.random.default_rng(SPLIT_SEED)  # nobody knows good weights of 20 like tasks
    drawn = len(tasks) * draw.dirichlet(np.ones(len(tasks)), size=2)
    weightings = tuple(tuple(map(float, weights)) for weights in drawn)
    title = "CIFAR-100 superclasses"
    return Problem(title, tasks, *made, weightings=weightings, batch=256, files=found.sums)


PROBLEMS: dict[str, Callable[[Path | None], Problem]] = {
    "overlaid": overlaid_digits,
    "digits": four_questions,
    "multimnist": multi_mnist,
    "multifashion": multi_fashion,
    "cifar100": cifar_superclasses,
}
BUNDLED = ("overlaid", "digits")
