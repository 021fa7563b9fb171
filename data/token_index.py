"""Where each image of a token set lies in its shards, so that any of them is read without the others.

All samples are checked once, when the index is made. It is kept in the cache directory, under a name that
changes with the shards, and never beside them: their folder may be another's, or read-only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tavq.base.arguments import from_dict
from tavq.base.arrays import ArrayWriter, DiskArray, build_once, open_arrays
from tavq.base.cache import cache_directory
from tavq.base.progress import Progress

from .tar_shards import group_samples, is_regular, list_members, read_member

if TYPE_CHECKING:
    from .tokens import TokenMeta

VERSION = 1  # of the index; raised when its content or the checks change
MEMBERS = ("json", "npy")  # all that a sample of a token shard may hold
SETTLED_NS = 2 * 10**9  # a shard written this long ago is seen to have changed when it is written again
LONG_INDEX = 50  # shards from which on the progress is shown


class Place(NamedTuple):
    """One row of an index; a last row behind that of the last image holds the totals."""

    shard: int
    ids_at: int
    """Offset of the npy file in the shard, in bytes."""
    ids_size: int
    text_at: int
    """Offset of the json in the shard, in bytes."""
    text_size: int
    captions_before: int
    """Captions of all images before this one."""
    long_texts_before: int


@dataclasses.dataclass(frozen=True)
class SampleText:
    """The json of one sample."""

    id: str
    captions: list[str]
    long_text: str | None = None


def index_shards(shards: Sequence[Path], meta: TokenMeta) -> np.ndarray | DiskArray:
    """Return the index of these shards, one `Place` a row: (n + 1, 7) int64. It is made at the first call.

    Raises:
        ValueError: a shard is damaged, or holds anything but ids and their text.
    """
    started = time.time_ns()
    files = [(str(shard.resolve()), shard.stat()) for shard in shards]
    state = [(name, status.st_size, status.st_mtime_ns, status.st_ino) for name, status in files]
    if max(status.st_mtime_ns for _, status in files) > started - SETTLED_NS:
        # Written a moment ago: a further change within the clock's resolution would go unseen.
        return np.concatenate(list(_rows(shards, meta)))

    key = hashlib.sha256(f"{VERSION} {meta} {state}".encode()).hexdigest()[:24]
    path = build_once(
        cache_directory("token_index") / f"{key}.safetensors", functools.partial(_write, shards, meta)
    )
    return open_arrays(path)["rows"]


def _write(shards: Sequence[Path], meta: TokenMeta, path: Path) -> None:
    with path.open("wb") as file:
        writer = ArrayWriter(file, "rows")
        for rows in _rows(shards, meta):
            writer.append(rows)
        writer.finish()


def _rows(shards: Sequence[Path], meta: TokenMeta) -> Iterator[np.ndarray]:
    """Yield the rows of each shard, and the last row with the totals."""
    captions = long_texts = 0
    variants: set[int] = set()
    hidden = True if len(shards) < LONG_INDEX else None
    for number, shard in enumerate(Progress(shards, desc="checking shards", unit="shard", disable=hidden)):
        rows = []
        for members, text, ids in _samples(shard, meta):
            of_ids, of_text = members["npy"], members["json"]
            place = Place(
                shard=number,
                ids_at=of_ids.offset_data,
                ids_size=of_ids.size,
                text_at=of_text.offset_data,
                text_size=of_text.size,
                captions_before=captions,
                long_texts_before=long_texts,
            )
            rows.append(place)
            captions += len(text.captions)
            long_texts += bool(text.long_text)
            variants.add(len(ids))
        if len(variants) > 1:
            raise ValueError(
                f"{shard} and the shards before it have {sorted(variants)} variants, expected one number for "
                "all images; make the token set again with tavq tokenize"
            )
        yield np.array(rows, np.int64).reshape(-1, len(Place._fields))
    yield np.array([Place(0, 0, 0, 0, 0, captions, long_texts)], np.int64)


def _samples(shard: Path, meta: TokenMeta) -> Iterator[tuple[dict[str, Any], SampleText, np.ndarray]]:
    """Yield the members, the text and the ids of each sample of a shard, all checked."""
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
        text = parse_text(read_member(shard, members["json"]), where)
        yield members, text, parse_ids(read_member(shard, members["npy"]), where, meta)


def parse_text(content: bytes, where: str) -> SampleText:
    """Parse the json of a sample; `where` is the place that errors name."""
    return from_dict(SampleText, parse_json(content, where), source=where)


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Parse json that must be an object."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no valid json ({error}); make the token set again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: json holds a {type(values).__name__}, expected an object")
    return values


def parse_ids(content: bytes, where: str, meta: TokenMeta) -> np.ndarray:
    """Parse a `.npy` file of ids: (V, h, w) int32 in [0, num_codes)."""
    try:
        start, shape, fortran_order, dtype = _npy_header(content[: _header_bytes(content)])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{where}: no valid npy file ({error}); make the token set again") from None

    # The header is checked before the array is read: it may ask for any amount of memory.
    if dtype.kind not in "iu" or len(shape) != 3 or shape[1:] != meta.grid_size:
        raise ValueError(
            f"{where}: ids are {dtype} of shape {shape}, expected integers of shape (variants, "
            f"{meta.grid_size[0]}, {meta.grid_size[1]}); make the token set again"
        )
    if len(content) - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{where}: ids are cut short, shape {shape} needs more; make the token set again")

    ids = np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if fortran_order else "C")
    if not (ids.size and ids.min() >= 0 and ids.max() < meta.num_codes):
        raise ValueError(f"{where}: ids lie outside 0..{meta.num_codes - 1}; make the token set again")
    return ids.astype(np.int32)


def _header_bytes(content: bytes) -> int:
    """Length of the header of a `.npy` file; that of its text takes 2 bytes (version 1) or 4 (version 2)."""
    width = 2 if content[6:7] == b"\x01" else 4
    return 8 + width + int.from_bytes(content[8 : 8 + width], "little")


@functools.lru_cache(maxsize=8)  # all samples of a set have the same header
def _npy_header(header: bytes) -> tuple[int, tuple[int, ...], bool, np.dtype]:
    """Parse the header of a `.npy` file: its length, and shape, order and type of the array."""
    file = io.BytesIO(header)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(file)]
    shape, fortran_order, dtype = read(file)
    return file.tell(), shape, fortran_order, dtype
