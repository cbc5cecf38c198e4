"""Where the bytes of an image are: a file of its own, or a member of a tar archive.

A tar archive counts as a folder: `shards/000.tar/BLA/BLA_00001.jpg` is a path like any other. Members are read by their
position, so that an archive of any length costs one pass over its headers and nothing else. Compressed archives have no
positions, and are not read.
"""

from __future__ import annotations

import os
import stat
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from .errors import UserError

__all__ = ["Place", "Status", "locate", "members", "read_bytes", "status"]

_INSIDE = ".tar" + os.sep


class Place(NamedTuple):
    """A range of bytes; cheap to send to another process."""

    file: str
    offset: int = 0
    length: int | None = None
    """None: to the end of the file."""


class Status(NamedTuple):
    """What tells whether an image is the same as before, and whether two paths are one image."""

    device: int
    inode: int
    offset: int
    changed: int
    """Time of the last change, in nanoseconds."""
    length: int


def members(archive: str | Path) -> dict[str, Place]:
    """All plain files in a tar archive by name, in the order of the archive.

    Raises:
        UserError: it is no tar archive, or is cut off.
    """
    found = os.stat(archive)
    return _members(os.path.abspath(archive), found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=256)
def _members(archive: str, changed: int, length: int) -> dict[str, Place]:
    """Cached as long as the archive stays what it is."""
    try:
        with tarfile.open(archive, "r:") as content:
            return {
                os.path.normpath(member.name): Place(archive, member.offset_data, member.size)
                for member in content
                if member.isreg()
            }
    except tarfile.TarError as error:
        raise UserError(
            f"{archive} must be a plain tar archive (compressed ones cannot be read by position). Reading it failed: "
            f"{error}."
        ) from error


def locate(path: str) -> Place:
    """Where the bytes of `path` are.

    Raises:
        FileNotFoundError: it names a member that its archive does not have.
    """
    archive, name = _divide(path)
    if archive is None:
        return Place(path)
    try:
        return members(archive)[os.path.normpath(name)]
    except KeyError:
        raise FileNotFoundError(f"{archive} has no member {name}") from None


def read_bytes(place: Place) -> bytes:
    """The bytes themselves."""
    with open(place.file, "rb") as stream:
        stream.seek(place.offset)
        return stream.read() if place.length is None else stream.read(place.length)


def status(path: str) -> Status | None:
    """The status of an image; None if `path` is no regular file, nor in an archive.

    Raises:
        OSError, ValueError: there is no such file, or there cannot be.
    """
    archive, _ = _divide(path)
    found = os.stat(path if archive is None else archive)
    if not stat.S_ISREG(found.st_mode):
        return None
    place = Place(path) if archive is None else locate(path)
    length = found.st_size if place.length is None else place.length
    return Status(found.st_dev, found.st_ino, place.offset, found.st_mtime_ns, length)


def _divide(path: str) -> tuple[str | None, str]:
    """Archive and name inside it; no archive for an ordinary path (a folder may be called x.tar, too)."""
    head, inside, tail = path.partition(_INSIDE)
    if not inside or os.path.isdir(head + ".tar"):
        return None, path
    return head + ".tar", tail
