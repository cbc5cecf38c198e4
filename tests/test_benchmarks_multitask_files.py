"""benchmarks/multitask.py on files of MNIST, FashionMNIST and CIFAR-100: small ones, in the published formats."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from benchmarks import _cli, multitask
from benchmarks import _multitask_data as data
from benchmarks import _multitask_files as files
from examples.torchvision_import import import_torchvision

OVERLAID = {"multimnist": "MNIST", "multifashion": "FashionMNIST"}


# -- writing --------------------------------------------------------------------------------------


def pictures_of_digits():
    """1,797 real digits as MNIST has them, 28 x 28 pixels, with their classes: 1,400 to train, the others to test."""
    found = load_digits()
    images = np.kron(found.images * 15, np.ones((1, 3, 3))).astype(np.uint8)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    classes = found.target.astype(np.uint8)
    return {"train": (images[:1400], classes[:1400]), "t10k": (images[1400:], classes[1400:])}


def idx(array):
    """The format of MNIST."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(root, kind, parts, packed=()):
    """The four files; those whose names hold a word of `packed` as gzip only."""
    folder = root / kind / "raw"
    folder.mkdir(parents=True)
    for part, arrays in parts.items():
        for what, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True):
            name = f"{part}-{what}-ubyte"
            if any(word in name for word in packed):
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array), mtime=0))
            else:
                (folder / name).write_bytes(idx(array))
    return folder


def python2(value):
    """What pickle of Python 2 wrote in its protocol 2, as in the published files; texts are single bytes there."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value):
    if isinstance(value, dict):
        pairs = [_python2(part) for pair in value.items() for part in pair]
        return b"}(" + b"".join(pairs) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, bytes):
        short = len(value) < 256
        return (
            b"U" + bytes([len(value)]) if short else struct.pack("<ci", b"T", len(value))
        ) + value
    if isinstance(value, str):
        return _python2(value.encode("latin1"))
    if isinstance(value, int):
        return b"K" + bytes([value]) if value < 256 else struct.pack("<ci", b"J", value)
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    kind = (
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        + 2 * b"J\xff\xff\xff\xff"
        + b"K\x00tb"
    )
    shape = b"".join(map(_python2, map(int, value.shape))) + b"\x86"
    return made + b"(K\x01" + shape + kind + b"\x89" + _python2(value.tobytes()) + b"tb"


def parts_of_cifar(train=1600, test=400):
    """Pictures of 100 classes that can be told apart; class and superclass as they come, five to each."""
    draw = np.random.default_rng(0)
    group = draw.permutation(np.arange(100) % 20)
    looks = np.kron(draw.integers(40, 216, size=(100, 3, 16, 16)), np.ones((2, 2)))
    parts = {}
    for name, count in (("train", train), ("test", test)):
        fine = draw.permutation(np.arange(count) % 100)
        noise = draw.integers(-40, 40, size=(count, 3, 32, 32))
        parts[name] = {
            "filenames": [f"{number}.png" for number in range(count)],
            "batch_label": f"{name}ing batch 1 of 1",
            "fine_labels": fine.tolist(),
            "coarse_labels": group[fine].tolist(),
            "data": (looks[fine] + noise).astype(np.uint8).reshape(count, 3072),
        }
    return parts


def write_cifar(root, parts, dump=python2):
    """The three files."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, content in parts.items():
        (folder / name).write_bytes(dump(content))
    names = {
        f"{level}_label_names": [str(i) for i in range(n)]
        for level, n in (("fine", 100), ("coarse", 20))
    }
    (folder / "meta").write_bytes(dump(names))
    return folder


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OVERLAID.values())
@pytest.mark.parametrize("packed", [(), ("ubyte",), ("train-images", "t10k-labels")])
def test_pictures_and_classes_are_those_that_were_written(kind, packed, tmp_path):
    parts = pictures_of_digits()
    folder = write_mnist(tmp_path, kind, parts, packed)
    found = files.mnist(kind, tmp_path)
    for part, (pictures, classes) in zip((found.train, found.test), parts.values(), strict=True):
        assert part.pictures.dtype == torch.uint8
        assert np.array_equal(part.pictures, pictures)
        assert np.array_equal(part.labels, classes)
    there = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found.sums == {name: hashlib.md5(content).hexdigest() for name, content in there.items()}
    if not packed:  # torchvision wants these unpacked
        theirs = getattr(import_torchvision().datasets, kind)
        for part, train in ((found.train, True), (found.test, False)):
            known = theirs(tmp_path, train=train)
            assert torch.equal(part.pictures, known.data)
            assert torch.equal(part.labels, known.targets)


