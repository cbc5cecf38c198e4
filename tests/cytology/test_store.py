"""The store: every cell decoded once, correctly, or refused by name."""

import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image

from examples.slam_ags_cytology import store as module
from examples.slam_ags_cytology.decoding import Chunk, Decoded
from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.store import decode, open_store


def noise(seed: int, width: int = 16, height: int = 16) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def cells(tmp_path: Path) -> list[str]:
    """150 PNG files of 16 x 16 pixels (more than two tasks), in an order that is not sorted."""
    paths = [tmp_path / f"{(7 * number) % 150:03d}.png" for number in range(150)]
    for number, path in enumerate(paths):
        Image.fromarray(noise(number)).save(path)
    return [str(path) for path in paths]


@pytest.mark.parametrize("chunk", [4, 64, 1000])
def test_rows_are_the_pixels_in_order_of_first_appearance(
    cells: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    store = open_store([*cells[:3], *cells], 16, tmp_path / "out")
    assert store.paths == tuple(cells)
    assert len(store) == 150
    assert store.images.shape == (150, 16, 16, 3)
    assert store.images.dtype == np.uint8
    assert isinstance(store.images, np.memmap)
    assert store.size == 16
    for number in range(150):
        np.testing.assert_array_equal(store.images[number], noise(number))


def test_paths_are_looked_up_and_may_repeat(cells: list[str], tmp_path: Path) -> None:
    store = open_store(cells, 16, tmp_path / "out")
    assert store.row(cells[149]) == 149
    assert store.rows([cells[5], cells[0], cells[5]]).tolist() == [5, 0, 5]
    with pytest.raises(KeyError, match=r"absent.png must be among the 150 paths"):
        store.rows([cells[0], "absent.png"])


def test_store_is_small_when_pickled_and_maps_the_same_file(
    cells: list[str], tmp_path: Path
) -> None:
    store = open_store(cells, 16, tmp_path / "out")
    sent = pickle.dumps(store)
    assert len(sent) < store.images.nbytes / 4
    received = pickle.loads(sent)
    assert isinstance(received.images, np.memmap)
    assert received.paths == store.paths
    np.testing.assert_array_equal(received.images, store.images)


def test_second_call_opens_the_file_without_decoding(
    cells: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_store(cells, 16, tmp_path / "out")
    monkeypatch.setattr(module, "decode", None)
    second = open_store(cells, 16, tmp_path / "out")
    np.testing.assert_array_equal(first.images, second.images)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["cells-16.json", "cells-16.npy"]


def touch_later(path: str) -> None:
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def keep_time(path: str, other: str) -> None:
    """Other content, same modification time: the length must tell."""
    status = os.stat(path)
    Image.open(other).resize((20, 20)).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[list[str], Path], object]] = {
    "newer file": lambda cells, _: touch_later(cells[7]),
    "longer file": lambda cells, _: keep_time(cells[7], cells[8]),
    "other order": lambda cells, _: cells.reverse(),
    "fewer cells": lambda cells, _: cells.pop(),
    "damaged array": lambda _, out: os.truncate(out / "cells-16.npy", 5000),
    "lost array": lambda _, out: os.unlink(out / "cells-16.npy"),
    "array of another run": lambda _, out: np.save(
        out / "cells-16.npy", np.zeros((149, 16, 16, 3), np.uint8)
    ),
    "damaged note": lambda _, out: os.truncate(out / "cells-16.json", 20),
    "note of another kind": lambda _, out: (out / "cells-16.json").write_text("[]"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_store_is_made_again_after_any_change(cells: list[str], tmp_path: Path, case: str) -> None:
    out = tmp_path / "out"
    open_store(cells, 16, out)
    CHANGES[case](cells, out)
    store = open_store(cells, 16, out)
    assert store.paths == tuple(cells)
    for row, path in enumerate(cells):
        np.testing.assert_array_equal(store.images[row], decode(path, 16))


def interrupted_after(count: int, decode_chunk: Callable[..., Decoded]) -> Callable[..., Decoded]:
    """`decode_chunk`, until it is called once more than `count` times."""
    calls: list[int] = []

    def attempt(chunk: Chunk, *arguments: Any) -> Decoded:
        calls.append(chunk.start)
        if len(calls) > count:
            raise KeyboardInterrupt
        return decode_chunk(chunk, *arguments)

    return attempt


def test_interrupted_decoding_is_continued_and_ends_as_if_it_had_not_been(
    cells: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(module, "CHUNK", 4)
    original = module.decode_chunk
    with monkeypatch.context() as patch:
        patch.setattr(module, "decode_chunk", interrupted_after(10, original))
        with pytest.raises(KeyboardInterrupt):
            open_store(cells, 16, out, workers=1)
    assert not (out / "cells-16.npy").exists()
    again: list[int] = []

    def count(chunk: Chunk, *arguments: Any) -> Decoded:
        again.append(chunk.start)
        return original(chunk, *arguments)

    monkeypatch.setattr(module, "decode_chunk", count)
    capsys.readouterr()
    store = open_store(cells, 16, out)
    noted = int(capsys.readouterr().out.split()[2])
    assert 0 < noted <= 40
    assert noted % 4 == 0
    assert sorted(again) == [*range(noted, 150, 4)]
    for number in range(150):
        np.testing.assert_array_equal(store.images[number], noise(number))
    assert sorted(path.name for path in out.iterdir()) == ["cells-16.json", "cells-16.npy"]


KILLED = """
import os, signal, sys
from examples.slam_ags_cytology import store
original, calls = store.decode_chunk, []
def attempt(*arguments):
    calls.append(arguments)
    if len(calls) > 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
store.decode_chunk, store.CHUNK = attempt, 10
store.open_store(sys.argv[2:], 16, sys.argv[1], workers=1)
"""


def test_decoding_that_was_killed_is_continued(
    cells: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(out), *cells], check=False)
    assert ended.returncode == -signal.SIGKILL
    monkeypatch.setattr(module, "CHUNK", 10)
    store = open_store(cells, 16, out)
    assert "Continuing with" in capsys.readouterr().out
    for number in range(150):
        np.testing.assert_array_equal(store.images[number], noise(number))


@pytest.mark.parametrize("damage", ["line cut off", "shorter array", "other images"])
def test_only_what_is_surely_right_is_continued(
    cells: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, damage: str
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(module, "CHUNK", 10)
    with monkeypatch.context() as patch:
        patch.setattr(module, "decode_chunk", interrupted_after(5, module.decode_chunk))
        with pytest.raises(KeyboardInterrupt):
            open_store(cells, 16, out, workers=1)
    journal, part = out / "cells-16.journal", out / "cells-16.part"
    noted = len(journal.read_text().splitlines()) - 1
    assert noted > 1
    if damage == "line cut off":
        os.truncate(journal, journal.stat().st_size - 30)
    elif damage == "shorter array":
        os.truncate(part, part.stat().st_size - 1)
    else:
        touch_later(cells[3])
    store = open_store(cells, 16, out)
    continued = capsys.readouterr().out
    if damage == "line cut off":
        assert f"Continuing with {10 * (noted - 1)} of 150" in continued
    else:
        assert "Continuing" not in continued
    for row, path in enumerate(cells):
        np.testing.assert_array_equal(store.images[row], decode(path, 16))


def test_a_second_process_is_refused_while_one_decodes(cells: list[str], tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / "cells-16.lock").open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Only one process may decode"):
            open_store(cells, 16, tmp_path)
    assert len(open_store(cells, 16, tmp_path)) == 150


def test_processes_decode_as_threads_do(
    cells: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROCESSES_FROM", 0)
    executor = module._executor(2, 150)
    assert isinstance(executor, ProcessPoolExecutor)
    executor.shutdown()
    Path(cells[4]).write_bytes(b"damaged")
    processes = open_store(cells, 16, tmp_path / "processes", workers=2)
    monkeypatch.setattr(module, "PROCESSES_FROM", 1000)
    threads = open_store(cells, 16, tmp_path / "threads", workers=2)
    np.testing.assert_array_equal(processes.images, threads.images)
    assert processes.unreadable == threads.unreadable == (cells[4],)


def test_sizes_have_their_own_files(cells: list[str], tmp_path: Path) -> None:
    large, small = (open_store(cells, size, tmp_path / "out") for size in (16, 8))
    assert large.images.shape[1:3] == (16, 16)
    assert small.images.shape[1:3] == (8, 8)
    np.testing.assert_array_equal(open_store(cells, 16, tmp_path / "out").images, large.images)


def test_files_with_the_same_bytes_are_reported_as_copies(cells: list[str], tmp_path: Path) -> None:
    for number, copy in ((3, "a.png"), (3, "b.png"), (9, "c.png")):
        shutil.copy(cells[number], tmp_path / copy)
    a, b, c = (str(tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    expected = {(cells[3], a, b), (cells[9], c)}
    for _ in range(2):  # made, then opened
        assert set(open_store([*cells, a, b, c], 16, tmp_path / "out").copies) == expected


def test_only_a_few_tasks_are_waiting_at_a_time(
    cells: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    most: list[int] = []
    collect = module._Unfinished._collect

    def count(unfinished: Any, waiting: Any, *arguments: Any) -> Any:
        most.append(len(waiting))
        return collect(unfinished, waiting, *arguments)

    monkeypatch.setattr(module._Unfinished, "_collect", count)
    open_store(cells, 16, tmp_path / "out", workers=2)
    assert max(most) == 6


# --- refusals ----------------------------------------------------------------------------------


def truncated() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise(0, 64, 64)).save(stream, "JPEG")
    return stream.getvalue()[:1500]


def saved(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


BAD = {
    "empty": (b"", "cannot identify"),
    "text": (b"not an image", "cannot identify"),
    "truncated": (truncated(), "truncated"),
    "strip": (saved(Image.fromarray(noise(0, 64, 16))), "64 x 16 pixels is not the shape"),
    "float": (saved(Image.fromarray(np.ones((16, 16), np.float32)), "TIFF"), "no known range"),
    "12 bits in 16": (
        saved(Image.fromarray(np.full((16, 16), 4000, np.uint16))),
        "found 4000 to 4000",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_image_is_listed_with_the_reason_and_left_out(
    cells: list[str], tmp_path: Path, capsys: Any, case: str
) -> None:
    content, reason = BAD[case]
    bad = str(tmp_path / "bad.img")
    Path(bad).write_bytes(content)
    for _ in range(2):  # made, then opened
        store = open_store([*cells[:75], bad, *cells[75:]], 16, tmp_path / "out")
        assert store.unreadable == (bad,)
    listed = pd.read_csv(tmp_path / "out" / "unreadable.csv")
    assert listed["path"].tolist() == [bad]
    assert reason in listed.loc[0, "reason"]
    assert "0x" not in listed.loc[0, "reason"]  # no addresses of objects
    assert "WARNING: 1 of 151 cells cannot be read" in capsys.readouterr().out
    assert not store.images[75].any()
    np.testing.assert_array_equal(store.images[76], noise(75))
    frame = pd.DataFrame({"path": [*cells[:2], bad], "bag": ["a", "b", "b"]})
    assert store.readable(frame)["path"].tolist() == cells[:2]
    frame["bag"] = ["a", "a", "b"]
    with pytest.raises(UserError, match=r"must hold a readable cell. None is left in b; see .*csv"):
        store.readable(frame)


def test_repaired_images_are_read_and_the_list_goes(cells: list[str], tmp_path: Path) -> None:
    content = Path(cells[3]).read_bytes()
    Path(cells[3]).write_bytes(b"damaged")
    assert open_store(cells, 16, tmp_path / "out").unreadable == (cells[3],)
    Path(cells[3]).write_bytes(content)
    store = open_store(cells, 16, tmp_path / "out")
    assert store.unreadable == ()
    np.testing.assert_array_equal(store.images[3], noise(3))
    assert not (tmp_path / "out" / "unreadable.csv").exists()


def test_images_that_cannot_be_read_are_no_copies_of_each_other(
    cells: list[str], tmp_path: Path
) -> None:
    for path in cells[:3]:
        Path(path).write_bytes(b"damaged")
    store = open_store(cells, 16, tmp_path / "out")
    assert len(store.unreadable) == 3
    assert store.copies == ()


def test_a_folder_where_most_images_are_unreadable_is_refused(
    cells: list[str], tmp_path: Path
) -> None:
    for path in cells[:76]:
        Path(path).write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"Most cells must be readable images\. 76 of 150"
    ) as caught:
        open_store(cells, 16, tmp_path / "out")
    assert "and 73 more" in str(caught.value)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert not {"cells-16.npy", "cells-16.part", "cells-16.json"} & set(left)
    assert "unreadable.csv" in left


def test_missing_files_are_reported_together(cells: list[str], tmp_path: Path) -> None:
    for path in cells[:12]:
        os.unlink(path)
    with pytest.raises(UserError, match=r"12 are not: .*000.png.* and 2 more"):
        open_store(cells, 16, tmp_path / "out")


def test_workers_out_of_range_are_refused(cells: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"workers must be at least 1, or None\. Found 0"):
        open_store(cells, 16, tmp_path / "out", workers=0)


@pytest.mark.parametrize("size", [0, 7, 4097])
def test_size_out_of_range_is_refused(cells: list[str], tmp_path: Path, size: int) -> None:
    with pytest.raises(UserError, match=f"between 8 and 4096 pixels. Found {size}"):
        open_store(cells, size, tmp_path / "out")


def test_no_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one cell"):
        open_store([], 16, tmp_path / "out")


def test_full_disk_is_refused_before_decoding(
    cells: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=70_000_000))
    monkeypatch.setattr(module, "decode", None)
    with pytest.raises(UserError, match=r"0\.12 GB must be free.*Found 0\.07 GB"):
        open_store(cells, 512, tmp_path / "out")


# --- conversion of one image -------------------------------------------------------------------

RED, WHITE = (255, 0, 0), (255, 255, 255)


def rgba(alpha: int) -> Image.Image:
    return Image.new("RGBA", (8, 8), (*RED, alpha))


def palette(transparent: bool) -> bytes:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([*WHITE, *RED])
    stream = io.BytesIO()
    image.save(stream, "PNG", **({"transparency": 1} if transparent else {}))
    return stream.getvalue()


def keyed() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), RED).save(stream, "PNG", transparency=RED)
    return stream.getvalue()


GREY16 = np.full((8, 8), 257 * 90, np.uint16)

MODES: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "rgb": (saved(Image.new("RGB", (8, 8), RED)), RED),
    "opaque": (saved(rgba(255)), RED),
    "transparent": (saved(rgba(0)), WHITE),
    "half transparent": (saved(rgba(128)), (255, 127, 127)),
    "palette": (palette(False), RED),
    "transparent palette": (palette(True), WHITE),
    "transparent colour": (keyed(), WHITE),
    "grey": (saved(Image.new("L", (8, 8), 90)), (90, 90, 90)),
    "grey with alpha": (saved(Image.new("LA", (8, 8), (90, 0))), WHITE),
    "16-bit grey": (saved(Image.fromarray(GREY16)), (90, 90, 90)),
    "16-bit grey tiff": (saved(Image.fromarray(GREY16), "TIFF"), (90, 90, 90)),
    "16-bit in 32": (saved(Image.fromarray(GREY16.astype(np.int32)), "TIFF"), (90, 90, 90)),
    "black and white": (saved(Image.new("1", (8, 8), 1)), WHITE),
    "cmyk": (saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), RED),
}


@pytest.mark.parametrize("case", MODES)
def test_every_mode_becomes_rgb(case: str) -> None:
    content, colour = MODES[case]
    pixels = decode(io.BytesIO(content), 8)
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels.astype(int) - colour).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(24, 16), (16, 24)])
def test_middle_of_an_oblong_image_is_kept(width: int, height: int) -> None:
    pixels = noise(1, width, height)
    left, top = (width - 16) // 2, (height - 16) // 2
    found = decode(io.BytesIO(saved(Image.fromarray(pixels))), 16)
    np.testing.assert_array_equal(found, pixels[top : top + 16, left : left + 16])


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    found = decode(io.BytesIO(saved(Image.fromarray(stripes))), 16)
    # Picking every fourth pixel would give all black or all white. Borders see half a filter.
    assert np.abs(found[:, 2:-2].astype(int) - 127).max() <= 3


def test_jpeg_keeps_its_colours_when_resized() -> None:
    content = saved(Image.new("RGB", (250, 250), (150, 140, 190)), "JPEG")
    assert np.abs(decode(io.BytesIO(content), 64).astype(int) - (150, 140, 190)).max() <= 2
