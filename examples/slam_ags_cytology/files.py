"""Files that are never seen half written, paths that can be moved, digests."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step, with the same bytes on every system."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def portable_path(path: str | Path, folder: str | Path) -> str:
    """`path` relative to `folder` (with /) if it lies inside, else absolute."""
    absolute, root = os.path.abspath(path), os.path.abspath(folder)
    inside = absolute == root or absolute.startswith(root.rstrip(os.sep) + os.sep)
    return Path(absolute).relative_to(root).as_posix() if inside else absolute


def text_digest(text: str) -> str:
    """Hexadecimal digest; file names that are not valid UTF-8 are let through here."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
