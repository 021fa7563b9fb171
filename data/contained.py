"""Files of a dataset must lie in the dataset: annotations may come from a stranger and name any path."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from .annotations import check_string

MAX_NAME_BYTES = 255  # of a file or folder, in all common file systems
FOLLOW_LINKS = "TAVQ_FOLLOW_LINKS"
"""Environment variable; 1 allows links out of a dataset."""


def check_file_name(name: Any, where: str) -> str:
    """Return `name` if it is a relative path without `..`.

    Args:
        name: file name in an annotation.
        where: the annotation, for the error.

    Raises:
        ValueError: the name would lead out of the dataset, or no file can have it.
    """
    check_string(name, where)
    path = PurePosixPath(name)
    if path.is_absolute() or Path(name).is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{where} names {name!r}, which leads out of the dataset; expected a relative path without .."
        )
    if "\0" in name or any(len(part.encode()) > MAX_NAME_BYTES for part in path.parts):
        raise ValueError(f"{where} names {name!r:.80}, which no file can be called; correct the annotation")
    return name


class LinkCheck:
    """Refuses symbolic links that lead out of a directory, unless the user says that the links are theirs.

    A snapshot in the cache of the Hugging Face hub links to the `blobs` folder beside it, which is allowed.
    Folders are resolved once each, because a dataset has many files in few folders.

    Args:
        root: the directory of the dataset; it may itself be a link.
    """

    def __init__(self, root: Path):
        self.root = root.resolve()
        self.allowed = [self.root]
        if self.root.parent.name == "snapshots":
            self.allowed.append(self.root.parent.parent / "blobs")
        self.follows_all = os.environ.get(FOLLOW_LINKS) == "1"
        self._resolved: dict[Path, Path] = {}

    def check(self, file: Path) -> None:
        """Raise ValueError if `file` lies outside, after all links on the way are followed."""
        if self.follows_all:
            return
        if file.parent not in self._resolved:
            self._resolved[file.parent] = file.parent.resolve()
        target = file.resolve() if file.is_symlink() else self._resolved[file.parent] / file.name
        if not any(target.is_relative_to(allowed) for allowed in self.allowed):
            raise ValueError(
                f"{file} leads to {target}, out of the dataset {self.root}; put the file itself there, or "
                f"set {FOLLOW_LINKS}=1 if you made the link"
            )
