"""Manifests: what is read, what is refused, what is written."""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.slam_ags_cytology.errors import UserError, listing
from examples.slam_ags_cytology.files import replacing
from examples.slam_ags_cytology.manifest import read_manifest, write_manifest
from examples.slam_ags_cytology.rules import check_copies

HEADER = "path,bag,label,split,instance_label,class_name"
ROWS = [
    "n0.png,n,0,train,0,LYT",
    "n1.png,n,0,train,,",
    "p0.png,p,1,train,1,BLA",
    "p1.png,p,1,train,0,LYT",
    "t0.png,t,1,test,1,BLA",
    "t1.png,t,1,test,,",
]
Edit = Callable[[list[str]], list[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the six images that ROWS name."""
    for row in ROWS:
        (tmp_path / row.split(",")[0]).write_bytes(row.encode())
    return tmp_path


def save(folder: Path, lines: list[str], encoding: str = "utf-8", end: str = "\n") -> Path:
    path = folder / "cells.csv"
    path.write_bytes((end.join(lines) + end).encode(encoding))
    return path


def swap(old: str, new: str) -> Edit:
    """Replace text that must be there, so that a case cannot silently test nothing."""

    def edit(lines: list[str]) -> list[str]:
        assert any(old in line for line in lines)
        return [line.replace(old, new) for line in lines]

    return edit


def add(*rows: str) -> Edit:
    return lambda lines: lines + list(rows)


REFUSALS: dict[str, tuple[Edit, str]] = {
    "missing column": (swap(",split,", ",extra,"), r"Missing: split.*"),
    "misspelled column": (
        swap("label,split,instance", "lable,split,instance"),
        r"Found: path, bag, lable.*Missing: label \(did you mean to rename 'lable'\?\)",
    ),
    "synonym of a column": (swap("path,bag", "file,bag"), r"did you mean to rename 'file'"),
    "column named twice": (swap("path,bag", "path,Path"), r"Found more than once: path"),
    "empty file": (lambda _: [], r"is empty"),
    "header only": (lambda lines: lines[:1], r"no rows"),
    "label not binary": (swap("n0.png,n,0", "n0.png,n,2"), r"label must be 0 or 1.*'2' \(line 2\)"),
    "label a word": (
        swap(",p,1,", ",p,positive,"),
        r"'positive' \(line 4\), 'positive' \(line 5\)",
    ),
    "label empty": (swap("n0.png,n,0", "n0.png,n,"), r"column label must be filled.*line 2"),
    "path empty": (swap("n1.png,", ","), r"column path must be filled.*line 3"),
    "instance label not binary": (
        swap("train,1,BLA", "train,-1,BLA"),
        r"instance_label must be 0, 1 or empty.*'-1' \(line 4\)",
    ),
    "unknown split": (swap("t0.png,t,1,test", "t0.png,t,1,tst"), r"Found 'tst'.*mean 'test'"),
    "validation spelled out": (
        swap(",t,1,test", ",t,1,validation"),
        r"one of train, val, test.*Did you mean 'val'",
    ),
    "bag with two labels": (swap("n1.png,n,0", "n1.png,n,1"), r"same label. Bag 'n' has 0 and 1"),
    "bag with two splits": (swap("n1.png,n,0,train", "n1.png,n,0,val"), r"'n' has train and val"),
    "bag with one cell": (
        lambda lines: lines[:-1],
        r"at least 2 cells. 1 bags hold one: 't'",
    ),
    "cell in two splits": (
        add("n0.png,u,0,test,,", "u.png,u,0,test,,"),
        r"two splits.*n0.png \(train, bag 'n'\).*n0.png \(test, bag 'u'\)",
    ),
    "cell in two splits under a link": (
        add("link.png,u,0,test,,", "u.png,u,0,test,,"),
        r"two splits.*n0.png \(train.*link.png \(test",
    ),
    "cell in two splits by another spelling": (
        add("./sub/../n0.png,u,0,test,,", "u.png,u,0,test,,"),
        r"two splits.*n0.png \(train",
    ),
    "cell twice in a bag": (add("n0.png,n,0,train,,"), r"same cell twice. Found 1, first .*n0.png"),
    "positive cell in a negative bag": (
        swap("n0.png,n,0,train,0", "n0.png,n,0,train,1"),
        r"label 0 must not hold a cell with instance_label 1.*n0.png in bag 'n'",
    ),
    "cell positive in one bag and normal in another": (
        add("p0.png,q,0,train,,", "u.png,q,0,train,,"),
        r"both normal and positive.*p0.png \(train, bag 'p'\)",
    ),
    "missing files": (
        swap(".png", ".jpg"),
        r"6 are not: .*n0.jpg, .*n1.jpg, .*p0.jpg, .*p1.jpg, .*t0.jpg and 1 more",
    ),
    "folder as a cell": (swap("n0.png", "sub"), r"existing file. 1 are not: .*sub"),
    "train without negatives": (
        lambda lines: [lines[0], *lines[3:]],
        r"train must hold bags of both labels. Found 0 with label 0 and 1 with label 1",
    ),
    "train without positives": (
        lambda lines: lines[:3] + lines[5:],
        r"Found 1 with label 0 and 0 with label 1",
    ),
    "bags that differ by case": (
        add("u.png,N,0,train,,", "v.png,N,0,train,,"),
        r"more than case. Found 'n' and 'N'",
    ),
    "bag name too long": (swap(",n,", f",{'n' * 201},"), r"at most 200"),
    "too many fields": (
        swap("n0.png,n,0,train,0,LYT", "n0.png,n,0,train,0,LYT,x"),
        r"line 2: .* 7",
    ),
    "open quote": (swap("n0.png", '"n0.png'), r"cannot be read"),
    "group divided": (
        lambda lines: [f"{line},{'group' if line == HEADER else 'g'}" for line in lines],
        r"group must not be divided.*'g' \(test and train\)",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_broken_manifest_is_refused_with_the_reason(folder: Path, case: str) -> None:
    edit, pattern = REFUSALS[case]
    (folder / "sub").mkdir()
    (folder / "u.png").write_bytes(b"u")
    (folder / "v.png").write_bytes(b"v")
    (folder / "link.png").symlink_to(folder / "n0.png")
    with pytest.raises(UserError, match=f"(?s){pattern}"):
        read_manifest(save(folder, edit([HEADER, *ROWS])))


NOT_CSV = {
    "spreadsheet": (b"PK\x03\x04rest", "is a spreadsheet"),
    "old spreadsheet": (b"\xd0\xcf\x11\xe0rest", "is a spreadsheet"),
    "utf-16": ("path,bag".encode("utf-16"), "must be encoded in UTF-8"),
    "latin-1": ("path,bag,label,split\nzellgrö.png".encode("latin-1"), "encoded in UTF-8"),
}


@pytest.mark.parametrize("case", NOT_CSV)
def test_file_that_is_not_a_csv_in_utf8_is_refused(tmp_path: Path, case: str) -> None:
    content, pattern = NOT_CSV[case]
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(UserError, match=pattern):
        read_manifest(tmp_path / "m.csv")


def test_absent_manifest_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_manifest(tmp_path / "absent.csv")
    with pytest.raises(UserError, match="It is a folder"):
        read_manifest(tmp_path)


def test_columns_have_the_promised_types_and_values(folder: Path) -> None:
    frame = read_manifest(save(folder, [HEADER, *ROWS]))
    assert list(frame.columns) == ["path", "bag", "label", "split", "instance_label", "class_name"]
    assert frame["path"].tolist() == [str(folder / row.split(",")[0]) for row in ROWS]
    assert frame["label"].dtype == "int64"
    assert frame["label"].tolist() == [0, 0, 1, 1, 1, 1]
    assert frame["instance_label"].dtype == "Int8"
    assert frame["instance_label"].fillna(-1).tolist() == [0, -1, 1, 0, 1, -1]
    assert frame["class_name"].tolist() == ["LYT", "", "BLA", "LYT", "BLA", ""]
    assert frame.index.tolist() == list(range(6))


SPELLINGS: dict[str, tuple[Edit, str, str]] = {
    "byte-order mark": (lambda lines: lines, "utf-8-sig", "\n"),
    "semicolons": (lambda lines: [line.replace(",", ";") for line in lines], "utf-8", "\n"),
    "tabs": (lambda lines: [line.replace(",", "\t") for line in lines], "utf-8", "\n"),
    "declared separator": (
        lambda lines: ["sep=;", *(line.replace(",", ";") for line in lines)],
        "utf-8-sig",
        "\r\n",
    ),
    "windows line ends": (lambda lines: lines, "utf-8", "\r\n"),
    "names with case and spaces": (swap("path,bag,label", " Path , BAG,Label "), "utf-8", "\n"),
    "spaces after commas": (lambda lines: [x.replace(",", ", ") for x in lines], "utf-8", "\n"),
    "split in capitals": (swap("train", "Train"), "utf-8", "\n"),
    "labels as decimals": (swap(",p,1,", ",p,1.0,"), "utf-8", "\n"),
    "empty rows": (lambda lines: [lines[0], "", *lines[1:], ",,,,,", ""], "utf-8", "\n"),
    "trailing separators": (lambda lines: [line + ",," for line in lines], "utf-8", "\n"),
    "trailing fields left out": (
        lambda lines: [x.removesuffix(",,") for x in lines],
        "utf-8",
        "\n",
    ),
    "unused column": (lambda lines: [line + ",stain" for line in lines], "utf-8", "\n"),
    "quoted": (lambda lines: [x.replace("n0.png", '"n0.png"') for x in lines], "utf-8", "\n"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spreadsheet_spellings_of_one_manifest_read_alike(folder: Path, case: str) -> None:
    edit, encoding, end = SPELLINGS[case]
    expected = read_manifest(save(folder, [HEADER, *ROWS]))
    found = read_manifest(save(folder, edit([HEADER, *ROWS]), encoding, end))
    pd.testing.assert_frame_equal(found, expected)


def test_optional_columns_may_be_absent(folder: Path) -> None:
    lines = [",".join(line.split(",")[:4]) for line in [HEADER, *ROWS]]
    frame = read_manifest(save(folder, lines))
    assert frame["instance_label"].isna().all()
    assert (frame["class_name"] == "").all()


def test_files_and_training_are_checked_only_on_request(tmp_path: Path) -> None:
    path = save(tmp_path, [HEADER, *ROWS[4:]])
    assert len(read_manifest(path, training=False, check_files=False)) == 2
    with pytest.raises(UserError, match="existing file"):
        read_manifest(path, training=False)
    with pytest.raises(UserError, match="both labels"):
        read_manifest(path, check_files=False)


def test_two_spellings_of_a_path_are_one_cell_even_if_files_are_not_checked(
    folder: Path,
) -> None:
    path = save(folder, [HEADER, *ROWS, "./n0.png,u,0,test,,", "sub/../n1.png,u,0,test,,"])
    with pytest.raises(UserError, match="2 cells are"):
        read_manifest(path, check_files=False)


def test_a_class_called_na_is_not_a_missing_value(folder: Path) -> None:
    frame = read_manifest(save(folder, swap("BLA", "NA")([HEADER, *ROWS])))
    assert frame["class_name"].tolist()[2] == "NA"


def test_one_cell_may_be_in_two_bags_of_one_split(folder: Path) -> None:
    rows = [*ROWS, "n0.png,m,0,train,,", "n1.png,m,0,train,,"]
    assert len(read_manifest(save(folder, [HEADER, *rows]))) == 8


def test_accession_numbers_with_slashes_are_fine_as_bag_names(folder: Path) -> None:
    frame = read_manifest(save(folder, swap(",n,", ",H24/123-4,")([HEADER, *ROWS])))
    assert frame["bag"].tolist()[0] == "H24/123-4"


def test_written_manifest_reads_back_the_same_after_moving_with_its_cells(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    for row in ROWS:
        (old / row.split(",")[0]).touch()
    outside = tmp_path / "outside.png"
    outside.touch()
    rows = [*ROWS, f"{outside},n,0,train,0,LYT"]
    frame = read_manifest(save(old, [HEADER, *rows]))
    write_manifest(frame, old / "manifest.csv")
    pd.testing.assert_frame_equal(read_manifest(old / "manifest.csv"), frame)
    old.rename(new)
    moved = read_manifest(new / "manifest.csv")
    assert moved["path"].tolist()[0] == str(new / "n0.png")
    assert moved["path"].tolist()[-1] == str(outside)


TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Z", "C")), max_size=8)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(TEXT.filter(bool), min_size=6, max_size=6), kinds=st.tuples(*[TEXT] * 6))
def test_any_names_survive_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], kinds: tuple[str, ...]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    frame = pd.DataFrame(
        {
            "path": [str(folder / f"{i}-{name.replace('/', '')}") for i, name in enumerate(names)],
            "bag": [f"a{names[0]}"] * 3 + [f"b{names[1]}"] * 3,
            "label": [0] * 3 + [1] * 3,
            "split": ["train"] * 6,
            "instance_label": pd.array([0, None, None, 1, 0, None], dtype="Int8"),
            "class_name": list(kinds),
        }
    )
    write_manifest(frame, folder / "manifest.csv")
    pd.testing.assert_frame_equal(read_manifest(folder / "manifest.csv", check_files=False), frame)


def test_file_name_that_is_not_utf8_is_refused_when_writing(tmp_path: Path) -> None:
    frame = pd.DataFrame({"path": [os.fsdecode(b"/cells/\xff.png")], "bag": ["a"]})
    with pytest.raises(UserError, match="valid UTF-8"):
        write_manifest(frame, tmp_path / "manifest.csv")
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_copies_are_refused_across_splits_and_allowed_within_one(folder: Path) -> None:
    frame = read_manifest(save(folder, [HEADER, *ROWS]))
    n0, p0, t0 = (str(folder / name) for name in ("n0.png", "p0.png", "t0.png"))
    check_copies(frame, [(n0, p0)])
    with pytest.raises(
        UserError, match=r"1 pictures are, first: .*n0.png \(train\).*t0.png \(test"
    ):
        check_copies(frame, [(n0, p0), (n0, t0)])


def test_listing_counts_what_it_does_not_show() -> None:
    assert listing(range(3)) == "0, 1, 2"
    assert listing(range(7)) == "0, 1, 2, 3, 4 and 2 more"
