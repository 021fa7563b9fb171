"""Readers of image folders: `.txt` side-cars, and `metadata.jsonl` as in Hugging Face's imagefolder.

Sub-folders train/, val/ (or validation/, valid/, dev/) and test/ give the split; otherwise it is left "".
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .annotations import check_string, clean_caption, clean_captions, numbered_lines, parse_object, read_text
from .contained import LinkCheck, check_file_name
from .dataset import Example

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "test": "test",
}
"""Name of a folder, shard or field -> split."""
METADATA_FILE = "metadata.jsonl"
_CAPTION_KEYS = ("text", "caption", "captions")


def read_sidecars(root: Path) -> Iterator[Example]:
    """Read images with a `.txt` of the same name beside them, one caption a line; the id is the path."""
    images = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    links = LinkCheck(root)
    without_caption: list[Path] = []
    for image in images:
        if captions := _sidecar_captions(image.with_suffix(".txt"), links):
            yield Example(_id_of(image, root), image, captions, None, _split_of_folder(image, root))
        else:
            without_caption.append(image)

    if len(without_caption) == len(images):
        first = images[0]
        raise ValueError(
            f"{root} has {len(images)} images and no caption; put {first.stem}.txt beside {first.name}"
        )
    if without_caption:
        warnings.warn(
            f"{root}: left out {len(without_caption)} of {len(images)} images without a .txt caption, first "
            f"{without_caption[0]}",
            stacklevel=2,
        )


def _sidecar_captions(file: Path, links: LinkCheck) -> tuple[str, ...]:
    if not file.is_file():
        return ()
    links.check(file)
    return clean_captions(read_text(file).splitlines(), str(file))


def has_metadata(root: Path) -> bool:
    return bool(_metadata_files(root))


def read_metadata(root: Path) -> Iterator[Example]:
    """Read `metadata.jsonl` in `root` or its split folders.

    Keys: file_name; text, caption or captions; optional long_text and split.
    """
    for file in _metadata_files(root):
        for where, line in numbered_lines(file):
            yield _metadata_example(line, where, file.parent, root)


def _metadata_files(root: Path) -> list[Path]:
    folders = [root] + [root / name for name in SPLIT_NAMES]
    return [folder / METADATA_FILE for folder in folders if (folder / METADATA_FILE).is_file()]


def _metadata_example(line: str, where: str, folder: Path, root: Path) -> Example:
    row = parse_object(line, where)
    captions = captions_of(row, where)
    if "file_name" not in row or not captions:
        raise ValueError(
            f"{where}: got keys {', '.join(row)}; expected file_name and text, caption or captions"
        )
    image = folder / check_file_name(row["file_name"], where)
    split = named_split(row, where) or _split_of_folder(image, root)
    return Example(_id_of(image, root), image, captions, long_text_of(row, where), split)


def captions_of(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """Return the captions in the first of the keys text, caption and captions that has any."""
    for key in _CAPTION_KEYS:
        if value := row.get(key):
            return clean_captions(value if isinstance(value, list) else [value], where)
    return ()


def named_split(row: dict[str, Any], where: str) -> str:
    """Return the split that a row names, "" if it names none."""
    name = check_string(row.get("split") or "", where)
    return SPLIT_NAMES.get(name, name)


def long_text_of(row: dict[str, Any], where: str) -> str | None:
    """Return the dense description in a row, if it has one."""
    return clean_caption(row.get("long_text") or "", where) or None


def _id_of(image: Path, root: Path) -> str:
    return image.relative_to(root).with_suffix("").as_posix()


def _split_of_folder(image: Path, root: Path) -> str:
    folders = image.relative_to(root).parts[:-1]
    return SPLIT_NAMES.get(folders[0].lower(), "") if folders else ""
