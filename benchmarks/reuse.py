"""What is lost when weights serve n steps (`every=n`), and what is saved?

A network of two hidden layers learns K = 4 regressions of unequal size whose targets pull its few features in
different directions, on small batches, with SGD. For each n: backward passes per step, the cosine between the update
taken and the one that fresh weights would have given on the same batch, the share of tasks that the update opposed
(fresh weights: none, for this method), and the mean loss at the end relative to that of n = 1. Means over seeds.

    python -m benchmarks.reuse --steps 300
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import agsurgery
from agsurgery import GradientSurgery, UPGrad
from benchmarks._cli import finish, new_parser, parse, provenance
from benchmarks.figures import reuse as figure

EVERY = (1, 2, 5, 10, 50)
TASKS, INPUTS, WIDTH, BATCH, LR = 4, 16, 12, 32, 0.02
OPPOSED = -1e-6  # of the product of the lengths: below is more than rounding


class Regressions(nn.Module):
    """A shared trunk and four linear heads, with batches drawn from fixed teachers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(
            nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 6), nn.Tanh()
        )
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(TASKS))
        self.register_buffer("teachers", torch.randn(TASKS, INPUTS, 3))
        self.register_buffer("scales", torch.logspace(-0.5, 0.5, TASKS))
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int) -> Tensor:
        """Inputs: the same on every device."""
        return torch.randn(size, INPUTS, generator=self.generator).to(self.scales.device)

    def losses(self, x: Tensor) -> list[Tensor]:
        """One mean squared error for each head."""
        features = self.trunk(x)
        targets = torch.tanh(torch.einsum("bi,kij->kbj", x, self.teachers)).sum(-1, keepdim=True)
        triples = zip(self.heads, targets, self.scales, strict=True)
        return [s * (head(features) - s * y).square().mean() for head, y, s in triples]


def flat(parameters: Sequence[nn.Parameter]) -> Tensor:
    """All gradients in one vector."""
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def train(every: int, steps: int, seed: int, device: torch.device) -> dict[str, float]:
    """One run."""
    model = Regressions(seed).to(device)
    trunk = list(model.trunk.parameters())
    optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), lr=LR), UPGrad(), every=every)
    cosines, opposed, passes = [], [], []
    for _ in range(steps):
        x = model.batch(BATCH)
        optimizer.zero_grad()
        fresh_report = agsurgery.backward(model.losses(x), model.parameters(), UPGrad())
        fresh = flat(trunk)
        optimizer.zero_grad()
        report = optimizer.backward(model.losses(x))
        passes.append(1 if bool(report.gramian.isnan().any()) else TASKS)
        taken = flat(trunk)
        cosines.append(torch.cosine_similarity(taken, fresh, dim=0).item())
        gains = fresh_report.gramian @ report.weights
        lengths = fresh_report.norms * taken.norm()
        opposed.append((gains < OPPOSED * lengths).float().mean().item())
        optimizer.step()
    with torch.no_grad():
        final = sum(loss.item() for loss in model.losses(model.batch(4096))) / TASKS
    return {
        "passes": statistics.mean(passes),
        "cosine": statistics.mean(cosines),
        "opposed": statistics.mean(opposed),
        "final_loss": final,
    }


def measure(steps: int, seeds: int, device: torch.device) -> dict[str, Any]:
    """Means over seeds, for each n."""
    runs = {n: [train(n, steps, seed, device) for seed in range(seeds)] for n in EVERY}
    rows: dict[str, Any] = {}
    for n, results in runs.items():
        row = {key: statistics.mean(r[key] for r in results) for key in results[0]}
        ratios = [
            r["final_loss"] / one["final_loss"] for r, one in zip(results, runs[1], strict=True)
        ]
        row["final_over_fresh"] = statistics.mean(ratios)
        row["final_over_fresh_sd"] = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
        rows[str(n)] = {key: round(value, 4) for key, value in row.items()}
    return rows


def table(rows: dict[str, Any]) -> str:
    """One line for each n."""
    lines = [
        "every  passes/step  cosine with fresh  tasks opposed  final loss / fresh (sd over seeds)"
    ]
    for n, row in rows.items():
        lines.append(
            f"{n:>5}  {row['passes']:>11.2f}  {row['cosine']:>17.3f}  {row['opposed']:>13.1%}  "
            f"{row['final_over_fresh']:>10.3f} ({row['final_over_fresh_sd']:.3f})"
        )
    return "\n".join(lines)


def answer(rows: dict[str, Any]) -> str:
    """One sentence."""
    row = rows["10"]
    return (
        f"Answer: with every=10 a step takes {row['passes']:.1f} backward passes instead of {TASKS}; updates have "
        f"cosine {row['cosine']:.3f} with fresh ones and oppose {row['opposed']:.1%} of the tasks (fresh weights "
        f"{rows['1']['opposed']:.1%}); the final loss is {row['final_over_fresh']:.3f} times that of fresh weights."
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of each run (default: 400)")
    parser.add_argument("--seeds", type=int, default=5, help="runs for each n (default: 5)")
    options = parse(parser, arguments, steps=1, seeds=1)
    if options.quick:
        options.steps, options.seeds = 12, 1
    record = provenance(options, ("torch",), __doc__)
    rows = measure(options.steps, options.seeds, torch.device(options.device))
    print(table(rows))
    counts = {"steps": options.steps, "seeds": options.seeds}
    result = {"answer": answer(rows), **counts, **record, "rows": rows}
    return finish(options, "reuse", result, figure.draw)


if __name__ == "__main__":
    main()
