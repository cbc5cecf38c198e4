"""The command line that the benchmarks share, and how they end: with a file, a figure and an answer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import agsurgery
from benchmarks._measure import environment, write_json

RESULTS = Path(__file__).resolve().parent / "results"

Draw = Callable[[Mapping[str, Any], Path], None]
"""Draws a result, as its JSON file holds it, into an SVG file."""


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with `--device`, `--out`, and the `--quick` of the tests; help is the docstring of the script."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **least: int
) -> argparse.Namespace:
    """Parse, and exit with a message where a device is missing or a number is less than `least`.

    Of an option with several numbers, each must be as large.
    """
    options = parser.parse_args(arguments)
    for option, bound in least.items():
        given = getattr(options, option)
        smallest = min(given) if isinstance(given, list) else given
        if smallest < bound:
            parser.error(f"--{option} must be at least {bound}. Got {smallest}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use. Found none.")
    return options


@contextmanager
def threads(count: int = 1) -> Iterator[None]:
    """Inside, torch computes with so many threads; afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def provenance(
    options: argparse.Namespace, packages: Sequence[str], script: str | None
) -> dict[str, Any]:
    """What every file begins with: question, device, date, commit, versions, machine.

    To be asked before anything runs, since the load of the machine is that of others then.

    Args:
        options: as parsed.
        packages: whose versions matter beside ours.
        script: docstring of the script; its first paragraph is the question.
    """
    record = environment(torch.device(options.device), packages)
    record["versions"]["agsurgery"] = agsurgery.__version__
    return {"question": question(script), "device": options.device, **record}


def question(script: str | None) -> str:
    """First paragraph of a docstring, in one line."""
    return " ".join((script or "").split("\n\n")[0].split())


def result_path(options: argparse.Namespace, name: str) -> Path | None:
    """Where the result goes; None for a quick run that was given no file."""
    if options.out is not None:
        return Path(options.out)
    suffix = "" if options.device == "cpu" else f"-{options.device}"
    return None if options.quick else RESULTS / f"{name}{suffix}.json"


def finish(
    options: argparse.Namespace,
    name: str,
    result: dict[str, Any],
    draw: Draw | None = None,
) -> dict[str, Any]:
    """Store a result with its figure beside it, and print its answer as the last line.

    Args:
        options: as parsed.
        name: of the file in `results`.
        result: what the file holds.
        draw: makes the figure.

    Returns:
        The result.
    """
    path = result_path(options, name)
    if path is not None:
        write_json(path, result)
        if draw is not None:
            draw(result, path.with_suffix(".svg"))
    print(result["answer"])
    return result
