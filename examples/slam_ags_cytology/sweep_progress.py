"""What a sweep says while it works: a line per unit, the time left, and what failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .colour import COLOUR
from .errors import listing
from .sweep_units import Unit

__all__ = ["Progress", "failures", "name_of", "quiet"]


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """What the steps print goes to a file: several write at the same time."""
    with (
        log.open("a", encoding="utf-8", errors="replace") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        yield


class Progress:
    """A line per finished unit, with the time left: by kind of unit, since a random encoder costs next to nothing."""

    def __init__(self, wanted: Sequence[Unit], total: int) -> None:
        self.begin = time.monotonic()
        self.weight = {unit: self._weight(unit) for unit in wanted}
        self.done, self.finished = 0.0, total - len(wanted)
        self.total = total
        if self.finished:
            print(f"Continuing: {self.finished} of {total} parts are finished.", flush=True)

    @staticmethod
    def _weight(unit: Unit) -> float:
        """Expected cost; measured at the default settings: MIL and embedding take a tenth of a pretraining."""
        trained = 0 if unit.arm in ("random", COLOUR) else 1
        return trained + 0.1 * len(unit.rates)

    def report(self, unit: Unit, seconds: float | None) -> None:
        """Print the line of a unit that took so many seconds; None where it failed."""
        self.done += self.weight[unit]
        self.finished += 1
        elapsed = time.monotonic() - self.begin
        left = elapsed / self.done * (sum(self.weight.values()) - self.done)
        how = "FAILED" if seconds is None else f"{seconds:.0f} s"
        print(
            f"[{self.finished}/{self.total}] {name_of(unit)}: {how}. "
            f"Elapsed {_clock(elapsed)}, about {_clock(left)} left.",
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def name_of(unit: Unit) -> str:
    """A unit in words."""
    rates = " to ".join(dict.fromkeys(f"{100 * r:g} %" for r in (unit.rates[0], unit.rates[-1])))
    return f"{unit.arm} at {rates}, draw {unit.draw}"


def failures(failed: dict[str, str]) -> str:
    """What went wrong, by unit, in a sentence."""
    return (
        f"{len(failed)} part(s) of the sweep failed: "
        f"{listing(f'{name} ({error})' for name, error in failed.items())}. "
        "The same command tries them again."
    )
