"""Does the loader of the cytology example keep up with the network that it feeds?

Counted are images as the network sees them (views), two for each cell, per second of one core:

- the example's loader: rows of the decoded store, and random views of the whole batch at once; with its own views, and
  with those of the paper;
- the published way, written anew from its description: every image opened with Pillow and sent through the transforms
  of torchvision one by one, in a DataLoader, each time it is needed;
- the network: forward and backward pass, ResNet-18 at 224 pixels and the small encoder at 56.

All are timed in turn, in many rounds. A second table gives what decoding costs once: from single files, from a tar
archive, in threads and in processes, with the time for the 171,375 images of the public data set extrapolated from it.

With `--device cuda` the network runs there, on pictures that are there already, and loaders are compared with it by the
clock; they stay on the processor.

    python -m benchmarks.loader                       # synthetic cells
    python -m benchmarks.loader --cells CELLS         # any folder of images; they are resized to 250 pixels first
"""

from __future__ import annotations

import itertools
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks._cli import finish, new_parser, parse, provenance, threads
from benchmarks._measure import Sample, Spread, Step, interleaved, waiter
from examples.slam_ags_cytology import store as store_module
from examples.slam_ags_cytology.cells import find_cells
from examples.slam_ags_cytology.networks import Pretrained
from examples.slam_ags_cytology.store import CellStore, open_store
from examples.slam_ags_cytology.synthetic import SyntheticConfig, synthetic
from examples.slam_ags_cytology.views import PublishedViews, RandomViews, to_float
from examples.torchvision_import import import_torchvision

PACKAGES = ("torch", "torchvision", "kornia", "pillow", "numpy")
SIDE = 250  # pixels, of the public data set
FULL_SET = 171_375  # images in it
MEAN, STD = (0.6009, 0.5513, 0.7394), (0.1982, 0.2448, 0.1076)


@dataclass(frozen=True)
class Geometry:
    """A network with the size of its input."""

    encoder: str
    patch: int
    crop: int
    cells: int
    """Cells per batch."""


GEOMETRIES = {
    "ResNet-18 at 224": Geometry("resnet18", 250, 224, 8),
    "small encoder at 56": Geometry("small", 64, 56, 48),
}
OURS, OURS_PAPER, PUBLISHED = "our loader", "our loader, views of the paper", "published way"
NETWORK, NETWORK_ROWS = "network", "network, channels outermost"


# -- what is timed --------------------------------------------------------------------------------


def batches(count: int, size: int) -> Iterator[np.ndarray]:
    """Rows of random batches without end, every row once per round."""
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(count)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


def from_store(store: CellStore, geometry: Geometry, *, paper: bool) -> Step:
    """Two views of each cell of a batch, as the example makes them."""
    views: Any = (
        PublishedViews(geometry.crop, jitter=0.1, hue=0.1)
        if paper
        else RandomViews(geometry.crop, jitter=0.4, stain=0.1)
    )
    rows = batches(len(store), geometry.cells)

    def step() -> None:
        first, second = views.pair(to_float(store.images[next(rows)]), negative=False)
        assert first.shape == second.shape == (geometry.cells, 3, geometry.crop, geometry.crop)

    return step


