"""What does the published pretraining need on a GPU, counted without one?

Runs one step of the cytology example's pretraining on meta tensors, which have a shape and no content: ResNet-18, the
paper's projector, batch and crop. Counts floating point operations (torch's flop counter: multiplications and
additions of convolutions and matrix products), the bytes that autograd keeps for the backward passes, and those of
weights and gradients. From these follow hours of training on the full public set at assumed, sustained speeds: a
prediction, not a measurement.

Surgery needs a backward pass for each loss. Where the sides share a forward pass (`--statistics shared`), each of them
goes through the whole batch; where every view has its own, as published, through its half.

    python -m benchmarks.needs                          # seconds
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._cli import finish, new_parser, parse, provenance
from examples.slam_ags_cytology.arms import objectives
from examples.slam_ags_cytology.networks import Pretrained
from examples.slam_ags_cytology.pretrain_config import PretrainConfig, published

PACKAGES = ("torch", "torchvision")
CASES = (
    ("sum", "shared"),
    ("ags", "shared"),
    ("ags", "views"),
)
"""Arm, and whose BatchNorm statistics: of one forward pass over all, or of one for each view of each side."""

SPEEDS = (10e12, 50e12, 100e12)  # sustained operations per second
FLOAT = 4  # bytes


def count(config: PretrainConfig) -> dict[str, int]:
    """Operations and bytes of one step, as configured.

    Returns:
        `forward_flop`; `backward_flop`, of all backward passes; `activation_bytes`, kept for them in fp32, each storage
        once; `weight_bytes`; `state_bytes`: weights, momentum, the gradient of the step and one of each loss.
    """
    with torch.device("meta"):
        model = Pretrained(
            config.encoder, config.hidden, config.outputs, batch_norm=config.projector_batch_norm
        )
        goal = objectives(config.arm, config)
        view = torch.empty(config.batch // 2, 3, config.crop, config.crop)
    parameters = [*model.parameters(), *goal.parameters()]
    kept = _Kept(model)
    with (
        FlopCounterMode(display=False) as forward,
        torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor),
    ):
        losses = goal.losses(*goal.outputs(model, (view, view), (view, view)))
    backward = [sum(losses.values())] if config.arm == "sum" else [*losses.values()]
    with FlopCounterMode(display=False) as passes:
        for loss in backward:
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    weights = FLOAT * sum(parameter.numel() for parameter in parameters)
    rows = len(backward) if len(backward) > 1 else 0
    return {
        "forward_flop": forward.get_total_flops(),
        "backward_flop": passes.get_total_flops(),
        "activation_bytes": kept.size,
        "weight_bytes": weights,
        "state_bytes": (3 + rows) * weights,
    }


class _Kept:
    """Bytes of the storages that autograd keeps, but for those of the model."""

    def __init__(self, model: nn.Module) -> None:
        self.alive: list[Tensor] = [*model.parameters(), *model.buffers()]  # none is counted twice
        self.seen = {tensor.untyped_storage()._cdata for tensor in self.alive}
        self.size = 0

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(tensor)  # or its address would be given to another
            self.size += storage.nbytes()
        return tensor


def hours(flop: float, epochs: int, cells: int, batch: int) -> dict[str, float]:
    """Hours of the whole training at each assumed speed, in TFLOP/s."""
    steps = epochs * round(cells / batch)
    return {f"{speed / 1e12:g}": round(steps * flop / speed / 3600, 2) for speed in SPEEDS}


def answer(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The needs of every case in a sentence."""
    said = [
        f"{row['arm']}, {row['statistics']} statistics: {row['step_flop'] / 1e12:.2f} TFLOP a step, "
        f"{row['activation_bytes'] / 1e9:.1f} GB of activations, {row['hours']['100']:.1f} hours at 100 TFLOP/s"
        for row in rows
    ]
    return (
        f"Answer (counted, hours predicted for {options.cells} cells and {options.epochs} epochs): "
        f"{'; '.join(said)}."
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Count, store the result, and answer."""
    parser = new_parser(__doc__)
    parser.add_argument("--cells", type=int, default=100_000, help="training cells (100,000)")
    parser.add_argument("--epochs", type=int, default=150, help="(150, as published)")
    parser.add_argument(
        "--batch", type=int, default=256, help="patches per step (256, as published)"
    )
    parser.add_argument("--crop", type=int, default=224, help="side of a view (224, as published)")
    options = parse(parser, arguments, cells=1, epochs=1, batch=4, crop=32)
    record = provenance(options, PACKAGES, __doc__)
    base = published(PretrainConfig(Path(), paper=True))
    rows = []
    for arm, statistics in CASES:
        config = replace(
            base, arm=arm, statistics=statistics, batch=options.batch, crop=options.crop
        )
        row: dict[str, Any] = {"arm": arm, "statistics": statistics, **count(config)}
        row["step_flop"] = row["forward_flop"] + row["backward_flop"]
        row["hours"] = hours(row["step_flop"], options.epochs, options.cells, options.batch)
        rows.append(row)
    settings = {key: getattr(options, key) for key in ("cells", "epochs", "batch", "crop")}
    result = {"answer": answer(rows, options), **record, "settings": settings, "rows": rows}
    return finish(options, "needs", result)


if __name__ == "__main__":
    main()
