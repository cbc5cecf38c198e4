"""MNIST, FashionMNIST and CIFAR-100 from their files, in the folders where torchvision stores them.

Not by torchvision, which wants the first two unpacked, and of the third leaves out the superclasses. The files are read
as they were published, and one that is cut off or of another kind is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import pickle
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DIGITS = 10  # classes of MNIST and FashionMNIST
CLASSES, SUPERCLASSES, EACH = 100, 20, 5  # of CIFAR-100: so many classes in each superclass
FEWEST = 10  # pictures to train, of which one in ten is to tune
SHOWN = 8  # names of files in a message


class DataError(Exception):
    """Files are missing or broken; the message says what belongs where, what was found, and how to get it."""


class Part(NamedTuple):
    """N pictures of 8 bits: `(N, h, w)` with `(N,)` classes, or `(N, 3, h, w)` with `(N, 2)`, superclasses beside."""

    pictures: Tensor
    labels: Tensor


class DataSet(NamedTuple):
    """Pictures to train and to test, and the MD5 sums of the files that were read, by name."""

    train: Part
    test: Part
    sums: dict[str, str]


class Folder:
    """The files of a data set of torchvision, in the folder `name` below `root`.

    Raises:
        DataError: there is no `root`.
    """

    def __init__(self, kind: str, root: Path | None, name: str) -> None:
        place = "ROOT" if root is None else repr(str(root))
        self.fetch = f"Fetch its files once: `torchvision.datasets.{kind}({place}, download=True)`."
        if root is None:
            raise DataError(
                f"{kind} needs `--data-root ROOT`, where its files are in ROOT/{name}. {self.fetch}"
            )
        self.kind, self.path = kind, root / name
        self.sums: dict[str, str] = {}

    def read(self, names: Sequence[str]) -> tuple[str, bytes]:
        """Name and content of the first of these files that is there, unpacked where it ends in .gz.

        Raises:
            DataError: none is there, or it is damaged.
        """
        name = next((name for name in names if (self.path / name).is_file()), None)
        if name is None:
            raise DataError(
                f"{self.kind} must have {' or '.join(names)} in {self.path}. Found {self._found()}. {self.fetch}"
            )
        content = (self.path / name).read_bytes()
        self.sums[name] = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if not name.endswith(".gz"):
            return name, content
        try:
            return name, gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise self.broken(name, f"must be a whole gzip file. Reading it: {error}.") from error

    def broken(self, name: str, what: str) -> DataError:
        """An error about a file that is there; `what` says what must hold, and what was found."""
        return DataError(f"{self.path / name} {what} Remove it. {self.fetch}")

    def _found(self) -> str:
        """What is in the folder, or else in the next one above it that exists."""
        place = next(path for path in (self.path, *self.path.absolute().parents) if path.is_dir())
        names = sorted(path.name for path in place.iterdir())
        listed = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        where = "" if place == self.path else f"no such folder, and in {place} "
        return where + (listed or "nothing")


# -- MNIST and FashionMNIST -----------------------------------------------------------------------


def mnist(kind: str, root: Path | None) -> DataSet:
    """MNIST or FashionMNIST, whose files are in ROOT/KIND/raw, packed (.gz) or unpacked.

    Raises:
        DataError: a file is missing or broken.
    """
    folder = Folder(kind, root, f"{kind}/raw")
    train, test = (_mnist_part(folder, *each) for each in (("train", FEWEST), ("t10k", 1)))
    sizes = [tuple(part.pictures.shape[1:]) for part in (train, test)]
    if sizes[0] != sizes[1]:
        raise folder.broken(
            "", f"must have pictures of one size. Got {sizes[0]} to train, {sizes[1]} to test."
        )
    return DataSet(train, test, folder.sums)


def _mnist_part(folder: Folder, name: str, least: int) -> Part:
    arrays = []
    for stem, dimensions in ((f"{name}-images-idx3-ubyte", 3), (f"{name}-labels-idx1-ubyte", 1)):
        file, content = folder.read((stem, f"{stem}.gz"))
        try:
            arrays.append(torch.from_numpy(idx(content, dimensions).copy()))
        except ValueError as error:
            raise folder.broken(file, str(error)) from error
    pictures, classes = arrays
    if len(pictures) != len(classes) or len(pictures) < least:
        raise folder.broken(
            file,
            f"must have the class of each picture, of {least} or more. Got {len(classes):,} classes and "
            f"{len(pictures):,} pictures.",
        )
    if classes.max() >= DIGITS:
        raise folder.broken(file, f"must have classes from 0 to {DIGITS - 1}. Got {classes.max()}.")
    return Part(pictures, classes.long())


def idx(content: bytes, dimensions: int) -> np.ndarray:
    """Array of an idx file of bytes, the format of MNIST.

    Two zeros, an 8 for the type, the number of dimensions, each size in four bytes, the largest first; the values.

    Raises:
        ValueError: it is none, has other dimensions, or is not as long as it says.
    """
    head, begin = 4 + 4 * dimensions, bytes([0, 0, 8, dimensions])
    if content[:4] != begin or len(content) < head:
        raise ValueError(
            f"must be an idx file of bytes in {dimensions} dimension(s), and begin with {begin.hex(' ')}. "
            f"It has {len(content):,} bytes and begins with {content[:4].hex(' ') or 'none'}."
        )
    sizes = struct.unpack(f">{dimensions}I", content[4:head])
    whole = head + math.prod(sizes)
    if len(content) != whole:
        shape = " x ".join(map(str, sizes))
        raise ValueError(f"must have {whole:,} bytes, {head} and {shape}. It has {len(content):,}.")
    return np.frombuffer(content, np.uint8, offset=head).reshape(sizes)


# -- CIFAR-100 ------------------------------------------------------------------------------------


def cifar100(root: Path | None) -> DataSet:
    """CIFAR-100 in the version for Python, whose files are in ROOT/cifar-100-python.

    Raises:
        DataError: a file is missing or broken.
    """
    folder = Folder("CIFAR100", root, "cifar-100-python")
    train, test = (_cifar_part(folder, *each) for each in (("train", FEWEST), ("test", 1)))
    pairs = torch.cat([train.labels, test.labels]).unique(dim=0)
    whole = pairs[:, 0].tolist() == [*range(CLASSES)]
    if not whole or (pairs[:, 1].bincount(minlength=SUPERCLASSES) != EACH).any():
        raise folder.broken(
            "",
            f"must have {CLASSES} classes, {EACH} in each of {SUPERCLASSES} superclasses. Got "
            f"{len(pairs[:, 0].unique())} classes in {len(pairs[:, 1].unique())} superclasses, {len(pairs)} pairs.",
        )
    return DataSet(train, test, folder.sums)


def _cifar_part(folder: Folder, name: str, least: int) -> Part:
    _, content = folder.read([name])
    try:
        found = ArraysOnly(io.BytesIO(content), encoding="latin1").load()  # text of Python 2
    except Exception as error:  # bytes that are no pickle may lead to any
        raise folder.broken(
            name, f"must be a pickle of lists and arrays. Reading it: {error}."
        ) from error
    keys = ("data", "fine_labels", "coarse_labels")
    if not isinstance(found, dict) or not {*keys} <= {*found}:
        held = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise folder.broken(name, f"must hold {', '.join(keys)}. It holds {held or 'nothing'}.")
    data = np.asarray(found["data"])
    if data.dtype != np.uint8 or data.shape[1:] != (3 * 32 * 32,) or len(data) < least:
        raise folder.broken(
            name,
            f"must have 3,072 bytes for each picture, of {least} or more. Got {data.dtype} {data.shape}.",
        )
    labels = []
    for key, bound in (("fine_labels", CLASSES), ("coarse_labels", SUPERCLASSES)):
        array = np.asarray(found[key])
        others = int((~np.isin(array, range(bound))).sum())
        if array.shape != (len(data),) or others:
            raise folder.broken(
                name,
                f"must have {key} from 0 to {bound - 1} for {len(data):,} pictures. Got {array.size:,}, {others:,} "
                "of them others.",
            )
        labels.append(torch.from_numpy(array))
    return Part(torch.from_numpy(data).reshape(-1, 3, 32, 32), torch.stack(labels, 1).long())


class ArraysOnly(pickle.Unpickler):
    """Reads arrays, and what Python has literals for. Any other pickle is refused, since it may call anything."""

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle of an array refers to.

        Raises:
            pickle.UnpicklingError: it refers to something else.
        """
        known = {
            "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
            "numpy._core.multiarray._reconstruct": _RECONSTRUCT,  # written by numpy 2
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": _dtype,
        }
        try:
            return known[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None


_RECONSTRUCT = np.zeros(0).__reduce__()[0]  # its module has another name since numpy 2


def _dtype(kind: str, align: object, copy: object) -> np.dtype:
    """With truth values where Python 2 wrote numbers, of which numpy 2.4.0 to 2.4.4 warn."""
    return np.dtype(kind, bool(align), bool(copy))
