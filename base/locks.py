"""One writer at a time: two runs in one folder would mix their results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .files import remove_unfinished


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keep other processes from writing `path`, a file or a folder, while the block runs.

    The system frees it when the process ends, however it ends; only then may a hidden, empty file stay. Files
    that a killed process had begun with `atomic_write` are deleted.

    Raises:
        ValueError: another process writes there.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"another process writes {path}; wait until it has ended, or name another place with --out"
        ) from None
    try:
        remove_unfinished(path)
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it notices, and makes a new one
        lock.release()
