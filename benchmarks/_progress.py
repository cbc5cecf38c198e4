"""What is done, and how long the rest takes."""

from __future__ import annotations

import sys
import time


class Progress:
    """Lines on stderr: what is done, and about how long the rest takes."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.begin = total, 0, time.perf_counter()

    def __call__(self, what: str) -> None:
        """One more is done."""
        self.done += 1
        left = (time.perf_counter() - self.begin) / self.done * (self.total - self.done)
        print(
            f"{self.done}/{self.total}, about {left / 60:.0f} min left: {what}",
            file=sys.stderr,
            flush=True,
        )
