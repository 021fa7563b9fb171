"""Images without captions: more examples for whatever needs none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from .dataset import Example, ImageTextDataset, collect
from .layouts_folder import IMAGE_SUFFIXES


def with_more_images(dataset: ImageTextDataset, folders: Sequence[Path]) -> ImageTextDataset:
    """The training split `dataset`, followed by all images of `folders`, which have no captions.

    Args:
        dataset: a training split.
        folders: searched recursively; other files in them are left alone.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    if not folders:
        return dataset
    more = (_uncaptioned(folder) for folder in folders)
    return ImageTextDataset(dataset.name, collect(itertools.chain(dataset.examples, *more)))


def _uncaptioned(folder: Path) -> list[Example]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; --images takes folders of image files")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no image; expected {', '.join(sorted(IMAGE_SUFFIXES))} files"
        )
    # The folder's name keeps the ids of two folders apart.
    name = folder.resolve().name
    return [
        Example(f"{name}/{file.relative_to(folder).as_posix()}", file, (), None, "train")
        for file in files
        if file.is_file()
    ]
