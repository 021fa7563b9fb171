"""keep.txt: which images and captions of a dataset are used. `tavq check-data` writes, training reads it.

Each line is the id of an image; after a tab the numbers of its captions, from 0, where not all of them stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

from tavq.base.files import atomic_write

from .annotations import numbered_lines
from .dataset import ImageTextDataset


def write_keep(
    file: Path,
    dataset: ImageTextDataset,
    dropped: Collection[str],
    dropped_captions: Mapping[str, Collection[int]],
) -> None:
    """Write what stays of `dataset`, atomically.

    Args:
        file: to write.
        dataset: all splits.
        dropped: ids of images.
        dropped_captions: id -> numbers of captions; an image without any other caption goes, too.
    """
    lines = []
    for example in dataset.examples:
        gone = dropped_captions.get(example.id, ())
        kept = [number for number in range(len(example.captions)) if number not in gone]
        if example.id not in dropped and kept:
            lines.append(f"{example.id}\t{' '.join(map(str, kept))}" if gone else example.id)
    with atomic_write(file) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def keep_only(dataset: ImageTextDataset, file: Path | None) -> ImageTextDataset:
    """Return the part of `dataset` that a keep.txt names; all of it without a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file names none of the images, or a caption that an image does not have.
    """
    if file is None:
        return dataset
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; tavq check-data writes it, check --keep")
    kept: dict[str, list[int] | None] = {}
    for where, line in numbered_lines(file):
        id_, tab, numbers = line.partition("\t")
        if not all(number.isdigit() for number in numbers.split()):
            raise ValueError(f"{where} has {numbers!r:.40} after the tab, expected numbers of captions")
        kept[id_.strip()] = [int(number) for number in numbers.split()] if tab else None

    examples = []
    for example in dataset.examples:
        if example.id not in kept:
            continue
        numbers_kept = kept[example.id]
        if numbers_kept is not None:
            if max(numbers_kept, default=0) >= len(example.captions):
                raise ValueError(
                    f"{file} keeps caption {max(numbers_kept)} of {example.id}, which has "
                    f"{len(example.captions)}; write it anew with tavq check-data"
                )
            example = dataclasses.replace(
                example, captions=tuple(example.captions[number] for number in numbers_kept)
            )
        examples.append(example)
    if not examples:
        raise ValueError(
            f"{file} names none of the {len(dataset)} images of {dataset.name} (first: {dataset[0].id}); "
            "write it anew with tavq check-data"
        )
    return ImageTextDataset(dataset.name, examples)
