"""Bags: drawn from labelled cells, or read from a user's slides."""

import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from examples.slam_ags_cytology.bags import BagsConfig, bags
from examples.slam_ags_cytology.cells import Cell, assign_splits, class_of, find_cells
from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.manifest import SPLITS, read_manifest
from examples.slam_ags_cytology.sampling import draw_bags
from examples.slam_ags_cytology.splits import apportion, divide

ROOT = Path("cells")


def make_cells(**counts: int) -> list[Cell]:
    return [
        Cell(f"{kind}/{kind}_{number:05d}.jpg", kind)
        for kind, count in counts.items()
        for number in range(count)
    ]


def touch(root: Path, files: list[str]) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """60 LYT, 20 MON, 20 BLA, 10 ART; empty files are enough, nothing here opens an image."""
    cells = make_cells(LYT=60, MON=20, BLA=20, ART=10)
    return touch(tmp_path / "cells", [cell.file for cell in cells])


def config(tmp_path: Path, **changes: object) -> BagsConfig:
    small = BagsConfig(
        tmp_path / "out",
        cells=tmp_path / "cells",
        bag_size=5,
        witness_rate=0.2,
        train_bags=3,
        val_bags=0,
        test_bags=1,
    )
    return replace(small, **changes)  # type: ignore[arg-type]  # each case names its own field


# --- laws of drawn bags, over random recipes ---------------------------------------------------


@st.composite
def recipes(draw: st.DrawFn) -> tuple[list[Cell], BagsConfig]:
    """Cells in three roles, some in groups, and a configuration that may ask for too many."""
    cells = make_cells(
        LYT=draw(st.integers(30, 150)),
        MON=draw(st.integers(1, 40)),
        BLA=draw(st.integers(10, 60)),
        ART=draw(st.integers(10, 40)),
    )
    for _ in range(draw(st.integers(0, 5))):
        first, second = draw(st.integers(0, len(cells) - 1)), draw(st.integers(0, len(cells) - 1))
        group = cells[first].group or cells[second].group or f"g{first}"
        cells[first] = cells[first]._replace(group=group)
        cells[second] = cells[second]._replace(group=group)
    distracted = draw(st.booleans())
    return cells, BagsConfig(
        Path("out"),
        cells=ROOT,
        normal=("LYT", "MON"),
        distractors=("ART",) if distracted else (),
        distractor_rate=draw(st.floats(0.05, 0.4)) if distracted else 0.0,
        witness_rate=draw(st.floats(0.01, 0.5)),
        bag_size=draw(st.integers(2, 20)),
        train_bags=draw(st.integers(1, 4)),
        val_bags=draw(st.integers(0, 2)),
        test_bags=draw(st.integers(0, 2)),
        reuse_normals=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
        split_seed=draw(st.integers(0, 9)),
    )


def try_draw(cells: list[Cell], config: BagsConfig) -> pd.DataFrame:
    try:
        return draw_bags(assign_splits(cells, config), config)
    except UserError as error:
        assume("Too few cells" not in str(error))
        raise


laws = settings(max_examples=50, deadline=None)


@laws
@given(recipes())
def test_no_cell_and_no_group_is_in_two_splits(recipe: tuple[list[Cell], BagsConfig]) -> None:
    frame = try_draw(*recipe)
    assert frame.groupby("path")["split"].nunique().eq(1).all()
    if "group" in frame:
        assert frame[frame["group"] != ""].groupby("group")["split"].nunique().le(1).all()


@laws
@given(recipes())
def test_no_bag_holds_a_cell_twice(recipe: tuple[list[Cell], BagsConfig]) -> None:
    assert not try_draw(*recipe).duplicated(["bag", "path"]).any()


@laws
@given(recipes())
def test_every_bag_has_exactly_the_cells_asked_for(recipe: tuple[list[Cell], BagsConfig]) -> None:
    config = recipe[1]
    frame = try_draw(*recipe)
    positives = max(1, round(config.witness_rate * config.bag_size))
    distractors = round(config.distractor_rate * config.bag_size)
    for _, bag in frame.groupby("bag"):
        label = bag["label"].iloc[0]
        assert len(bag) == config.bag_size
        assert (bag["class_name"] == "BLA").sum() == label * positives
        assert bag["instance_label"].sum() == label * positives
        assert (bag["class_name"] == "ART").sum() == distractors
        assert set(bag.loc[bag["instance_label"] == 1, "class_name"]) <= {"BLA"}
    counts = frame.drop_duplicates("bag").value_counts(["split", "label"]).to_dict()
    wanted = dict(zip(SPLITS, (config.train_bags, config.val_bags, config.test_bags), strict=True))
    assert counts == {(s, label): n for s, n in wanted.items() for label in (0, 1) if n}


