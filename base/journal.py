"""Files of JSON lines that grow as work is done: a killed process loses no line that it has written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import atomic_write

_begun: set[Path] = set()  # journals whose rows this process has read or written


def read_journal(journal: Path) -> list[dict[str, Any]]:
    """Read the rows of a journal, and cut off a last line that a killed process left half-written.

    Creates the folder of a journal that does not exist yet.
    """
    _begun.discard(journal)
    if not journal.exists():
        journal.parent.mkdir(parents=True, exist_ok=True)
        return []
    _begun.add(journal)
    # As bytes: the last line may end within a UTF-8 character.
    complete, _, broken = journal.read_bytes().rpartition(b"\n")
    if broken:
        with atomic_write(journal) as path:
            path.write_bytes(complete + b"\n" if complete else b"")
    return [json.loads(line) for line in complete.split(b"\n") if line]


def append_rows(journal: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows at the end of a journal, which exists then; they are on disk when the call returns.

    Raises:
        FileNotFoundError: this process has read or written rows of it, and it was removed since.
    """
    if journal in _begun and not journal.exists():
        raise FileNotFoundError(f"{journal} was removed meanwhile; repeat the command to begin anew")
    _begun.add(journal)
    with journal.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_row(journal: Path, row: dict[str, Any]) -> None:
    """Write one row, see `append_rows`."""
    append_rows(journal, [row])