def test_an_unpacked_file_goes_before_a_packed_one(tmp_path):
    folder = write_mnist(tmp_path, "MNIST", pictures_of_digits())
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"half a download")
    assert "train-images-idx3-ubyte.gz" not in files.mnist("MNIST", tmp_path).sums


def python3(value):
    return pickle.dumps(value)


@pytest.mark.parametrize("dump", [python2, python3])
def test_pictures_and_both_classes_of_cifar_are_those_that_were_written(
    dump, tmp_path, monkeypatch
):
    parts = parts_of_cifar()
    folder = write_cifar(tmp_path, parts, dump)
    found = files.cifar100(tmp_path)
    assert found.sums == {
        name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in parts
    }
    # torchvision compares sums with those of the published files.
    module = import_torchvision().datasets.cifar
    monkeypatch.setattr(module, "check_integrity", lambda *_: True)
    for part, written in zip((found.train, found.test), parts.values(), strict=True):
        assert np.array_equal(part.pictures.flatten(1), written["data"])
        assert part.labels.T.tolist() == [written["fine_labels"], written["coarse_labels"]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of numbers for truth values
            known = module.CIFAR100(tmp_path, train=part is found.train)
        assert np.array_equal(part.pictures.permute(0, 2, 3, 1), known.data)
        assert part.labels[:, 0].tolist() == known.targets


# -- problems -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), OVERLAID.items())
def test_files_of_mnist_become_overlaid_pictures(name, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PAIRS", (400, 100, 100))
    parts = pictures_of_digits()
    write_mnist(tmp_path, kind, parts)
    problem = data.PROBLEMS[name](tmp_path)
    assert problem.train.inputs.shape == (400, 35 * 42)
    assert 0 <= problem.train.inputs.min() < problem.train.inputs.max() <= 1
    labels = torch.from_numpy(np.concatenate([classes for _, classes in parts.values()]))
    sources = {}
    for key, pool in problem.pools().items():
        assert torch.equal(pool.targets, labels[pool.sources].float())
        sources[key] = set(pool.sources.flatten().tolist())
    assert sources["test"] <= set(range(1400, 1797))
    assert sources["train"] | sources["validation"] <= set(range(1400))
    assert not sources["train"] & sources["validation"]


def test_files_of_cifar_become_one_task_for_each_superclass(tmp_path):
    parts = parts_of_cifar()
    write_cifar(tmp_path, parts)
    problem = data.cifar_superclasses(tmp_path)
    assert [task.classes for task in problem.tasks] == [5] * 20
    assert [len(pool.inputs) for pool in problem.pools().values()] == [1440, 160, 400]
    assert all(sum(w) == pytest.approx(20) for w in problem.weightings)
    keys = ("fine_labels", "coarse_labels", "data")
    fine, coarse, pixels = (np.concatenate([part[key] for part in parts.values()]) for key in keys)
    for pool in problem.pools().values():
        index = pool.sources[:, 0].numpy()
        asked = pool.targets != data.NOT_ASKED
        assert (asked.sum(1) == 1).all()
        assert np.array_equal(asked.double().argmax(1), coarse[index])
        # Within its superclass a class has the place that its number has there.
        for label, place in zip(fine[index], pool.targets[asked].tolist(), strict=True):
            alike = np.unique(fine[coarse == coarse[fine == label][0]])
            assert alike[int(place)] == label
        squares = pixels[index].reshape(-1, 3, 16, 2, 16, 2).mean((3, 5)) / 255 - 0.5
        np.testing.assert_allclose(pool.inputs, squares.reshape(len(index), -1), atol=1e-6)


# -- the whole command ----------------------------------------------------------------------------


def run(*arguments):
    """What `main` returned, and the last line that it printed."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        found = multitask.main(arguments)
    return found, printed.getvalue().splitlines()[-1]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The folder of results, in which nothing is stored yet."""
    monkeypatch.setattr(_cli, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize(("name", "kind"), OVERLAID.items())
def test_two_of_mnist_in_one_picture_are_learned_from_packed_files(
    name, kind, tmp_path, monkeypatch, results
):
    monkeypatch.setattr(data, "PAIRS", (4000, 500, 1000))
    folder = write_mnist(tmp_path, kind, pictures_of_digits(), packed=("ubyte",))
    options = ("--problems", name, "--data-root", str(tmp_path), "--seeds", "2")
    found, last = run(*options, "--methods", "AGS", "Sum", "--steps", "150", "--rates", "1e-2")
    problem = found["problems"][name]
    for tasks in (method["metrics"] for method in problem["methods"].values()):
        assert list(tasks) == ["left", "right"]
        assert all(0.3 < task["mean"] <= 1 for task in tasks.values())  # chance is 0.1
    assert last == found["answer"]
    assert last.startswith(f"Answer: {problem['title']}: delta_m (lower is better) AGS ")
    assert {*problem["files"]} == {path.name for path in folder.iterdir()}
    # Beside the stored results of the problems that need no files, not in their place.
    stored = results / f"multitask_{name}.json"
    assert json.loads(stored.read_text(encoding="utf-8")) == found
    assert {path.name for path in results.iterdir()} == {stored.name, f"multitask_{name}.svg"}


def test_superclasses_of_cifar_are_learned(tmp_path, results):
    write_cifar(tmp_path, parts_of_cifar())
    options = ("--problems", "cifar100", "--data-root", str(tmp_path), "--seeds", "2")
    found, last = run(*options, "--methods", "Sum", "--steps", "15", "--rates", "1e-2")
    problem = found["problems"]["cifar100"]
    for method in problem["methods"].values():
        assert list(method["metrics"]) == [f"superclass {number}" for number in range(20)]
        assert method["mean"]["mean"] > 0.9  # chance is 0.2
    assert {*problem["files"]} == {"train", "test"}
    assert last == found["answer"]
    assert (results / "multitask_cifar100.svg").exists()


@pytest.mark.slow
def test_a_quick_run_takes_all_problems_and_methods_together(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PAIRS", (400, 100, 100))
    for kind in OVERLAID.values():
        write_mnist(tmp_path, kind, pictures_of_digits())
    write_cifar(tmp_path, parts_of_cifar())
    out = tmp_path / "all.json"
    found, _ = run(
        *("--quick", "--problems", *data.PROBLEMS, "--data-root", str(tmp_path), "--out", str(out))
    )
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    assert list(found["problems"]) == list(data.PROBLEMS)
    with_files = [name for name, problem in found["problems"].items() if "files" in problem]
    assert with_files == [*OVERLAID, "cifar100"]
    for problem in found["problems"].values():
        assert (
            len(problem["methods"]) >= len(multitask.METHODS) - 1
        )  # TrimmedMean needs three tasks


def test_a_stored_result_is_named_after_what_is_not_taken_unasked():
    assert multitask.result_name("adam", ["digits", "overlaid"]) == "multitask"
    assert multitask.result_name("sgd", data.BUNDLED) == "multitask_sgd"
    assert multitask.result_name("adam", ["multimnist"]) == "multitask_multimnist"
    assert multitask.result_name("sgd", ["digits"]) == "multitask_sgd_digits"


# -- refusals -------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    """What the command says before it gives up."""
    with pytest.raises(SystemExit) as stopped:
        multitask.main(["--quick", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind", "folder"),
    [
        *((name, kind, f"{kind}/raw") for name, kind in OVERLAID.items()),
        ("cifar100", "CIFAR100", "cifar-100-python"),
    ],
)
def test_without_a_root_the_command_says_what_it_is(name, kind, folder, capsys):
    told = refused(capsys, "--problems", name)
    assert f"{kind} needs `--data-root ROOT`, where its files are in ROOT/{folder}. Fetch" in told
    assert f"`torchvision.datasets.{kind}(ROOT, download=True)`" in told


@pytest.mark.parametrize(
    ("name", "file", "missing"),
    [
        ("multimnist", "MNIST/raw", "train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        ("multifashion", "FashionMNIST/raw", "train-images-idx3-ubyte or train-images"),
        ("cifar100", "cifar-100-python", "train"),
    ],
)
def test_missing_files_are_named_with_what_is_there_and_the_way_to_get_them(
    name, file, missing, tmp_path, capsys
):
    arguments = ("--problems", name, "--data-root", str(tmp_path / "root"))
    (tmp_path / "other").mkdir()
    told = refused(capsys, *arguments)
    kind = OVERLAID.get(name, "CIFAR100")
    assert f"{kind} must have {missing}" in told
    assert f"in {tmp_path / 'root' / file}. Found no such folder, and in {tmp_path} other." in told
    assert f"`torchvision.datasets.{kind}('{tmp_path / 'root'}', download=True)`" in told
    (tmp_path / "root" / file).mkdir(parents=True)
    assert "Found nothing. Fetch" in refused(capsys, *arguments)
    for number in range(10):
        (tmp_path / "root" / file / f"{number}.png").touch()
    told = refused(capsys, *arguments)
    assert "Found 0.png, 1.png, 2.png, 3.png, 4.png, 5.png, 6.png, 7.png, .... Fetch" in told


def cut(content):
    return content[:-100]


ZEROS = np.zeros((20, 28, 28), np.uint8)
NOISE = np.random.default_rng(0).bytes(1000)
TWENTY = np.arange(20, dtype=np.uint8) % 10


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("train-images-idx3-ubyte", cut(idx(ZEROS)), "must have 15,696 bytes, 16 and 20 x 28 x 28. It has 15,596."),
        ("train-images-idx3-ubyte", b"<html>", "begin with 00 00 08 03. It has 6 bytes and begins with 3c 68 74 6d."),
        ("t10k-images-idx3-ubyte", b"", "It has 0 bytes and begins with none."),
        ("t10k-images-idx3-ubyte", idx(TWENTY), "in 3 dimension(s), and begin with 00 00 08 03"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "It has 6 bytes and begins with 00 00 08 03."),
        ("train-images-idx3-ubyte.gz", cut(gzip.compress(NOISE)), "must be a whole gzip"),
        ("train-images-idx3-ubyte.gz", b"<html>", "must be a whole gzip file. Reading it: Not a gzipped file"),
        ("train-images-idx3-ubyte.gz", gzip.compress(NOISE)[:10] + NOISE, "Reading it: Error -3 while"),
        ("train-labels-idx1-ubyte", idx(TWENTY[:19]), "Got 19 classes and 20 pictures."),
        ("train-labels-idx1-ubyte", idx(TWENTY + 1), "must have classes from 0 to 9. Got 10."),
        ("t10k-images-idx3-ubyte", idx(ZEROS[:, 1:]), "pictures of one size. Got (28, 28) to train, (27, 28) to test."),
    ],
)  # fmt: skip
def test_a_broken_file_of_mnist_is_named_with_what_is_wrong(file, content, told, tmp_path, capsys):
    both = {"train": (ZEROS, TWENTY), "t10k": (ZEROS, TWENTY)}
    folder = write_mnist(tmp_path, "MNIST", both)
    (folder / file.removesuffix(".gz")).unlink()
    (folder / file).write_bytes(content)
    said = refused(capsys, "--problems", "multimnist", "--data-root", str(tmp_path))
    assert told in said
    named = folder if "one size" in told else folder / file
    assert f"error: {named} must " in said
    assert f"Remove it. Fetch its files once: `torchvision.datasets.MNIST('{tmp_path}'" in said


def test_fewer_pictures_than_one_to_tune_with_are_refused(tmp_path, capsys):
    write_mnist(tmp_path, "MNIST", {"train": (ZEROS[:9], TWENTY[:9]), "t10k": (ZEROS, TWENTY)})
    said = refused(capsys, "--problems", "multimnist", "--data-root", str(tmp_path))
    assert "of 10 or more. Got 9 classes and 9 pictures." in said


class Calls:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


FEW = parts_of_cifar(200, 200)["train"]


def without(key):
    return {name: value for name, value in FEW.items() if name != key}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<html>", "must be a pickle of lists and arrays. Reading it: "),
        (b"", "must be a pickle of lists and arrays. Reading it: Ran out of input."),
        (cut(python2(FEW)), "must be a pickle of lists and arrays. Reading it: "),
        (python2([1]), "must hold data, fine_labels, coarse_labels. It holds list."),
        (
            python2(without("coarse_labels")),
            "It holds filenames, batch_label, fine_labels, data.",
        ),
        (
            python2({**FEW, "data": FEW["data"][:, :1000]}),
            "must have 3,072 bytes for each picture, of 10 or more. Got uint8 (200, 1000).",
        ),
        (python2({**FEW, "data": FEW["data"][:9]}), "Got uint8 (9, 3072)."),
        (
            python2({**FEW, "fine_labels": FEW["fine_labels"][1:]}),
            "must have fine_labels from 0 to 99 for 200 pictures. Got 199, 0 of them others.",
        ),
        (
            python2({**FEW, "coarse_labels": [100] * 200}),
            "must have coarse_labels from 0 to 19 for 200 pictures. Got 200, 200 of them others.",
        ),
        (
            python2({**FEW, "coarse_labels": FEW["coarse_labels"][::-1]}),
            "must have 100 classes, 5 in each of 20 superclasses. Got 100 classes in 20 superclasses",
        ),
    ],
)
def test_a_broken_file_of_cifar_is_named_with_what_is_wrong(content, told, tmp_path, capsys):
    folder = write_cifar(tmp_path, {"train": FEW, "test": FEW})
    (folder / "train").write_bytes(content)
    said = refused(capsys, "--problems", "cifar100", "--data-root", str(tmp_path))
    assert told in said
    assert f"error: {folder if 'each of' in told else folder / 'train'} must " in said
    assert f"Remove it. Fetch its files once: `torchvision.datasets.CIFAR100('{tmp_path}'" in said


def moved(fine, coarse):
    """Class 0 goes to another superclass."""
    return fine, np.where(fine == 0, (coarse + 1) % 20, coarse)


def merged(fine, coarse):
    """Class 0 and one of another superclass are the same."""
    other = fine[coarse != coarse[fine == 0][0]][0]
    return np.where(fine == 0, other, fine), coarse


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (moved, "100 classes in 20 superclasses, 100"),
        (merged, "99 classes in 20 superclasses, 100"),
    ],
)
def test_classes_that_are_not_five_to_a_superclass_are_refused(change, found, tmp_path, capsys):
    fine, coarse = change(*(np.array(FEW[key]) for key in ("fine_labels", "coarse_labels")))
    part = {**FEW, "fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
    write_cifar(tmp_path, {"train": part, "test": part})
    said = refused(capsys, "--problems", "cifar100", "--data-root", str(tmp_path))
    assert f"must have 100 classes, 5 in each of 20 superclasses. Got {found} pairs." in said


def test_numbers_of_python_2_become_truth_values(monkeypatch):
    """Not every numpy warns of them, so that reading a file does not show it."""
    given = []
    monkeypatch.setattr(files, "np", SimpleNamespace(dtype=lambda *found: given.extend(found)))
    files._dtype("u1", 0, 1)
    assert [repr(value) for value in given] == ["'u1'", "False", "True"]


def test_a_pickle_that_calls_something_is_not_obeyed(tmp_path, capsys):
    folder = write_cifar(tmp_path, {"train": FEW, "test": FEW})
    (folder / "test").write_bytes(pickle.dumps({**FEW, "filenames": Calls(tmp_path / "made")}))
    said = refused(capsys, "--problems", "cifar100", "--data-root", str(tmp_path))
    assert (
        f"{folder / 'test'} must be a pickle of lists and arrays. Reading it: it refers to " in said
    )
    assert "mkdir" in said
    assert not (tmp_path / "made").exists()


def test_a_pool_without_a_superclass_is_refused(tmp_path, capsys):
    """Its accuracy would be that of no picture."""
    write_cifar(tmp_path, {"train": FEW, "test": FEW})
    said = refused(capsys, "--problems", "cifar100", "--data-root", str(tmp_path))
    assert "Those in the validation pool, 20, lack one. Take the whole files." in said
