"""Which law holds for which method: the table that the tests check and that the documentation prints.

`python -m tests.method_laws` prints it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

from agsurgery import (
    AGS,
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradVac,
    Mean,
    NashMTL,
    NormRestored,
    PCGrad,
    Random,
    Smoothed,
    Sum,
    UPGrad,
)
from agsurgery.methods import Method

ANY, PAIRS, NEVER = "any K", "K ≤ 2", "no"
INDEPENDENT, SOLVABLE = "independent gradients", "where all can gain"
"""For how many tasks, or for which gradients, a law holds."""


@dataclass(frozen=True)
class Laws:
    """A method, and where it promises what."""

    make: Callable[[], Method]
    plain: str  # the plain sum, exactly, where no two gradients conflict
    norm: str  # the update has the norm of the plain sum
    opposes_none: str  # no task's loss rises to first order
    relabels: str  # relabelling the tasks relabels the weights
    absent: str  # a task without gradient changes nothing for the others


COLUMNS = {
    "plain": "plain sum where nothing conflicts",
    "norm": "norm of the plain sum",
    "opposes_none": "opposes no task",
    "relabels": "order of tasks does not matter",
    "absent": "an absent task changes nothing",
}

TABLE = {
    "Sum": Laws(Sum, ANY, ANY, NEVER, ANY, ANY),
    "Mean": Laws(Mean, NEVER, NEVER, NEVER, ANY, NEVER),
    "Random": Laws(Random, NEVER, NEVER, NEVER, NEVER, NEVER),
    "AGS": Laws(AGS, ANY, ANY, PAIRS, PAIRS, PAIRS),
    "PCGrad": Laws(PCGrad, ANY, NEVER, PAIRS, PAIRS, PAIRS),
    "GradVac": Laws(GradVac, NEVER, NEVER, NEVER, PAIRS, PAIRS),
    "CAGrad(0.5)": Laws(lambda: CAGrad(0.5), NEVER, NEVER, NEVER, ANY, ANY),
    "CAGrad(1)": Laws(lambda: CAGrad(1.0), NEVER, NEVER, ANY, ANY, ANY),
    "MGDA": Laws(MGDA, NEVER, NEVER, ANY, ANY, ANY),
    "UPGrad": Laws(UPGrad, ANY, NEVER, ANY, ANY, ANY),
    "DualProj": Laws(DualProj, ANY, NEVER, ANY, ANY, ANY),
    "IMTLG": Laws(IMTLG, NEVER, NEVER, NEVER, ANY, ANY),
    "NashMTL": Laws(NashMTL, NEVER, SOLVABLE, ANY, ANY, ANY),
    "FairGrad(2)": Laws(lambda: FairGrad(2.0), NEVER, SOLVABLE, ANY, ANY, ANY),
    "AlignedMTL": Laws(AlignedMTL, NEVER, NEVER, NEVER, ANY, ANY),
    "ConFIG": Laws(ConFIG, NEVER, NEVER, INDEPENDENT, ANY, ANY),
    "NormRestored(UPGrad())": Laws(lambda: NormRestored(UPGrad()), ANY, ANY, ANY, ANY, ANY),
    "Smoothed(UPGrad())": Laws(lambda: Smoothed(UPGrad()), NEVER, NEVER, NEVER, ANY, ANY),
}


def markdown() -> str:
    """The table for the documentation."""
    header = ["method", *COLUMNS.values()]
    lines = [header, ["---"] * len(header)]
    for name, laws in TABLE.items():
        cells = [getattr(laws, field.name) for field in fields(laws)[1:]]
        lines.append([f"`{name}`", *("–" if cell == NEVER else cell for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(markdown())