@laws
@given(recipes())
def test_only_normal_cells_are_reused_and_only_if_allowed(
    recipe: tuple[list[Cell], BagsConfig],
) -> None:
    frame = try_draw(*recipe)
    reused = frame[frame.duplicated("path", keep=False)]
    assert recipe[1].reuse_normals or not len(reused)
    assert set(reused["class_name"]) <= {"LYT", "MON"}


@laws
@given(recipes(), st.randoms(use_true_random=False))
def test_order_of_the_listing_does_not_matter(
    recipe: tuple[list[Cell], BagsConfig], shuffler: random.Random
) -> None:
    cells, config = recipe
    expected = try_draw(cells, config)
    shuffler.shuffle(cells)
    pd.testing.assert_frame_equal(try_draw(cells, config), expected)


@laws
@given(recipes())
def test_seed_decides_the_bags_and_split_seed_alone_the_pools(
    recipe: tuple[list[Cell], BagsConfig],
) -> None:
    cells, config = recipe
    frame = try_draw(cells, config)
    pd.testing.assert_frame_equal(try_draw(cells, config), frame)
    other = replace(config, seed=config.seed + 1, witness_rate=0.01, bag_size=2, test_bags=0)
    assert assign_splits(cells, other) == assign_splits(cells, config)


def test_other_seeds_draw_other_bags_and_pools() -> None:
    cells = make_cells(LYT=2000, BLA=200)
    config = BagsConfig(Path("out"), cells=ROOT, train_bags=2, val_bags=0, test_bags=1)
    pools = assign_splits(cells, config)
    assert not draw_bags(pools, config).equals(draw_bags(pools, replace(config, seed=1)))
    assert assign_splits(cells, replace(config, split_seed=1)) != pools


def test_position_in_a_bag_does_not_tell_the_positive_cells() -> None:
    config = BagsConfig(Path("out"), cells=ROOT, train_bags=8, val_bags=0, test_bags=0)
    frame = draw_bags(assign_splits(make_cells(LYT=4000, BLA=400), config), config)
    positions = frame.groupby("bag").cumcount()[frame["instance_label"] == 1]
    # 80 positions of mean 49.5, standard error 3.2.
    assert 35 < positions.mean() < 64


def test_normals_are_not_reused_while_there_are_enough() -> None:
    cells = make_cells(LYT=200, BLA=40)
    config = BagsConfig(Path("out"), cells=ROOT, bag_size=10, train_bags=5, val_bags=0, test_bags=1)
    pools = assign_splits(cells, config)
    strict, lax = draw_bags(pools, config), draw_bags(pools, replace(config, reuse_normals=True))
    pd.testing.assert_frame_equal(strict, lax)


def test_a_class_more_does_not_move_cells_between_splits() -> None:
    config = BagsConfig(Path("out"), cells=ROOT)
    few = assign_splits(make_cells(LYT=50), config)
    many = assign_splits(make_cells(LYT=50, BLA=50), config)
    assert set(few) < set(many)


@given(st.integers(0, 500), st.sampled_from([(0.6, 0.1, 0.3), (0.5, 0.0, 0.5), (0.8, 0.1, 0.1)]))
def test_apportioned_numbers_add_up_and_are_near_the_shares(
    total: int, shares: tuple[float, float, float]
) -> None:
    counts = apportion(total, shares)
    assert sum(counts) == total
    assert all(count == 0 for count, share in zip(counts, shares, strict=True) if share == 0)
    # A split whose share is less than one whole gets one all the same, at the cost of the largest.
    near = 1 if all(share * total >= 1 for share in shares if share) else 2
    assert all(abs(n - share * total) <= near for n, share in zip(counts, shares, strict=True))
    if total >= 3:
        assert all(count > 0 for count, share in zip(counts, shares, strict=True) if share)


