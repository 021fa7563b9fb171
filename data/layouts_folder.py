"""Readers of image folders: `.txt` side-cars, `metadata.jsonl` (Hugging Face imagefolder), WebDataset shards.

Sub-folders train/, val/ (or validation/, valid/, dev/) and test/ give the split, as do the names of shards;
otherwise it is left "".
"""

from __future__ import annotations

import functools
import io
import json
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from .contained import LinkCheck, check_file_name
from .dataset import Example
from .images import load_image
from .layouts_json import clean_captions
from .tar_shards import group_samples, list_members, read_member, read_range

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_SPLIT_FOLDERS = {
    "train": "train", "val": "val", "validation": "val", "valid": "val", "dev": "val", "test": "test",
}  # fmt: skip
_CAPTION_KEYS = ("text", "caption", "captions")


def read_sidecars(root: Path) -> Iterator[Example]:
    """Read images with a `.txt` of the same name beside them, one caption a line; the id is the path."""
    images = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    links = LinkCheck(root)
    bare = []
    for image in images:
        sidecar = image.with_suffix(".txt")
        captions: tuple[str, ...] = ()
        if sidecar.is_file():
            links.check(sidecar)
            captions = clean_captions(sidecar.read_text(encoding="utf-8").splitlines())
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
    captions = _captions_of(row)
    if not isinstance(row.get("file_name"), str) or not captions:
        raise ValueError(
            f"{where}: got keys {', '.join(row)}; expected file_name and text, caption or captions"
        )
    image = folder / check_file_name(row["file_name"], where)
    split = _split_named(row) or _split_of(image, root)
    return Example(_id_of(image, root), image, captions, row.get("long_text") or None, split)


def read_shards(shards: list[Path]) -> Iterator[Example]:
    """Read WebDataset shards: `KEY.jpg` (or another image) beside `KEY.txt`, a caption a line, or `KEY.json`.

    Keys of the json: caption, captions or text; optional long_text and split. The id is the key. An image
    stays in its shard until it is asked for.
    """
    bare = []
    for shard in shards:
        for key, members in group_samples(list_members(shard)).items():
            image = next((m for kind, m in members.items() if f".{kind}" in IMAGE_SUFFIXES), None)
            if image is None:
                continue
            row = _sample_row(shard, key, members)
            if captions := _captions_of(row):
                read = functools.partial(_image_in_shard, shard, image.name, image.offset_data, image.size)
                split = _split_named(row) or _SPLIT_FOLDERS.get(shard.stem.split("-")[0].lower(), "")
                yield Example(key, read, captions, row.get("long_text") or None, split)
            else:
                bare.append(f"{shard.name}: {image.name}")
    if bare:
        warnings.warn(f"left out {len(bare)} images without a caption, first {bare[0]}", stacklevel=2)


def _sample_row(shard: Path, key: str, members: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    if "json" in members:
        member = members["json"]
        return _json_object(read_member(shard, member).decode(), f"{shard}, {key}")
    if "txt" in members:
        member = members["txt"]
        text = read_member(shard, member).decode()
        return {"captions": text.splitlines()}
    return {}


def _image_in_shard(shard: Path, name: str, offset: int, size: int) -> Image.Image:
    buffer = io.BytesIO(read_range(shard, offset, size))
    buffer.name = f"{shard}: {name}"
    return load_image(buffer)


def _captions_of(row: dict[str, Any]) -> tuple[str, ...]:
    texts = [row[key] for key in _CAPTION_KEYS if row.get(key)]
    return clean_captions(texts[0] if texts and isinstance(texts[0], list) else texts[:1])


def _split_named(row: dict[str, Any]) -> str:
    return _SPLIT_FOLDERS.get(row.get("split", ""), row.get("split")) or ""


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