class FilesOneByOne(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Every image opened and transformed when it is asked for, one at a time."""

    def __init__(self, paths: list[str], geometry: Geometry) -> None:
        transforms = import_torchvision().transforms
        jitter = transforms.ColorJitter(0.1, 0.1, 0.1, 0.1)
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize(geometry.patch),
                transforms.RandomCrop(geometry.crop),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([jitter], p=0.8),
                transforms.RandomApply([transforms.RandomRotation((90, 90))], p=0.8),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two views of one image."""
        image = Image.open(self.paths[index]).convert("RGB")
        return self.transform(image), self.transform(image)


def one_by_one(paths: list[str], geometry: Geometry) -> Step:
    """Two views of each cell of a batch, the published way, in this process."""
    loader = DataLoader(
        FilesOneByOne(paths, geometry), geometry.cells, shuffle=True, drop_last=True
    )
    stream = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> None:
        first, second = next(stream)
        assert first.shape == second.shape == (geometry.cells, 3, geometry.crop, geometry.crop)

    return step


def network(geometry: Geometry, device: torch.device, *, channels_last: bool) -> Step:
    """Forward and backward pass over two views of each cell of a batch."""
    torch.manual_seed(0)
    model = Pretrained(geometry.encoder, 128, 64, batch_norm=False).to(device)
    model.encoder.channels_last = channels_last
    images = torch.rand(2 * geometry.cells, 3, geometry.crop, geometry.crop).to(device)

    def step() -> None:
        model.zero_grad()
        model(images).square().mean().backward()

    return step


# -- decoding -------------------------------------------------------------------------------------


FEW = (
    256  # images (of many) whose time is subtracted, so that the start of processes does not count
)


def decoding(paths: list[str], archive: Path, folder: Path, workers: int) -> dict[str, float]:
    """Images per second of processor time, of all processes together, by what reads them and from where.

    Not of the clock: that would tell how busy the machine is with other things.
    """
    inside = [str(archive / Path(path).name) for path in paths]
    sources = {"files": paths, "tar archive": inside}
    kinds = {"one thread": (1, NEVER), "threads": (workers, NEVER), "processes": (workers, 0)}
    rates = {}
    start = min(FEW, len(paths) // 2)
    for size, (source, names), (kind, (count, least)) in itertools.product(
        (64, 250), sources.items(), kinds.items()
    ):
        before, store_module.PROCESSES_FROM = store_module.PROCESSES_FROM, least
        try:
            few, whole = (
                _seconds(names[:number], size, folder, count) for number in (start, len(names))
            )
        finally:
            store_module.PROCESSES_FROM = before
        rates[f"{source} to {size} px, {kind}"] = (len(names) - start) / (whole - few)
    return rates


NEVER = 10**9


def _seconds(names: list[str], size: int, folder: Path, workers: int) -> float:
    """Processor time to decode some images."""
    begin = _processor_time()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        open_store(names, size, out, workers)
        return _processor_time() - begin


def _processor_time() -> float:
    """Of this process, whose clock is finer than that of `os.times`, and of those it has waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def reading(paths: list[str], archive: Path) -> dict[str, float]:
    """Microseconds to read the bytes of one image, without decoding (from the memory of the system)."""
    from examples.slam_ags_cytology.sources import locate, read_bytes

    inside = [locate(str(archive / Path(path).name)) for path in paths]
    outside = [locate(path) for path in paths]
    results: dict[str, list[float]] = {"files": [], "tar archive": []}
    for _ in range(5):
        for name, places in (("files", outside), ("tar archive", inside)):
            begin = time.perf_counter()
            for place in places:
                read_bytes(place)
            results[name].append((time.perf_counter() - begin) / len(places) * 1e6)
    return {name: float(np.median(values)) for name, values in results.items()}


# -- the whole ------------------------------------------------------------------------------------


def prepare(cells: Path | None, count: int, folder: Path) -> list[str]:
    """So many JPEG files of 250 pixels, from a folder of cells or drawn."""
    if cells is None:
        cells = synthetic(
            SyntheticConfig(folder / "drawn", normal=count - 10, abnormal=10, size=SIDE)
        )
    found = [str(cells / cell.file) for cell in find_cells(cells)]
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]
    target = folder / "files"
    target.mkdir()
    paths = []
    for number, path in enumerate(chosen):
        with Image.open(path) as image:
            scaled = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        paths.append(str(target / f"{number:05d}.jpg"))
        # About 35 kB from real cells, where files of the public data set have 40: decoding time goes with the bytes.
        scaled.save(paths[-1], quality=99, subsampling=0)
    return paths


def pack(paths: list[str], archive: Path) -> Path:
    """A tar archive of the files."""
    with tarfile.open(archive, "w") as content:
        for path in paths:
            content.add(path, Path(path).name)
    return archive


def measure(
    geometry: Geometry,
    paths: list[str],
    folder: Path,
    rounds: int,
    block_seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    """Images per second of each arm, and the ratio of each loader to the network, by rounds."""
    store = open_store(paths, geometry.patch, folder)
    makers: dict[str, Callable[[], Step]] = {
        OURS: lambda: from_store(store, geometry, paper=False),
        OURS_PAPER: lambda: from_store(store, geometry, paper=True),
        PUBLISHED: lambda: one_by_one(paths, geometry),
        NETWORK: lambda: network(geometry, device, channels_last=True),
        NETWORK_ROWS: lambda: network(geometry, device, channels_last=False),
    }
    samples = interleaved(
        {name: make() for name, make in makers.items()},
        rounds=rounds,
        block_seconds=block_seconds,
        warmup=1,
        synchronise=waiter(device),
    )
    images = 2 * geometry.cells

    def seconds(sample: Sample) -> float:
        return sample.wall if device.type == "cuda" else sample.cpu

    result: dict[str, Any] = {}
    for name, values in samples.items():
        pairs = zip(samples[NETWORK], values, strict=True)
        ratios = [seconds(own) / seconds(sample) for own, sample in pairs]
        result[name] = {
            "images_per_second": Spread.of([images / sample.wall for sample in values]).to_dict(1),
            "images_per_cpu_second": Spread.of([images / s.cpu for s in values]).to_dict(1),
            "over_network": Spread.of(ratios).to_dict(3),
        }
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """Lines of images per second of processor time, and how many networks an arm could feed."""
    lines = [f"{'':<32}{'images/s of one core':>22}{'over the network':>18}"]
    for title, arms in results.items():
        lines.append(title)
        for name, arm in arms.items():
            rate, ratio = arm["images_per_cpu_second"]["median"], arm["over_network"]["median"]
            lines.append(f"  {name:<30}{rate:>22.0f}{ratio:>18.2f}")
    return "\n".join(lines)


def answer(results: dict[str, dict[str, Any]]) -> str:
    """One sentence on both networks."""
    parts = []
    for title, arms in results.items():
        ours, published = (arms[name]["over_network"]["median"] for name in (OURS, PUBLISHED))
        parts.append(
            f"{title}: our loader makes {ours:.1f} times the images that the network takes from the same core, the "
            f"published way {published:.1f} times"
        )
    return "Answer: " + "; ".join(parts) + "."


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, store and answer."""
    parser = new_parser(__doc__)
    parser.add_argument("--cells", type=Path, help="folder of images; synthetic cells without it")
    parser.add_argument("--count", type=int, default=1000, help="cells to use")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--block-seconds", type=float, default=0.5)
    parser.add_argument(
        "--workers", type=int, default=2, help="threads, and processes, that decode"
    )
    parser.add_argument("--geometries", nargs="+", choices=GEOMETRIES, default=list(GEOMETRIES))
    options = parse(parser, arguments, count=20, rounds=1, workers=1)
    device = torch.device(options.device)
    geometries = {title: GEOMETRIES[title] for title in options.geometries}
    if options.quick:
        options.count, options.rounds, options.block_seconds, options.workers = 40, 1, 0.0, 1
        geometries = {title: replace(known, cells=2) for title, known in geometries.items()}
    with threads(), tempfile.TemporaryDirectory() as name:
        record = provenance(options, PACKAGES, __doc__)
        folder = Path(name)
        paths = prepare(options.cells, options.count, folder)
        batch = max(geometry.cells for geometry in geometries.values())
        if len(paths) < batch:
            parser.error(
                f"--count, and the images of --cells, must be at least {batch}, the cells of a batch. Got {len(paths)}."
            )
        archive = pack(paths, folder / "cells.tar")
        rates = decoding(paths, archive, folder, options.workers)
        bytes_of_one = reading(paths, archive)
        effort = (options.rounds, options.block_seconds, device)
        results = {
            title: measure(geometry, paths, folder, *effort)
            for title, geometry in geometries.items()
        }
        mean_bytes = float(np.mean([Path(path).stat().st_size for path in paths]))
    minutes = {name: round(FULL_SET / rate / 60, 1) for name, rate in rates.items()}
    for name, rate in rates.items():
        print(f"{name:<34}{rate:6.0f} images/s of a core: {minutes[name]} min. for {FULL_SET:,}")
    print(f"reading alone: {bytes_of_one}")
    print(table(results))
    result = {
        "answer": answer(results),
        **record,
        "cells": "synthetic" if options.cells is None else options.cells.name,
        "files": {"count": len(paths), "side": SIDE, "mean_bytes": round(mean_bytes)},
        "loaders": results,
        "decoding_images_per_cpu_second": {name: round(rate, 1) for name, rate in rates.items()},
        "decoding_workers": options.workers,
        "reading_microseconds": {name: round(value, 1) for name, value in bytes_of_one.items()},
        "full_set_extrapolated": {
            "images": FULL_SET,
            "minutes_of_one_core": minutes,
            "gigabytes": {str(size): round(FULL_SET * size**2 * 3 / 1e9, 1) for size in (64, 250)},
        },
    }
    return finish(options, "loader", result)


if __name__ == "__main__":
    main()