def test_division_depends_on_names_not_on_order() -> None:
    names = [f"slide {number}" for number in range(30)]
    forward = divide(dict.fromkeys(names, "0"), (0.6, 0.1, 0.3), seed=3)
    backward = divide(dict.fromkeys(names[::-1], "0"), (0.6, 0.1, 0.3), seed=3)
    assert forward == backward
    assert sorted(forward.values()) == ["test"] * 9 + ["train"] * 18 + ["val"] * 3


# --- finding cells -----------------------------------------------------------------------------

CLASSES = {
    "published layout": ("BLA/0001-1000/BLA_00001.jpg", "auto", "BLA"),
    "flat class": ("ABE/ABE_00001.jpg", "auto", "ABE"),
    "only names": ("LYT_00001.png", "auto", "LYT"),
    "below another folder": ("mirror/cells/LYT/LYT_00001.png", "auto", "LYT"),
    "own names": ("normal/day 1/scan7.tif", "auto", "normal"),
    "no class": ("scan7.tif", "auto", ""),
    "lower case is not a class": ("normal/img_0001.jpg", "auto", "normal"),
    "four letters are not a class": ("normal/DSCN_0001.jpg", "auto", "normal"),
    "camera names, by folder": ("normal/IMG_0001.jpg", "folder", "normal"),
    "name alone": ("normal/scan7.jpg", "name", ""),
}


@pytest.mark.parametrize("case", CLASSES)
def test_class_comes_from_the_name_or_the_top_folder(case: str) -> None:
    file, class_from, expected = CLASSES[case]
    assert class_of(file, class_from) == expected


def test_images_are_found_at_any_depth_and_with_any_case_of_suffix(tmp_path: Path) -> None:
    images = ["A/x/y/1.JPG", "A/2.jpeg", "3.Png", "B/4.tif", "B/5.TIFF", "B/6.bmp"]
    others = ["A/notes.txt", "A/._1.jpg", ".thumbs/7.jpg", "__MACOSX/8.jpg", "manifest.csv"]
    touch(tmp_path, images + others)
    assert [cell.file for cell in find_cells(tmp_path)] == sorted(images)


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", ["1.png"])
    touch(tmp_path / "root", ["B/2.png"])
    (tmp_path / "root" / "A").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "B" / "up").symlink_to(tmp_path / "root")
    assert [cell.file for cell in find_cells(tmp_path / "root")] == ["A/1.png", "B/2.png"]


