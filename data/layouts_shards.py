"""Reader of WebDataset shards with images and captions.

The name of a shard may begin with its split, as in train-000000.tar.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import braceexpand

from tavq.base.arrays import build_once
from tavq.base.cache import cache_directory

from .annotations import parse_object
from .dataset import Example, collect, repeated
from .layouts_folder import IMAGE_SUFFIXES, SPLIT_NAMES, captions_of, long_text_of, named_split
from .remote import RemoteFile, is_url
from .tar_shards import Shard, ShardImage, group_samples, list_members, read_member

MAX_SHARDS = 1_000_000  # that a pattern may name


def named_shards(path: str) -> list[Shard]:
    """Return the shards that `path` names by itself: one `.tar`, a pattern with braces, or a URL of these.

    `photos/train-{000..099}.tar` and `photos/{train,val}-00.tar` are patterns as a shell has them. The list
    is empty where `path` is none of these.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a URL of another scheme, or of something else than tar files.
    """
    is_remote = is_url(path)
    is_pattern = "{" in path and not Path(path).exists()
    if not is_remote and not is_pattern and not (path.endswith(".tar") and Path(path).is_file()):
        return []

    # Before it is expanded: the library makes a list of each range, however long.
    ends = re.findall(r"(-?\d+)\.\.(-?\d+)", path) if is_pattern else []
    is_long = any(abs(int(last) - int(first)) >= MAX_SHARDS for first, last in ends)
    expanded = braceexpand(path) if is_pattern and not is_long else [path]
    names = list(itertools.islice(expanded, MAX_SHARDS + 1))
    if is_long or len(names) > MAX_SHARDS:
        raise ValueError(f"{path} names more than {MAX_SHARDS:,} shards")
    if is_remote:
        if not all(name.endswith(".tar") for name in names):
            raise ValueError(f"{path} names no .tar file; a remote dataset is one or several shards")
        return [RemoteFile(name) for name in names]
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} names {len(names)} shards, no file {missing[0]}; check --data")
    return [Path(name) for name in names]


def read_shards(shards: Sequence[Shard], split: str = "") -> Iterator[Example]:
    """Read shards: `KEY.jpg` (or another image) beside `KEY.txt`, one caption a line, or `KEY.json`.

    Keys of the json: caption, captions or text; optional long_text and split. The id is the key; where
    several shards have that key, it is `SHARD/KEY`. An image is read from its shard when it is asked for.
    Where the split is not given, the name of a shard or the json says it.
    """
    without_caption: list[str] = []
    examples = collect(example for shard in shards for example in _read_shard(shard, without_caption, split))
    in_several = repeated(examples)
    for example in examples:
        if example.id in in_several and isinstance(example.image, ShardImage):
            example = dataclasses.replace(example, id=f"{example.image.shard.stem}/{example.id}")
        yield example

    if without_caption:
        warnings.warn(
            f"left out {len(without_caption)} images without a caption, first {without_caption[0]}",
            stacklevel=2,
        )


def _read_shard(shard: Shard, without_caption: list[str], split: str) -> Iterator[Example]:
    shard_split = split or SPLIT_NAMES.get(shard.stem.split("-")[0].lower(), "")
    for sample in _list_remote(shard) if isinstance(shard, RemoteFile) else _list_samples(shard):
        where = f"{shard}, {sample.key}"
        captions = captions_of(sample.text, where)
        if not captions:
            without_caption.append(f"{shard.name}: {sample.image}")
            continue
        # Name and place alone: tens of thousands of TarInfo objects would take much memory.
        load = ShardImage(shard, sample.image, sample.offset, sample.size)
        own_split = named_split(sample.text, where) or shard_split
        yield Example(sample.key, load, captions, long_text_of(sample.text, where), own_split)


class _Sample(NamedTuple):
    """An image in a shard, and what is written beside it."""

    key: str
    image: str
    offset: int
    size: int
    text: dict[str, Any]


def _list_samples(shard: Shard) -> Iterator[_Sample]:
    for key, members in group_samples(list_members(shard)).items():
        image = next((m for extension, m in members.items() if f".{extension}" in IMAGE_SUFFIXES), None)
        if image is not None:
            text = _text_of_sample(shard, members, f"{shard}, {key}")
            yield _Sample(key, image.name, image.offset_data, image.size, text)


def _list_remote(shard: RemoteFile) -> Iterator[_Sample]:
    """List a remote shard from the cache: all of it is read to find its members, which is done once."""

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(sample)}\n" for sample in _list_samples(shard))

    digest = hashlib.sha256(f"{shard.url} {shard.state()}".encode()).hexdigest()[:24]
    path = build_once(cache_directory("remote_shards") / f"{digest}.jsonl", write)
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield _Sample(*json.loads(line))


def _text_of_sample(shard: Shard, members: dict[str, tarfile.TarInfo], where: str) -> dict[str, Any]:
    if "json" in members:
        return parse_object(read_member(shard, members["json"]), where)
    if "txt" in members:
        try:
            text = read_member(shard, members["txt"]).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} has no text in UTF-8 ({error}); write the shard again") from None
        return {"captions": text.splitlines()}
    return {}
