"""Paths on the landscape of CAGrad and Nash-MTL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks._landscape_toy import SCALE, STARTS, toy, toy_pareto_set
from benchmarks._plots import colour, new_figure, save_svg


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The paths of each method over the mean of the two losses, with the Pareto set."""
    methods = result["methods"]
    columns = 4
    rows = -(-len(methods) // columns)
    figure = new_figure(3.2 * columns, 3.1 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    axis = torch.linspace(-10, 10, 121, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    values = toy(grid.view(-1, 2)).values.view(*grid.shape)
    height = (values[..., 0] / SCALE + values[..., 1]).numpy()
    curve = toy_pareto_set()
    names = list(methods)
    for axes, (name, found) in zip(panels, methods.items(), strict=False):
        axes.contour(axis, axis, height, levels=14, cmap="Greys", linewidths=0.5, alpha=0.6)
        axes.plot(*curve.T, color="0.5", linewidth=4, alpha=0.7)
        for x, y in found["landscape"]["path"]:
            axes.plot(x, y, color=colour(name, names), linewidth=1.3)
            axes.plot(x[0], y[0], "o", color="black", markersize=3)
            axes.plot(x[-1], y[-1], "*", color=colour(name, names), markersize=9)
        title = f"{name}: {found['landscape']['reached']} of {len(STARTS)}"
        axes.set(title=title, xlim=(-10.5, 10.5), ylim=(-10.5, 10.5))
    for axes in panels[len(methods) :]:
        axes.set_visible(False)
    figure.supxlabel("first parameter")
    figure.supylabel("second parameter")
    save_svg(figure, path)
