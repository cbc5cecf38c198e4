"""Tar archives as folders: the same cells, classes and pixels as the files they were made of."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.slam_ags_cytology import sources
from examples.slam_ags_cytology.bags import BagsConfig, bags
from examples.slam_ags_cytology.cells import find_cells
from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.manifest import read_manifest
from examples.slam_ags_cytology.sources import locate, members, read_bytes, status
from examples.slam_ags_cytology.store import decode, open_store

KINDS = {"LYT": 60, "BLA": 12}


def image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Cells as files: CELLS/LYT/LYT_00001.png and so on."""
    for kind, count in KINDS.items():
        (tmp_path / "cells" / kind).mkdir(parents=True)
        for number in range(count):
            content = image(1000 * len(kind) + number + (kind == "BLA") * 500)
            (tmp_path / "cells" / kind / f"{kind}_{number:05d}.png").write_bytes(content)
    return tmp_path / "cells"


def pack(archive: Path, files: dict[str, bytes]) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w") as content:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            content.addfile(entry, io.BytesIO(data))
    return archive


def contents(tree: Path) -> dict[str, bytes]:
    paths = sorted(path for path in tree.rglob("*") if path.is_file())
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in paths}


def drawn(tmp_path: Path, name: str, cells: Path) -> Any:
    shape = {"bag_size": 5, "witness_rate": 0.2, "train_bags": 3, "val_bags": 0, "test_bags": 1}
    return read_manifest(bags(BagsConfig(tmp_path / name, cells=cells, **shape)))


def test_an_archive_of_a_tree_gives_the_bags_and_pixels_of_the_tree(
    tree: Path, tmp_path: Path
) -> None:
    archive = pack(tmp_path / "packed.tar", contents(tree))
    of_files, of_members = drawn(tmp_path, "a", tree), drawn(tmp_path, "b", archive)
    assert [os.path.relpath(path, archive) for path in of_members["path"]] == [
        os.path.relpath(path, tree) for path in of_files["path"]
    ]
    assert of_members["class_name"].tolist() == of_files["class_name"].tolist()
    stores = [open_store(frame["path"], 16, tmp_path / "out") for frame in (of_files, of_members)]
    np.testing.assert_array_equal(stores[0].images, stores[1].images)
    path = of_members["path"].iloc[0]
    np.testing.assert_array_equal(decode(path, 8), decode(of_files["path"].iloc[0], 8))


def test_shards_in_a_folder_and_files_beside_them_are_all_found(tree: Path, tmp_path: Path) -> None:
    files = list(contents(tree).items())
    root = tmp_path / "mixed"
    pack(root / "shards" / "000.tar", dict(files[:20]))
    pack(root / "001.tar", dict(files[20:40]))
    for name, data in files[40:]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    found = find_cells(root)
    assert {cell.file.rsplit(".tar/", 1)[-1]: cell.kind for cell in found} == {
        name: name.split("/")[0] for name, _ in files
    }
    assert len(found) == len(files)


def test_class_is_told_by_folder_name_or_label_file(tmp_path: Path) -> None:
    archive = pack(
        tmp_path / "a.tar",
        {
            "MON_00001.png": image(0),
            "blasts/x.png": image(1),
            "000001.png": image(2),
            "000001.cls": b"EOS\n",
            "000002.png": image(3),
            "notes.txt": b"",
            "._000003.png": b"",
        },
    )
    kinds = {cell.file: cell.kind for cell in find_cells(archive)}
    expected = {"MON_00001.png": "MON", "blasts/x.png": "blasts", "000001.png": "EOS"}
    assert kinds == expected | {"000002.png": ""}
    assert {cell.file: cell.kind for cell in find_cells(archive, "folder")} == {
        **dict.fromkeys(kinds, ""),
        "blasts/x.png": "blasts",
    }


def test_a_member_is_read_where_it_lies(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.tar", {"x/1.bin": b"first", "2.bin": b"second!"})
    assert {name: read_bytes(place) for name, place in members(archive).items()} == {
        os.path.join("x", "1.bin"): b"first",
        "2.bin": b"second!",
    }
    assert read_bytes(locate(str(archive / "2.bin"))) == b"second!"


def test_a_changed_archive_is_read_anew(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.tar", {"1.bin": b"first"})
    before = status(str(archive / "1.bin"))
    pack(archive, {"0.bin": b"0" * 2000, "1.bin": b"other"})
    os.utime(archive, ns=(0, 5))
    assert read_bytes(locate(str(archive / "1.bin"))) == b"other"
    assert status(str(archive / "1.bin")) != before


def test_members_of_an_archive_are_different_cells(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.tar", {"1.png": image(0), "2.png": image(1)})
    first, second = (status(str(archive / name)) for name in ("1.png", "2.png"))
    assert first is not None
    assert second is not None
    assert first[:2] == second[:2]
    assert first[:3] != second[:3]


def test_an_absent_member_is_a_missing_file(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.tar", {"1.png": image(0)})
    with pytest.raises(FileNotFoundError, match="no member"):
        status(str(archive / "2.png"))
    with pytest.raises(UserError, match=r"must be an existing file. 1 are not: .*2\.png"):
        open_store([str(archive / "1.png"), str(archive / "2.png")], 8, tmp_path / "out")


def test_a_folder_that_is_called_like_an_archive_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    (tmp_path / "a.tar" / "1.png").write_bytes(image(0))
    path = str(tmp_path / "a.tar" / "1.png")
    assert locate(path) == sources.Place(path)
    assert [cell.file for cell in find_cells(tmp_path)] == ["a.tar/1.png"]


@pytest.mark.parametrize("content", [b"no archive at all" * 100, b"\x1f\x8b compressed"])
def test_what_is_no_plain_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar must be a plain tar archive"):
        find_cells(tmp_path)
