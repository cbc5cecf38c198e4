"""Command line: `python -m examples.slam_ags_cytology COMMAND --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import tyro

from .bags import BagsConfig, bags
from .embed import EmbedConfig, embed
from .errors import UserError
from .evaluate import EvaluateConfig, evaluate
from .mil import MilConfig, mil
from .pretrain import PretrainConfig, pretrain
from .report import ReportConfig, report
from .run import RunConfig, run
from .sweep import SweepConfig, sweep
from .synthetic import SyntheticConfig, synthetic

STEPS: dict[str, tuple[type, Any]] = {
    "synthetic": (SyntheticConfig, synthetic),
    "bags": (BagsConfig, bags),
    "pretrain": (PretrainConfig, pretrain),
    "embed": (EmbedConfig, embed),
    "mil": (MilConfig, mil),
    "evaluate": (EvaluateConfig, evaluate),
    "report": (ReportConfig, report),
    "run": (RunConfig, run),
    "sweep": (SweepConfig, sweep),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command; return the exit code (2 for wrong input, 130 when interrupted)."""
    config = tyro.extras.subcommand_cli_from_dict(
        {name: config_class for name, (config_class, _) in STEPS.items()},
        prog="python -m examples.slam_ags_cytology",
        description=(
            "Find the few abnormal cells of a slide when only slide labels are known. `run` does every step; "
            "the other commands are its steps, in this order."
        ),
        args=arguments,
    )
    step = next(
        function for config_class, function in STEPS.values() if type(config) is config_class
    )
    try:
        print(step(config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues where it stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":  # also imported by worker processes
    sys.exit(main())
