"""Reader of WebDataset shards with images and captions.

The name of a shard may begin with its split, as in train-000000.tar.
"""

from __future__ import annotations

import dataclasses
import io
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from .annotations import parse_object
from .dataset import Example
from .images import load_image
from .layouts_folder import IMAGE_SUFFIXES, SPLIT_NAMES, captions_of, long_text_of, named_split
from .tar_shards import group_samples, list_members, read_member, read_range


@dataclasses.dataclass(frozen=True, slots=True)
class ShardImage:
    """An image in a shard, which is read when it is called."""

    shard: Path
    name: str
    offset: int
    size: int
    """In bytes."""

    def __call__(self) -> Image.Image:
        buffer = io.BytesIO(read_range(self.shard, self.offset, self.size))
        buffer.name = f"{self.shard}: {self.name}"  # for the error, if it is no image
        return load_image(buffer)


def read_shards(shards: list[Path]) -> Iterator[Example]:
    """Read shards: `KEY.jpg` (or another image) beside `KEY.txt`, one caption a line, or `KEY.json`.

    Keys of the json: caption, captions or text; optional long_text and split. The id is the key. An image is
    read from its shard when it is asked for.
    """
    without_caption: list[str] = []
    for shard in shards:
        shard_split = SPLIT_NAMES.get(shard.stem.split("-")[0].lower(), "")
        for key, members in group_samples(list_members(shard)).items():
            image = next((m for extension, m in members.items() if f".{extension}" in IMAGE_SUFFIXES), None)
            if image is None:
                continue
            where = f"{shard}, {key}"
            row = _text_of_sample(shard, members, where)
            captions = captions_of(row, where)
            if not captions:
                without_caption.append(f"{shard.name}: {image.name}")
                continue
            # Name and place alone: tens of thousands of TarInfo objects would take much memory.
            load = ShardImage(shard, image.name, image.offset_data, image.size)
            split = named_split(row, where) or shard_split
            yield Example(key, load, captions, long_text_of(row, where), split)

    if without_caption:
        warnings.warn(
            f"left out {len(without_caption)} images without a caption, first {without_caption[0]}",
            stacklevel=2,
        )


def _text_of_sample(shard: Path, members: dict[str, tarfile.TarInfo], where: str) -> dict[str, Any]:
    if "json" in members:
        return parse_object(read_member(shard, members["json"]), where)
    if "txt" in members:
        try:
            text = read_member(shard, members["txt"]).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} has no text in UTF-8 ({error}); write the shard again") from None
        return {"captions": text.splitlines()}
    return {}