def test_listing_order_of_the_file_system_does_not_matter(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = find_cells(tree)
    walk = os.walk

    def backwards(top: Path, followlinks: bool) -> Iterator[tuple[str, list[str], list[str]]]:
        for folder, folders, names in walk(str(top), followlinks=followlinks):
            folders.reverse()
            yield folder, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    assert find_cells(tree) == expected


# --- refusals ----------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[dict[str, object], str]] = {
    "no source": ({"cells": None}, r"Found neither"),
    "no folder": ({"cells": Path("absent")}, r"absent: There is no such folder"),
    "witness rate 0": ({"witness_rate": 0.0}, r"witness_rate .* Found 0.0"),
    "witness rate in percent": ({"witness_rate": 5.0}, r"Found 5.0. For instance 0.05"),
    "witness rate not a number": ({"witness_rate": float("nan")}, r"witness_rate .* Found nan"),
    "bag of one": ({"bag_size": 1}, r"bag_size must be at least 2. Found 1"),
    "no training bags": ({"train_bags": 0}, r"train_bags must be at least 1"),
    "negative test bags": ({"test_bags": -1}, r"Found 3, 0 and -1"),
    "negative seed": ({"seed": -1}, r"seed must not be negative. Found -1"),
    "no normal class": ({"normal": ()}, r"at least one class"),
    "class with two roles": ({"normal": ("LYT", "BLA")}, r"named once.* Found more often: BLA"),
    "distractors without a rate": ({"distractors": ("ART",)}, r"given together"),
    "rate without distractors": ({"distractor_rate": 0.1}, r"given together"),
    "bag too full": (
        {"distractors": ("ART",), "distractor_rate": 0.8, "witness_rate": 0.5},
        r"must fit in a bag. Found 2 and 4 in a bag of 5",
    ),
    "shares not 1": ({"split_fractions": (0.6, 0.1, 0.1)}, r"add up to 1"),
    "no training share": ({"split_fractions": (0.0, 0.5, 0.5)}, r"training above 0"),
    "unknown class": (
        {"positive": ("XYZ",)},
        r"Not found: 'XYZ'. Classes found: ART \(10\), BLA \(20\), LYT \(60\), MON \(20\)\.$",
    ),
    "class in lower case": ({"normal": ("lyt",)}, r"Did you mean 'LYT'"),
    "classes in one word": ({"normal": ("LYT,MON",)}, r"Separate classes by spaces"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_impossible_configuration_is_refused_with_the_reason(
    tree: Path, tmp_path: Path, case: str
) -> None:
    changes, pattern = REFUSALS[case]
    with pytest.raises(UserError, match=f"(?s){pattern}"):
        bags(config(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_camera_names_that_look_like_classes_are_explained(tmp_path: Path) -> None:
    touch(tmp_path / "cells", ["normal/IMG_0001.jpg", "tumour/IMG_0002.jpg"])
    with pytest.raises(UserError, match=r"IMG \(2\).*set class_from=folder"):
        bags(config(tmp_path, normal=("normal",), positive=("tumour",)))


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "cells", ["LYT/readme.txt"])
    with pytest.raises(UserError, match="Found none below"):
        bags(config(tmp_path))


# Pools of the tree: train 36 LYT, 12 BLA, 6 ART; val 6, 2, 1; test 18, 6, 3.
# A pair of bags of 5 at 20 % needs 9 LYT and 1 BLA.
SHORTAGES: dict[str, tuple[dict[str, object], str, list[dict[str, object]]]] = {
    "normals": (
        {"train_bags": 5},
        r"bags: train needs 45 normal cells, there are 36\. ",
        [{"reuse_normals": True}, {"train_bags": 4}, {"bag_size": 4}],
    ),
    "normals of two splits": (
        {"train_bags": 5, "test_bags": 3},
        r"train needs 45 .* there are 36; test needs 27 normal cells, there are 18\. ",
        [{"reuse_normals": True}, {"train_bags": 4, "test_bags": 2}, {"bag_size": 3}],
    ),
    "positives": (
        {"witness_rate": 1.0},
        r"train needs 15 positive cells, there are 12\. ",
        [{"train_bags": 2}, {"bag_size": 4}, {"witness_rate": 0.8}],
    ),
    "distractors": (
        {"distractors": ("ART",), "distractor_rate": 0.4},
        r"train needs 12 distractors, there are 6; test needs 4 distractors, there are 3",
        [{"bag_size": 3}, {"distractor_rate": 0.2}],
    ),
    "a whole split": (
        {"val_bags": 1},
        r"val needs 9 normal cells, there are 6\. ",
        [{"reuse_normals": True}, {"bag_size": 3}],
    ),
}


@pytest.mark.parametrize("case", SHORTAGES)
def test_shortage_names_need_supply_and_changes_that_work(
    tree: Path, tmp_path: Path, case: str
) -> None:
    changes, pattern, remedies = SHORTAGES[case]
    with pytest.raises(UserError, match=pattern) as caught:
        bags(config(tmp_path, **changes))
    for number, remedy in enumerate(remedies):
        for name, value in remedy.items():
            assert f"{name}={value}" in str(caught.value)
        bags(config(tmp_path, **{**changes, **remedy, "out": tmp_path / str(number)}))
    assert str(caught.value).count("=") == sum(map(len, remedies))


def test_suggested_number_of_bags_is_the_largest_that_can_be_drawn(
    tree: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="train_bags=4"):
        bags(config(tmp_path, train_bags=9))
    with pytest.raises(UserError, match="train needs 45"):
        bags(config(tmp_path, train_bags=5))
    bags(config(tmp_path, train_bags=4))


def test_hopeless_shortage_says_that_no_single_change_helps(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No single change is enough"):
        bags(config(tmp_path, bag_size=100, train_bags=50, test_bags=50, val_bags=50))


# --- a published split -------------------------------------------------------------------------


def save_split(path: Path, tree: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(["file,class,split,group", *rows]) + "\n")
    return path


def split_rows(tree: Path) -> list[str]:
    """Odd numbers train, even numbers test, all cells of a ten in one group."""
    rows = []
    for cell in find_cells(tree):
        number = int(cell.file[-9:-4])
        split = "train" if number % 2 else "test"
        rows.append(f"{cell.file},{cell.kind},{split},{cell.kind}{number % 2}-{number // 10}")
    return rows


def test_published_split_is_followed_and_its_groups_recorded(tree: Path, tmp_path: Path) -> None:
    split = save_split(tmp_path / "split.csv", tree, split_rows(tree))
    frame = read_manifest(bags(config(tmp_path, split_csv=split)))
    odd = frame["path"].str[-9:-4].astype(int) % 2 == 1
    assert (odd == (frame["split"] == "train")).all()
    assert frame["group"].str.startswith(("LYT", "BLA")).all()


def test_class_column_of_the_split_wins_over_the_name(tree: Path, tmp_path: Path) -> None:
    rows = [row.replace(",BLA,", ",blast,") for row in split_rows(tree)]
    split = save_split(tmp_path / "split.csv", tree, rows)
    frame = read_manifest(bags(config(tmp_path, split_csv=split, positive=("blast",))))
    assert set(frame["class_name"]) == {"LYT", "blast"}


def test_groups_without_a_split_are_kept_together(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "groups.csv"
    lines = [f"{c.file},{int(c.file[-9:-4]) // 4}" for c in find_cells(tree)]
    path.write_text("\n".join(["file,group", *lines]))
    frame = read_manifest(bags(config(tmp_path, split_csv=path, train_bags=2)))
    assert frame.groupby("group")["split"].nunique().eq(1).all()
    assert frame["split"].nunique() == 2


def test_cells_missing_from_the_split_or_the_folder_are_counted_and_left_out(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*split_rows(tree)[:-3], "LYT/LYT_99999.jpg,LYT,train,"]
    split = save_split(tmp_path / "split.csv", tree, rows)
    bags(config(tmp_path, split_csv=split))
    printed = capsys.readouterr().out
    assert "107 cells are listed and present, 1 listed but absent, 3 present but not" in printed


SPLIT_REFUSALS: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "unknown split": (lambda rows: [rows[0].replace("test", "dev"), *rows[1:]], r"Found 'dev'"),
    "blank split": (lambda rows: [rows[0].replace("test", ""), *rows[1:]], r"Found ''"),
    "file twice": (lambda rows: [*rows, rows[0]], r"list a file once.*ART_00000"),
    "group divided": (
        lambda rows: [*rows[:-1], rows[-1].replace(",train,", ",test,")],
        r"group must not be divided.*'MON1-1'",
    ),
    "another folder": (lambda rows: ["x" + row for row in rows], r"None of its 110 files is there"),
}


@pytest.mark.parametrize("case", SPLIT_REFUSALS)
def test_broken_split_file_is_refused(tree: Path, tmp_path: Path, case: str) -> None:
    edit, pattern = SPLIT_REFUSALS[case]
    split = save_split(tmp_path / "split.csv", tree, edit(split_rows(tree)))
    with pytest.raises(UserError, match=f"(?s){pattern}"):
        bags(config(tmp_path, split_csv=split))


def test_split_file_needs_a_split_or_a_group(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "split.csv").write_text("file,class\nLYT/LYT_00001.jpg,LYT\n")
    with pytest.raises(UserError, match="must have a column split or group"):
        bags(config(tmp_path, split_csv=tmp_path / "split.csv"))


def test_manifest_among_the_cells_is_mentioned_but_not_used(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = bags(config(tmp_path)).read_text()
    save_split(tree / "manifest.csv", tree, split_rows(tree))
    again = bags(config(tmp_path, out=tmp_path / "again")).read_text()
    assert again == plain
    assert "manifest.csv was not used" in capsys.readouterr().out


# --- files that are written, kept, never overwritten -------------------------------------------


def test_same_configuration_keeps_the_manifest(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bags(config(tmp_path))
    before = path.stat().st_mtime_ns, path.read_bytes()
    assert bags(config(tmp_path)) == path
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    assert "kept" in capsys.readouterr().out
    assert sorted(file.name for file in path.parent.iterdir()) == ["bags.json", "manifest.csv"]


OVERWRITES: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "other seed": (lambda _: None, {"seed": 7}, r"another configuration.*seed was 0, is 7"),
    "more cells": (
        lambda tmp: (tmp / "cells/LYT/LYT_00099.jpg").touch(),
        {},
        r"made from other input",
    ),
    "edited": (
        lambda tmp: (tmp / "out/manifest.csv").write_text("mine"),
        {},
        r"was changed since",
    ),
    "no record": (
        lambda tmp: (tmp / "out/bags.json").unlink(),
        {},
        r"does not say how it was made",
    ),
    "broken record": (
        lambda tmp: (tmp / "out/bags.json").write_text("[]"),
        {},
        r"does not say how it was made",
    ),
}


@pytest.mark.parametrize("case", OVERWRITES)
def test_manifest_made_otherwise_is_never_overwritten(
    tree: Path, tmp_path: Path, case: str
) -> None:
    prepare, changes, pattern = OVERWRITES[case]
    path = bags(config(tmp_path))
    prepare(tmp_path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"(?s){pattern}.*Choose another out"):
        bags(config(tmp_path, **changes))
    assert path.read_bytes() == before


def test_unused_classes_may_change_without_harm(tree: Path, tmp_path: Path) -> None:
    before = bags(config(tmp_path)).read_bytes()
    touch(tree, ["MON/MON_77777.jpg"])
    assert (
        bags(config(tmp_path)).read_bytes() == before
    )  # kept, not refused as made from other cells


def test_run_folder_can_be_moved_with_the_cells_inside(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    touch(here / "cells", [cell.file for cell in make_cells(LYT=60, BLA=20)])
    bags(config(tmp_path, out=here, cells=here / "cells"))
    here.rename(there)
    frame = read_manifest(bags(config(tmp_path, out=there, cells=there / "cells")))
    assert frame["path"].str.startswith(str(there)).all()


def test_record_and_summary_tell_the_numbers_and_the_reuse(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bags(config(tmp_path, train_bags=6, reuse_normals=True))
    record = json.loads((path.parent / "bags.json").read_text())
    train, test = record["summary"]["train"], record["summary"]["test"]
    assert (train["negative_bags"], train["positive_bags"], train["cells"]) == (6, 6, 60)
    assert train["positive_cells"] == 6
    assert train["witness_rate"] == pytest.approx(0.2)
    assert train["bags_share_cells"] is True
    assert test["bags_share_cells"] is False
    assert record["config"]["reuse_normals"] is True
    printed = capsys.readouterr().out
    assert "train  12 bags (6 negative, 6 positive), 60 cells, witness rate 20.00%" in printed
    assert "bags share cells" in printed
    assert "Cells, not patients" in printed


def test_bags_that_hold_the_same_cells_are_counted_and_warned_of(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """18 LYT for tests: a negative bag of 18 takes them all, and so does the next; positive bags differ."""
    few = config(tmp_path, bag_size=18, test_bags=3, reuse_normals=True, witness_rate=0.1)
    summary = json.loads((bags(few).parent / "bags.json").read_text())["summary"]
    assert summary["train"]["repeated_bags"] == 0
    assert summary["test"]["repeated_bags"] == 2
    printed = capsys.readouterr().out
    assert "WARNING: 2 of its bags repeat all cells of another" in printed
    assert printed.count("WARNING") == 1


def test_rate_that_rounds_to_no_cell_still_puts_one(tree: Path, tmp_path: Path) -> None:
    path = bags(config(tmp_path, witness_rate=0.001))
    summary = json.loads((path.parent / "bags.json").read_text())["summary"]
    assert summary["train"]["witness_rate"] == pytest.approx(0.2)


def test_no_image_is_copied(tree: Path, tmp_path: Path) -> None:
    frame = read_manifest(bags(config(tmp_path)))
    assert frame["path"].str.startswith(str(tree)).all()
    assert not list((tmp_path / "out").rglob("*.jpg"))


# --- the user's own slides ---------------------------------------------------------------------


def save_slides(folder: Path, rows: list[str], header: str = "path,bag,label") -> Path:
    touch(folder, sorted({row.split(",")[0] for row in rows}))
    (folder / "slides.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "slides.csv"


def slide_rows(per_label: int = 10) -> list[str]:
    return [
        f"{label}-{slide}-{cell}.png,S{label}{slide},{label}"
        for label in (0, 1)
        for slide in range(per_label)
        for cell in range(3)
    ]


def test_slides_without_a_split_are_divided_whole_and_by_label(tmp_path: Path) -> None:
    source = save_slides(tmp_path, slide_rows())
    frame = read_manifest(bags(BagsConfig(tmp_path / "out", slides=source)))
    counts = frame.drop_duplicates("bag").value_counts(["label", "split"]).to_dict()
    parts = {"train": 6, "val": 1, "test": 3}
    assert counts == {(label, s): n for label in (0, 1) for s, n in parts.items()}
    assert frame["path"].tolist() == [str(tmp_path / row.split(",")[0]) for row in slide_rows()]


def test_split_of_slides_depends_on_split_seed_and_not_on_the_order_of_rows(
    tmp_path: Path,
) -> None:
    def splits(name: str, rows: list[str], seed: int) -> dict[str, str]:
        source = save_slides(tmp_path / name, rows)
        path = bags(BagsConfig(tmp_path / name / "out", slides=source, split_seed=seed))
        frame = read_manifest(path)
        return dict(sorted(zip(frame["bag"], frame["split"], strict=True)))

    first = splits("a", slide_rows(), 0)
    assert splits("b", slide_rows()[::-1], 0) == first
    assert splits("c", slide_rows(), 1) != first


def test_slides_of_one_patient_stay_in_one_split(tmp_path: Path) -> None:
    rows = [f"{row},patient {row[2]}" if row[0] == "1" else f"{row}," for row in slide_rows(9)]
    # Patient 1 has a negative slide too, and a slide of patient 2 is filed under patient 1 as well.
    rows = [row + "patient 1" if row.startswith("0-5-") else row for row in rows]
    rows = [row.replace("patient 2", "patient 1") if "1-2-0" in row else row for row in rows]
    for seed in range(5):
        source = save_slides(tmp_path / str(seed), rows, "path,bag,label,group")
        path = bags(BagsConfig(source.parent / "out", slides=source, split_seed=seed))
        split = dict(zip(*(read_manifest(path)[name] for name in ("bag", "split")), strict=True))
        assert split["S11"] == split["S05"] == split["S12"]


def test_given_split_of_slides_is_kept(tmp_path: Path) -> None:
    rows = [f"{row},{'test' if row[2] in '01' else 'train'}" for row in slide_rows()]
    source = save_slides(tmp_path, rows, "path,bag,label,split")
    frame = read_manifest(bags(BagsConfig(tmp_path / "out", slides=source)))
    assert set(frame.loc[frame["split"] == "test", "bag"]) == {"S00", "S01", "S10", "S11"}


def test_changed_slides_are_noticed(tmp_path: Path) -> None:
    source = save_slides(tmp_path, slide_rows())
    bags(BagsConfig(tmp_path / "out", slides=source))
    save_slides(tmp_path, slide_rows(11))
    with pytest.raises(UserError, match="other input"):
        bags(BagsConfig(tmp_path / "out", slides=source))


def save_slide_folders(folder: Path, per_label: int = 10) -> Path:
    """CELLS/S00/0.png and so on, deeper for some slides, and a table of the slides."""
    files = [
        f"S{label}{slide}/{'scan/' if slide % 2 else ''}{cell}.png"
        for label in (0, 1)
        for slide in range(per_label)
        for cell in range(3 + slide)
    ]
    touch(folder / "cells", files)
    rows = [f"S{label}{slide},{label}" for label in (0, 1) for slide in range(per_label)]
    (folder / "labels.csv").write_text("\n".join(["bag,label", *rows]) + "\n")
    return folder / "labels.csv"


def test_a_folder_per_slide_and_a_table_of_labels_make_bags_of_unknown_cells(
    tmp_path: Path,
) -> None:
    table = save_slide_folders(tmp_path)
    target = bags(BagsConfig(tmp_path / "out", cells=tmp_path / "cells", slides=table))
    frame = read_manifest(target)
    assert frame["instance_label"].isna().all()
    assert pd.read_csv(target)["instance_label"].isna().all()
    assert frame.groupby("bag").size().to_dict() == {
        f"S{label}{slide}": 3 + slide for label in (0, 1) for slide in range(10)
    }
    assert (frame["label"].astype(str) == frame["bag"].str[1]).all()
    assert all(row.bag in row.path.split(os.sep) for row in frame.itertuples())
    assert frame.groupby("bag")["split"].nunique().eq(1).all()
    numbers = json.loads((tmp_path / "out" / "bags.json").read_text())["summary"]["train"]
    assert numbers["witness_rate"] is None
    assert numbers["unlabelled_cells"] == int(
        ((frame["split"] == "train") & (frame["label"] == 1)).sum()
    )


def test_a_slide_may_be_an_archive_of_cells(tmp_path: Path) -> None:
    table = save_slide_folders(tmp_path)
    with tarfile.open(tmp_path / "cells" / "S00.tar", "w") as archive:
        for cell in range(3):
            archive.add(tmp_path / "cells" / "S00" / f"{cell}.png", f"{cell}.png")
    shutil.rmtree(tmp_path / "cells" / "S00")
    table.write_text(table.read_text().replace("S00,", "S00.tar,"))
    frame = read_manifest(
        bags(BagsConfig(tmp_path / "out", cells=tmp_path / "cells", slides=table))
    )
    inside = frame.loc[frame["bag"] == "S00.tar", "path"]
    assert [Path(path).name for path in inside] == ["0.png", "1.png", "2.png"]


def test_a_new_image_in_a_folder_of_slides_is_noticed(tmp_path: Path) -> None:
    table = save_slide_folders(tmp_path)
    settings_ = BagsConfig(tmp_path / "out", cells=tmp_path / "cells", slides=table)
    bags(settings_)
    touch(tmp_path / "cells", ["S00/new.png"])
    with pytest.raises(UserError, match="other input"):
        bags(settings_)


FOLDER_REFUSALS: dict[str, tuple[Callable[[str], str], str]] = {
    "slide without a folder": (lambda text: text + "S77,1\n", r"Not there: 'S77'"),
    "slide listed twice": (lambda text: text + "S00,0\n", r"list a slide once. .*S00"),
    "wrong label": (lambda text: text.replace("S01,0", "S01,ill"), r"Found 'ill' \(line 3\)"),
    "list of images": (
        lambda text: "path,bag,label\na.png,S00,0\n",
        r"lists images \(column path\)",
    ),
}


@pytest.mark.parametrize("case", FOLDER_REFUSALS)
def test_folders_of_slides_that_cannot_be_used_are_refused(tmp_path: Path, case: str) -> None:
    change, pattern = FOLDER_REFUSALS[case]
    table = save_slide_folders(tmp_path)
    table.write_text(change(table.read_text()))
    with pytest.raises(UserError, match=f"(?s){pattern}"):
        bags(BagsConfig(tmp_path / "out", cells=tmp_path / "cells", slides=table))


def test_folders_without_a_label_are_named_and_not_used(tmp_path: Path, capsys: object) -> None:
    table = save_slide_folders(tmp_path)
    touch(tmp_path / "cells", ["other/1.png"])
    frame = read_manifest(
        bags(BagsConfig(tmp_path / "out", cells=tmp_path / "cells", slides=table))
    )
    assert "1 folders are no slides" in capsys.readouterr().out  # type: ignore[attr-defined]
    assert "other" not in set(frame["bag"])


SLIDE_REFUSALS: dict[str, tuple[list[str], str, dict[str, object], str]] = {
    "too few slides": (slide_rows(2), "path,bag,label", {}, r"at least 3 slides.*Found 2 of label"),
    "one label": (slide_rows()[:30], "path,bag,label", {}, r"Found 10 with label 0 and 0 with"),
    "no label column": (slide_rows(), "path,bag,diagnosis", {}, r"rename 'diagnosis'"),
    "setting without effect": (
        slide_rows(),
        "path,bag,label",
        {"witness_rate": 0.05, "bag_size": 10},
        r"witness_rate, bag_size would have no effect",
    ),
    "split in some rows": (
        [f"{row},train" for row in slide_rows()[:3]] + [f"{row}," for row in slide_rows()[3:]],
        "path,bag,label,split",
        {},
        r"column split must be filled",
    ),
    "bag with two labels": (
        [row.replace("S11", "S00") for row in slide_rows()],
        "path,bag,label",
        {},
        r"'S00' has 0 and 1",
    ),
}


@pytest.mark.parametrize("case", SLIDE_REFUSALS)
def test_slides_that_cannot_be_used_are_refused(tmp_path: Path, case: str) -> None:
    rows, header, changes, pattern = SLIDE_REFUSALS[case]
    source = save_slides(tmp_path, rows, header)
    settings_ = replace(BagsConfig(tmp_path / "out", slides=source), **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"(?s){pattern}"):
        bags(settings_)
    assert not (tmp_path / "out").exists()
