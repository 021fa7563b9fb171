"""Readers of image folders: `.txt` side-cars and `metadata.jsonl` (Hugging Face imagefolder).

Sub-folders train/, val/ (or validation/, valid/, dev/) and test/ give the split; otherwise it is left "".
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .examples import Example
from .layouts_json import clean_captions

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_SPLIT_FOLDERS = {
    "train": "train", "val": "val", "validation": "val", "valid": "val", "dev": "val", "test": "test",
}  # fmt: skip
_CAPTION_KEYS = ("text", "caption", "captions")


def read_sidecars(root: Path) -> Iterator[Example]:
    """Read images with a `.txt` of the same name beside them, one caption a line; the id is the path."""
    images = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    bare = []
    for image in images:
        sidecar = image.with_suffix(".txt")
        captions = (
            clean_captions(sidecar.read_text(encoding="utf-8").splitlines()) if sidecar.is_file() else ()
        )
        if captions:
            yield Example(_id_of(image, root), image, captions, None, _split_of(image, root))
        else:
            bare.append(image)
    if len(bare) == len(images):
        raise ValueError(
            f"{root} has {len(images)} images and no caption; put {bare[0].stem}.txt beside {bare[0].name}"
        )
    if bare:
        warnings.warn(
            f"{root}: left out {len(bare)} of {len(images)} images without a .txt caption, first {bare[0]}",
            stacklevel=2,
        )


def has_metadata(root: Path) -> bool:
    return bool(_metadata_files(root))


def read_metadata(root: Path) -> Iterator[Example]:
    """Read `metadata.jsonl` in `root` or its split folders.

    Keys: file_name; text, caption or captions; optional long_text and split.
    """
    for file in _metadata_files(root):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                yield _metadata_example(line, f"{file}, line {number}", file.parent, root)


def _metadata_files(root: Path) -> list[Path]:
    folders = [root] + [root / name for name in _SPLIT_FOLDERS]
    return [folder / "metadata.jsonl" for folder in folders if (folder / "metadata.jsonl").is_file()]


def _metadata_example(line: str, where: str, folder: Path, root: Path) -> Example:
    row = _json_object(line, where)
    texts = [row[key] for key in _CAPTION_KEYS if row.get(key)]
    captions = clean_captions(texts[0] if texts and isinstance(texts[0], list) else texts[:1])
    if not isinstance(row.get("file_name"), str) or not captions:
        raise ValueError(
            f"{where}: got keys {', '.join(row)}; expected file_name and text, caption or captions"
        )
    image = folder / row["file_name"]
    split = _SPLIT_FOLDERS.get(row.get("split", ""), row.get("split")) or _split_of(image, root)
    return Example(_id_of(image, root), image, captions, row.get("long_text") or None, split)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no valid json ({error}); correct the line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} holds a {type(row).__name__}, expected an object with file_name and text")
    return row


def _id_of(image: Path, root: Path) -> str:
    return image.relative_to(root).with_suffix("").as_posix()


def _split_of(image: Path, root: Path) -> str:
    parts = image.relative_to(root).parts
    return _SPLIT_FOLDERS.get(parts[0].lower(), "") if len(parts) > 1 else ""
