"""Decoded cells of a sweep: decoded once, given to each run folder while it is worked on, and dropped then."""

from __future__ import annotations

from collections.abc import Sequence, Set

from .manifest import read_manifest
from .sharing import drop_store, share_store
from .store import CellStore, open_store
from .sweep_config import SweepConfig
from .sweep_units import Unit, folders, read_unit

__all__ = ["SharedCells"]


class SharedCells:
    """One store with the cells of all runs, opened when the first run needs it, also when a sweep is continued."""

    def __init__(self, config: SweepConfig, units: Sequence[Unit]) -> None:
        self._config, self._units = config, units
        self._store: CellStore | None = None

    def give(self, unit: Unit) -> None:
        """Put the cells of a unit into those of its run folders that are not finished and have none."""
        for folder in folders(self._config, unit):
            note = folder / f"cells-{self._config.pretrain.patch}.json"
            if read_unit(self._config, unit, folder) is None and not note.exists():
                if self._store is None:
                    self._store = self._all()
                manifest = read_manifest(folder / "manifest.csv", check_files=False)
                share_store(self._store, manifest["path"], folder)

    def drop(self, unit: Unit, busy: Set[Unit]) -> None:
        """Remove the cells of a finished unit where no unit of `busy` uses them, unless they are to be kept."""
        if self._config.keep_stores:
            return
        used = {folder for other in busy for folder in folders(self._config, other)}
        for folder in {*folders(self._config, unit)} - used:
            drop_store(folder, self._config.pretrain.patch)

    def _all(self) -> CellStore:
        paths: dict[str, None] = {}
        runs = dict.fromkeys(f for unit in self._units for f in folders(self._config, unit))
        for folder in runs:
            manifest = read_manifest(folder / "manifest.csv", check_files=False)
            paths |= dict.fromkeys(manifest["path"])
        return open_store(sorted(paths), self._config.pretrain.patch, self._config.out)
