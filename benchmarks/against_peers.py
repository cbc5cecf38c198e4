"""Do our methods agree with those of TorchJD, conflictfree and pytorch_optimizer, and who is right where they differ?

First where all are valid: random independent gradients of norms 1 to 2, and the relative difference of the updates.
Then where they are not: each trap is an input, what the definition of the method demands there, and by how much our
version and the peer's break it. Rows named "pattern" stand for public code that cannot be installed, written anew from
its description. A trap that the installed version does not fall into is reported as not reproduced.

Time and memory beside the same peers: `step_cost`, `solver_cost` and `peak_memory`.

    python -m benchmarks.against_peers
    python -m benchmarks.against_peers --peers torchjd pattern

TorchJD's NashMTL needs `pip install ecos`; rows of what is missing are left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks._cli import finish, new_parser, parse, provenance, threads
from benchmarks._traps import (
    Missing,
    Trap,
    Update,
    all_traps,
    conflictfree,
    ours,
    pytorch_optimizer_pcgrad,
    torchjd,
)
from benchmarks.figures import against_peers as figure

PACKAGES = (
    "torch",
    "torchjd",
    "conflictfree",
    "pytorch_optimizer",
    "quadprog",
    "cvxpy",
    "ecos",
    "scipy",
)
PEERS = ("torchjd", "conflictfree", "pytorch_optimizer", "pattern")
TASKS = (2, 4, 8)
COLUMNS = 64
INPUTS = 20
AGREE = 0.005


# -- where all are valid ------------------------------------------------------------------------------


def conflicting(tasks: int, seed: int) -> Tensor:
    """`(K, n)` independent gradients of norms 1 to 2, moved apart by half of their mean."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, COLUMNS, generator=generator, dtype=torch.float64)
    units = torch.nn.functional.normalize(rows - 0.5 * rows.mean(0), dim=1)
    return units * torch.linspace(1, 2, tasks, dtype=torch.float64).unsqueeze(1)


def independent(tasks: int, seed: int) -> Tensor:
    """`(K, n)` independent gradients of norms 1 to 2, whose sum opposes none of them: TorchJD's NashMTL needs that."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, COLUMNS, generator=generator, dtype=torch.float64)
    lengths = torch.linspace(1, 2, tasks, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1) * lengths.unsqueeze(1)


def pairs_apart(tasks: int, seed: int) -> Tensor:
    """`(K, n)` gradients in K / 2 pairs, each in a plane of its own and in conflict: no order of tasks matters."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(tasks, COLUMNS, dtype=torch.float64)
    for first in range(0, tasks, 2):
        angle = math.pi * (0.55 + 0.35 * float(torch.rand((), generator=generator)))
        length = 1 + float(torch.rand((), generator=generator))
        rows[first, first] = 1.0
        rows[first + 1, first : first + 2] = length * torch.tensor(
            [math.cos(angle), math.sin(angle)], dtype=torch.float64
        )
    return rows


@dataclass(frozen=True)
class Agreement:
    """A method of ours and the same of a peer.

    Args:
        method: of this package.
        peer: package.
        theirs: maker of the peer's version, by number of tasks.
        options: of ours.
        rows: inputs.
        direction: compare unit vectors, where the definition leaves the length open.
        dtype: of the gradients that the peer gets.
    """

    method: str
    peer: str
    theirs: Callable[[int], Update]
    options: dict[str, Any]
    rows: Callable[[int, int], Tensor] = conflicting
    direction: bool = False
    dtype: torch.dtype = torch.float64


def _of_torchjd(method: str, **options: Any) -> Callable[[int], Update]:
    return lambda tasks: torchjd(method, **options)()


MEAN = {"reduction": "mean"}
"""For methods that the peer has on the scale of the mean gradient."""

