"""Images in the rows of parquet files, as the `datasets` library writes them, read by their number.

A parquet file is compressed in groups of rows, so a single row cannot be fetched. The images of a group are
fetched together when the first of them is asked for, and stay in the cache directory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tavq.base.arrays import Ragged, build_once, open_ragged, write_ragged
from tavq.base.cache import cache_directory

from .images import UnreadableImageError, load_image
from .remote import RemoteFile

ROWS_AT_ONCE = 16
FETCHED_BYTES = 2**22  # of a large group, with one request
OPEN_GROUPS = 32  # of a process


@dataclasses.dataclass(frozen=True)
class ImageColumn:
    """The column of a parquet file that holds images.

    Attributes:
        file: the parquet file.
        name: of the column, whose values are bytes, or bytes and a path, as `datasets.Image` stores them.
    """

    file: Path | RemoteFile
    name: str

    def read(self, group: int, row: int) -> bytes:
        """Read the bytes of the image in a row of a group; b"" where there is none."""
        return _open(_unpacked(self, group))[row].tobytes()


@dataclasses.dataclass(frozen=True, slots=True)
class ParquetImage:
    """An image in a row of a parquet file, which is read when it is called."""

    shard: ImageColumn
    group: int
    row: int
    """Within the group."""
    size: int
    """Of the group's images together, in bytes."""

    def __call__(self) -> Image.Image:
        name = f"{self.shard.file}, row {self.row} of group {self.group}"
        content = self.shard.read(self.group, self.row)
        if not content:
            raise UnreadableImageError(f"{name} holds no bytes of an image")
        buffer = io.BytesIO(content)
        buffer.name = name  # for the error, if it is no image
        return load_image(buffer)


def _unpacked(column: ImageColumn, group: int) -> Path:
    """Return the file with the images of a group, which the first call writes."""
    key = hashlib.sha256(f"{column.file} {state_of(column.file)} {column.name}".encode()).hexdigest()[:24]
    return build_once(
        cache_directory("parquet_images") / f"{key}-{group}.safetensors",
        lambda path: write_ragged(path, "images", _read_group(column, group)),
    )


@functools.lru_cache(OPEN_GROUPS)
def _open(path: Path) -> Ragged:
    return open_ragged(path, "images")


def _read_group(column: ImageColumn, group: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the bytes of some images, one after the other, and their lengths."""
    import pyarrow
    from pyarrow import compute

    # In parts, as a group may be larger than memory.
    with open_parquet(column.file, buffer_size=FETCHED_BYTES) as table:
        for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column.name]):
            cells = batch.column(0)
            if pyarrow.types.is_struct(cells.type):
                cells = compute.struct_field(cells, "bytes")
            # Not to_pylist(): a Python object for each image takes twice the memory.
            images = compute.fill_null(cells, b"").cast(pyarrow.large_binary())
            _, ends, content = images.buffers()
            ends = np.frombuffer(ends, np.int64)[images.offset : images.offset + len(images) + 1]
            content = np.frombuffer(content or b"", np.uint8)[ends[0] : ends[-1]]
            yield content, np.diff(ends)


def state_of(file: Path | RemoteFile) -> str:
    """Return what changes when the file does; a server is asked once by a process."""
    if isinstance(file, RemoteFile):
        return _remote_state(file)
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


@functools.lru_cache(4096)
def _remote_state(file: RemoteFile) -> str:
    return file.state()


def open_parquet(file: Path | RemoteFile, **options: Any) -> Any:
    """Open a parquet file, of which only what is asked for is read.

    Args:
        file: local, or fetched in ranges.
        options: of `pyarrow.parquet.ParquetFile`.

    Raises:
        ValueError: it is no parquet file.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        source = file.open(ahead=False) if isinstance(file, RemoteFile) else file
        return parquet.ParquetFile(source, **options)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} cannot be read as parquet ({' '.join(str(error).split())})") from error
