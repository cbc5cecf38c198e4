"""The command line that the benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def new_parser(question: str) -> argparse.ArgumentParser:
    """A parser with `--device`, `--out`, and the `--quick` of the tests."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **least: int
) -> argparse.Namespace:
    """Parse, and exit with a message where a device is missing or a number is less than `least`."""
    options = parser.parse_args(arguments)
    for option, bound in least.items():
        if getattr(options, option) < bound:
            parser.error(f"--{option} must be at least {bound}. Got {getattr(options, option)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use. Found none.")
    return options


def result_path(options: argparse.Namespace, name: str) -> Path | None:
    """Where the result goes; None for a quick run that was given no file."""
    if options.out is not None:
        return Path(options.out)
    suffix = "" if options.device == "cpu" else f"-{options.device}"
    return None if options.quick else RESULTS / f"{name}{suffix}.json"