AGREEMENTS = (
    Agreement("Sum", "torchjd", _of_torchjd("Sum"), {}),
    Agreement("PCGrad", "torchjd", _of_torchjd("PCGrad"), {}, rows=pairs_apart),
    Agreement("GradVac", "torchjd", _of_torchjd("GradVac"), {}, rows=pairs_apart),
    Agreement("CAGrad", "torchjd", _of_torchjd("CAGrad", c=0.5), {"c": 0.5, **MEAN}),
    Agreement("MGDA", "torchjd", _of_torchjd("MGDA"), MEAN),
    Agreement("UPGrad", "torchjd", _of_torchjd("UPGrad"), MEAN),
    Agreement("DualProj", "torchjd", _of_torchjd("DualProj"), MEAN),
    Agreement("IMTLG", "torchjd", _of_torchjd("IMTLG"), MEAN),
    Agreement("AlignedMTL", "torchjd", _of_torchjd("AlignedMTL"), MEAN),
    Agreement("ConFIG", "torchjd", _of_torchjd("ConFIG"), {}),
    Agreement(
        "FairGrad",
        "torchjd",
        _of_torchjd("FairGrad", alpha=2.0),
        {"alpha": 2.0},
        direction=True,
    ),
    Agreement(
        "NashMTL",
        "torchjd",
        lambda tasks: torchjd("NashMTL", n_tasks=tasks)(),
        {},
        rows=independent,
        direction=True,
    ),
    Agreement(
        "PCGrad",
        "conflictfree",
        lambda tasks: conflictfree("PCGradOperator")(),
        {},
        rows=pairs_apart,
        dtype=torch.float32,
    ),
    Agreement(
        "IMTLG",
        "conflictfree",
        lambda tasks: conflictfree("IMTLGOperator")(),
        MEAN,
        dtype=torch.float32,
    ),
    Agreement(
        "ConFIG",
        "conflictfree",
        lambda tasks: conflictfree("ConFIGOperator")(),
        {},
        dtype=torch.float32,
    ),
    Agreement(
        "PCGrad",
        "pytorch_optimizer",
        lambda tasks: pytorch_optimizer_pcgrad()(),
        {},
        rows=pairs_apart,
    ),
)


