"""Arrays that may be larger than memory: written some rows at a time, read from a memory-mapped file.

The files are safetensors, so each of them can be opened with that library, too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from .files import atomic_write

_DTYPES = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8", "U8": "u1"}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_HEADER_BYTES = 1024  # reserved, as the number of rows is known at the end alone
_MAPPED_BYTES = 2**24  # read from one array before its pages are given back
_BYTES_AROUND = 2**16  # that the system maps with each page it is asked for


class DiskArray:
    """A read-only array in a file. `array[rows]` is a copy of what was asked for.

    Pages that were read count as memory of the process, although the system can take them back. They are
    given back now and then, so that a limit of memory on a cluster sees what the process needs.

    Args:
        path: of the file.
        offset: of the array's first byte.
        shape: of the array.
        dtype: of its numbers.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: str):
        self._source = (path, offset, shape, dtype)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)  # reads no pages ahead that nobody asked for
        self._view = np.ndarray(shape, dtype, self._map, offset)
        self._is_large = len(self._map) > _MAPPED_BYTES
        self._mapped = 0
        self.offset = offset
        self.shape = shape
        self.dtype = self._view.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        found = np.array(self._view[rows])
        pieces = 1 if isinstance(rows, int | slice) else np.size(rows)
        self._mapped += found.nbytes + pieces * _BYTES_AROUND
        if self._is_large and self._mapped > _MAPPED_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._mapped = 0
        return found

    def __reduce__(self) -> Any:  # for the workers of a DataLoader, where they are started anew
        return DiskArray, self._source


class ArrayWriter:
    """Writes a safetensors file of one array that grows row by row, and others at the end.

    Args:
        file: opened for writing.
        name: of the array that grows.
    """

    def __init__(self, file: BinaryIO, name: str):
        self.file = file
        self.name = name
        self.rows = 0
        self._like: np.ndarray | None = None
        file.write(bytes(8 + _HEADER_BYTES))

    def append(self, rows: np.ndarray) -> None:
        """Write further rows, of the same shape and type as the earlier ones."""
        if self._like is None:
            self._like = rows[:0].copy()
        if rows.shape[1:] != self._like.shape[1:] or rows.dtype != self._like.dtype:
            raise ValueError(
                f"rows are {rows.dtype} {rows.shape[1:]}, the others {self._like.dtype} "
                f"{self._like.shape[1:]}"
            )
        self.file.write(np.ascontiguousarray(rows).data)
        self.rows += len(rows)

    def finish(self, **others: np.ndarray) -> None:
        """Write the other arrays and the header."""
        if self._like is None:
            raise ValueError(f"no row of {self.name} was written")
        header: dict[str, Any] = {}
        end = 0
        for name, array in {self.name: self._like, **others}.items():
            shape = [self.rows, *array.shape[1:]] if name == self.name else list(array.shape)
            if name != self.name:
                self.file.write(np.ascontiguousarray(array).data)
            size = math.prod(shape) * array.itemsize
            header[name] = {
                "dtype": _NAMES[array.dtype],
                "shape": shape,
                "data_offsets": [end, end + size],
            }
            end += size

        content = json.dumps(header).encode()
        if len(content) > _HEADER_BYTES:
            raise ValueError(f"header of {len(content)} bytes, at most {_HEADER_BYTES} were reserved")
        self.file.seek(0)
        self.file.write(_HEADER_BYTES.to_bytes(8, "little") + content.ljust(_HEADER_BYTES))


def open_arrays(path: Path) -> dict[str, DiskArray]:
    """Open the arrays of a safetensors file, by name, without reading them."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: DiskArray(path, 8 + length + row["data_offsets"][0], tuple(row["shape"]), _DTYPES[row["dtype"]])
        for name, row in header.items()
    }


def transform_rows(
    path: Path, name: str, function: Callable[[np.ndarray], np.ndarray], rows_at_once: int
) -> None:
    """Replace the rows of an array, some at a time, by what `function` makes of them."""
    array = open_arrays(path)[name]
    row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
    with path.open("r+b") as file:
        for start in range(0, len(array), rows_at_once):
            rows = array[start : start + rows_at_once]
            file.seek(array.offset + start * row_bytes)
            file.write(np.ascontiguousarray(function(rows), array.dtype).data)


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of unlike length, one after the other: row i is `values[starts[i] : starts[i + 1]]`."""

    values: DiskArray
    starts: DiskArray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]
        start, end = self.starts[index : index + 2].tolist()
        return self.values[start:end]


class DiskTexts(Sequence[str]):
    """Texts in a file, as rows of UTF-8 bytes."""

    def __init__(self, rows: Ragged):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        return self.rows[index].tobytes().decode()


class RaggedWriter:
    """Writes a file that `open_ragged` opens, some rows at a time.

    Args:
        file: opened for writing.
        name: of the values.
    """

    def __init__(self, file: BinaryIO, name: str):
        self._values = ArrayWriter(file, name)
        self._lengths = [np.zeros(1, np.int64)]

    def append(self, values: np.ndarray, lengths: np.ndarray) -> None:
        """Write further rows: their values, one row after the other, and their lengths."""
        self._values.append(values)
        self._lengths.append(lengths.astype(np.int64))

    def finish(self) -> None:
        """Write where each row starts."""
        self._values.finish(starts=np.concatenate(self._lengths).cumsum())


def write_ragged(path: Path, name: str, groups: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write a file that `open_ragged` opens; `groups` are arguments of `RaggedWriter.append`."""
    with path.open("wb") as file:
        writer = RaggedWriter(file, name)
        for values, lengths in groups:
            writer.append(values, lengths)
        writer.finish()


def open_ragged(path: Path, name: str) -> Ragged:
    """Open what `write_ragged` wrote."""
    arrays = open_arrays(path)
    return Ragged(arrays[name], arrays["starts"])


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Return `path`, after `build` has written it if it is not there; other processes wait for that.

    Args:
        path: of a file.
        build: writes the file at the path that it is given.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")) as lock:
            try:
                if not path.exists():
                    with atomic_write(path) as temporary:
                        build(temporary)
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it notices, and makes a new one
    return path
