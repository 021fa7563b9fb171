"""Files written in one piece, and hashes of files."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".part"  # end of the names of files that `atomic_write` has begun


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` when the block ends without an error.

    A killed process leaves the old file or the new one, never half of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp lets nobody but the owner read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Delete what killed processes had begun with `atomic_write`: `path`, or files in the folder `path`.

    Only for one who knows that no other process writes there.
    """
    folder, start = (path, ".") if path.is_dir() else (path.parent, f".{glob.escape(path.name)}.")
    for file in folder.glob(f"{start}*{UNFINISHED}"):
        file.unlink(missing_ok=True)


def check_directory(path: Path) -> None:
    """Raise an error if `path` cannot become, or is not, a directory to write into.

    Raises:
        NotADirectoryError: it, or a part of the way to it, is a file.
        PermissionError: it, or the folder that it would be made in, is not writable.
    """
    place = path
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is a file, and --out needs a directory; name another")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{place} cannot be written to; name another directory with --out")


def check_file(path: Path, *suffixes: str) -> None:
    """Raise an error if the file `path` cannot be written, or ends in none of `suffixes`, if there are any.

    Raises:
        IsADirectoryError, NotADirectoryError, PermissionError: something else lies in its place.
        ValueError: it has another suffix.
    """
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}, expected {' or '.join(suffixes)}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, and a file is to be written; name a file")
    check_directory(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a file's bytes."""
    return file_sha256(path)[:16]
