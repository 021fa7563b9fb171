"""Image tokens on disk: WebDataset shards from which generator and captioner train.

Each image is encoded once, by `tavq tokenize`.

Shapes: n images, V variants of an image (0 is the image as it is, then its mirror image, then crops), h w
    token grid.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tavq.base.arguments import from_dict

from .tar_shards import group_samples, is_regular, list_members, read_member

if TYPE_CHECKING:
    from webdataset import TarWriter

META_FILE = "meta.json"
IMAGES_PER_SHARD = 5000
MEMBERS = ("json", "npy")  # all that a sample of a token shard may hold


@dataclasses.dataclass(frozen=True)
class TokenMeta:
    """Which tokenizer made the tokens, and from what."""

    num_codes: int
    grid_size: tuple[int, int]
    codebook_hash: str
    tokenizer: str
    """Hash of the tokenizer's weights."""
    data: str
    image_size_px: int


@dataclasses.dataclass(frozen=True)
class TokenRecord:
    """One image as tokens, with its captions."""

    id: str
    split: str
    ids: np.ndarray
    """(V, h, w) integers in [0, num_codes)."""
    captions: tuple[str, ...]
    long_text: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """The tokens of one split, in memory.

    Attributes:
        names: n image ids.
        ids: (n, V, h, w) int32.
        captions: n tuples of captions.
        long_texts: n dense descriptions, None where an image has none.
    """

    meta: TokenMeta
    names: tuple[str, ...]
    ids: Tensor
    captions: tuple[tuple[str, ...], ...]
    long_texts: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.names)


def write_tokens(
    directory: Path, records: Iterable[TokenRecord], meta: TokenMeta, images_per_shard: int = IMAGES_PER_SHARD
) -> None:
    """Write `records` as shards `SPLIT-000000.tar` and `meta.json`.

    They are written to a temporary folder that takes the place of `directory` when all are there.

    Raises:
        FileExistsError: `directory` exists and is no token set.
    """
    if directory.exists() and not (directory / META_FILE).exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists and holds no token set; name another --out")
    directory.parent.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as folder:
        unfinished = Path(folder) / "tokens"
        unfinished.mkdir()
        _write_shards(unfinished, records, images_per_shard)
        (unfinished / META_FILE).write_text(json.dumps(dataclasses.asdict(meta), indent=2) + "\n")
        if directory.exists():
            shutil.rmtree(directory)
        unfinished.rename(directory)


def _write_shards(directory: Path, records: Iterable[TokenRecord], images_per_shard: int) -> None:
    """Write the records of each split in order, starting a new shard after every `images_per_shard`."""
    from webdataset import TarWriter

    counts: dict[str, int] = {}
    writers: dict[str, TarWriter] = {}
    try:
        for record in records:
            count = counts.get(record.split, 0)
            if count % images_per_shard == 0:
                if record.split in writers:
                    _close(writers[record.split])
                shard = directory / f"{record.split}-{count // images_per_shard:06d}.tar"
                # An open file, because TarWriter takes a name that starts with `pipe:` for a shell command.
                writers[record.split] = TarWriter(shard.open("wb"), mtime=0)
            writers[record.split].write(_sample(record, count))
            counts[record.split] = count + 1
    finally:
        for writer in writers.values():
            _close(writer)


def _close(writer: TarWriter) -> None:
    writer.close()
    writer.stream.close()


def _sample(record: TokenRecord, count: int) -> dict[str, object]:
    text = {"id": record.id, "captions": list(record.captions), "long_text": record.long_text}
    return {"__key__": f"{count:08d}", "json": text, "npy": record.ids.astype(np.int32)}


def read_meta(directory: Path) -> TokenMeta:
    """Read `meta.json` of a token set."""
    path = directory / META_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no token set in {directory}; make one with: tavq tokenize --data DIR --out {directory}"
        )
    return from_dict(TokenMeta, _parse_json(path.read_bytes(), str(path)), source=str(path))


def open_tokens(directory: str | Path, split: str) -> TokenSet:
    """Read the tokens of one split into memory.

    Each process reads all shards, because the training loop divides the images among the processes itself.

    Raises:
        FileNotFoundError: no token set lies there, or it has no such split.
        ValueError: a shard is damaged, or holds anything but ids and their text.
    """
    directory = Path(directory)
    meta = read_meta(directory)
    shards = sorted(directory.glob(f"{split}-*.tar"))
    if not shards:
        splits = sorted({path.name.rsplit("-", 1)[0] for path in directory.glob("*.tar")})
        raise FileNotFoundError(f"{directory} has no split {split!r}; it has {', '.join(splits)}")

    records = [record for shard in shards for record in _read_shard(shard, split, meta)]
    variants = {len(record.ids) for record in records}
    if len(variants) != 1:
        raise ValueError(
            f"{directory}: images of split {split!r} have {sorted(variants)} variants, expected one number "
            "for all; make the token set again with tavq tokenize"
        )
    return TokenSet(
        meta,
        names=tuple(record.id for record in records),
        ids=torch.from_numpy(np.stack([record.ids for record in records])),
        captions=tuple(record.captions for record in records),
        long_texts=tuple(record.long_text for record in records),
    )


def _read_shard(shard: Path, split: str, meta: TokenMeta) -> Iterator[TokenRecord]:
    all_members = list_members(shard)
    for member in all_members:
        if not is_regular(member) or not member.name.endswith(tuple(f".{kind}" for kind in MEMBERS)):
            raise ValueError(
                f"{shard} holds {member.name}, expected .json and .npy files alone; if the shard comes from "
                "somebody else, do not trust it"
            )
    for key, members in group_samples(all_members).items():
        where = f"{shard}, sample {key}"
        if set(members) != set(MEMBERS):
            raise ValueError(
                f"{where} has {' and '.join(sorted(members))}, expected json and npy; make the token set "
                "again with tavq tokenize"
            )
        text = from_dict(_Text, _parse_json(read_member(shard, members["json"]), where), source=where)
        ids = _parse_ids(read_member(shard, members["npy"]), where, meta)
        yield TokenRecord(text.id, split, ids, tuple(text.captions), text.long_text)


@dataclasses.dataclass(frozen=True)
class _Text:
    """The json of one sample."""

    id: str
    captions: list[str]
    long_text: str | None = None


def _parse_json(content: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no valid json ({error}); make the token set again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: json holds a {type(values).__name__}, expected an object")
    return values


def _parse_ids(content: bytes, where: str, meta: TokenMeta) -> np.ndarray:
    """Parse a `.npy` file of ids: (V, h, w) int32 in [0, num_codes)."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read_header(file)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{where}: no valid npy file ({error}); make the token set again") from None

    # The header is checked before the array is read, which would reserve whatever memory the header asks for.
    if dtype.kind not in "iu" or len(shape) != 3 or shape[1:] != meta.grid_size:
        raise ValueError(
            f"{where}: ids are {dtype} of shape {shape}, expected integers of shape (variants, "
            f"{meta.grid_size[0]}, {meta.grid_size[1]}); make the token set again"
        )
    if len(content) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{where}: ids are cut short, shape {shape} needs more; make the token set again")

    ids = np.load(io.BytesIO(content), allow_pickle=False)
    if not (ids.size and ids.min() >= 0 and ids.max() < meta.num_codes):
        raise ValueError(f"{where}: ids lie outside 0..{meta.num_codes - 1}; make the token set again")
    return ids.astype(np.int32)