def difference(pair: Agreement, tasks: int, inputs: int, device: torch.device) -> float:
    """Largest relative difference of the updates.

    Raises:
        Missing: the peer is not there.
    """
    worst = 0.0
    for seed in range(inputs):
        rows = pair.rows(tasks, seed)
        mine = ours(pair.method, device=device, **pair.options)()(rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = pair.theirs(tasks)(rows.to(pair.dtype)).double()
        if pair.direction:
            mine, theirs = mine / mine.norm(), theirs / theirs.norm()
        worst = max(worst, float((mine - theirs).norm() / theirs.norm()))
    return worst


# -- where they are not -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """By how much a version breaks the demand.

    Args:
        broken: None where there is no such version.
        error: what it raised.
        missing: why there is none.
    """

    broken: float | None
    error: str | None = None
    missing: str | None = None

    def keeps(self, tolerance: float) -> bool | None:
        """Whether it keeps the demand; None where there is no version."""
        return None if self.broken is None else self.broken <= tolerance

    def to_dict(self, tolerance: float) -> dict[str, Any]:
        """For a JSON file, which knows no infinity."""
        finite = self.broken is not None and math.isfinite(self.broken)
        return {
            "satisfied": self.keeps(tolerance),
            "broken_by": float(f"{self.broken:.3g}") if finite else None,
            "not_finite": self.broken is not None and not finite and self.error is None,
            "error": self.error,
            "missing": self.missing,
        }


def judge(trap: Trap, make: Callable[[], Any] | None) -> Verdict:
    """Run one version on the input of a trap."""
    if make is None:
        return Verdict(None, missing="not in this package")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a peer warns of is its own affair
        try:
            return Verdict(trap.measure(make()))
        except Missing as reason:
            return Verdict(None, missing=str(reason))
        except Exception as error:  # whatever a solver behind it raises
            return Verdict(math.inf, error=f"{type(error).__name__}: {error}"[:120])


def spring(trap: Trap) -> dict[str, Any]:
    """One row: both versions on the input of a trap."""
    mine, theirs = judge(trap, trap.ours), judge(trap, trap.theirs)
    kept = theirs.keeps(trap.tolerance)
    return {
        "title": trap.title,
        "peer": trap.peer,
        "given": trap.given,
        "demands": trap.demands,
        "tolerance": trap.tolerance,
        "ours": mine.to_dict(trap.tolerance),
        "theirs": theirs.to_dict(trap.tolerance),
        "reproduced": None if kept is None else not kept,
    }


# -- report -------------------------------------------------------------------------------------------


def _shown(verdict: dict[str, Any]) -> str:
    if verdict["missing"] is not None:
        return "-"
    if verdict["error"] is not None:
        return "raises"
    if verdict["not_finite"]:
        return "not finite"
    return f"{'yes' if verdict['satisfied'] else 'NO'} ({verdict['broken_by']:.1g})"


def trap_line(row: dict[str, Any]) -> str:
    """One line of the second table."""
    verdicts = f"{_shown(row['ours']):>13} {_shown(row['theirs']):>13}"
    note = "   not reproduced" if row["reproduced"] is False else ""
    return f"  {row['peer']:<18}{row['title']:<44} {verdicts}{note}\n      {row['given']}: {row['demands']}"


def agreement_line(row: dict[str, Any]) -> str:
    """One line of the first table."""
    cells = "".join(f"{value:>10.0e}" for value in row["difference"].values())
    missing = row.get("missing")
    return f"  {row['method']:<12}{row['peer']:<18}{'left out: ' + missing if missing else cells}"


def answer(agreements: list[dict[str, Any]], traps: list[dict[str, Any]]) -> str:
    """The result in one sentence."""
    cells = [
        (value, f"{row['method']} of {row['peer']}, K = {tasks}")
        for row in agreements
        for tasks, value in row["difference"].items()
    ]
    parts = []
    if cells:
        apart = sorted((cell for cell in cells if cell[0] > AGREE), reverse=True)
        agreed = max((value for value, _ in cells if value <= AGREE), default=0.0)
        text = f"updates agree to {agreed:.0e} in {len(cells) - len(apart)} of {len(cells)} cells"
        if apart:
            text += f" (not: {'; '.join(f'{name}: {value:.0%}' for value, name in apart)})"
        parts.append(text)
    for name, chosen in (
        ("peers", [row for row in traps if row["peer"] != "pattern"]),
        ("patterns", [row for row in traps if row["peer"] == "pattern"]),
    ):
        judged = [row for row in chosen if row["reproduced"] is not None]
        if judged:
            caught = sum(row["reproduced"] for row in judged)
            parts.append(f"{caught} of {len(judged)} traps of {name} reproduce")
    mine = [row["ours"]["satisfied"] for row in traps if row["ours"]["satisfied"] is not None]
    if mine:
        parts.append(f"ours keeps the definition in {sum(mine)} of {len(mine)}")
    return f"Answer: {'; '.join(parts)}."


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    parser = new_parser(__doc__)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--inputs", type=int, default=INPUTS, help="per cell of the agreement")
    options = parse(parser, arguments, inputs=1)
    device = torch.device(options.device)
    inputs, tasks = (2, (2, 4)) if options.quick else (options.inputs, TASKS)
    with threads():
        record = provenance(options, PACKAGES, __doc__)
        agreements = []
        print(f"  {'method':<12}{'peer':<18}" + "".join(f"{f'K = {k}':>10}" for k in tasks))
        for pair in AGREEMENTS:
            if pair.peer not in options.peers:
                continue
            row: dict[str, Any] = {"method": pair.method, "peer": pair.peer, "difference": {}}
            try:
                for k in tasks:
                    row["difference"][str(k)] = float(f"{difference(pair, k, inputs, device):.2e}")
            except Missing as reason:
                row["missing"] = str(reason)
            agreements.append(row)
            print(agreement_line(row), flush=True)
        print(f"\n  {'peer':<18}{'definition kept? (broken by)':<44} {'ours':>13} {'theirs':>13}")
        traps = []
        for trap in all_traps(device):
            if trap.peer in options.peers:
                traps.append(spring(trap))
                print(trap_line(traps[-1]), flush=True)
    print(
        "Time and memory beside the same peers: results/step_cost.json, solver_cost.json, peak_memory.json"
    )
    result = {
        "answer": answer(agreements, traps),
        "inputs": inputs,
        **record,
        "agreement": agreements,
        "traps": traps,
    }
    return finish(options, "against_peers", result, figure.draw)


if __name__ == "__main__":
    main()
