"""Members of tar shards, read by hand: a shard may come from a stranger, so nothing in it is ever executed.

WebDataset's own reader is not used on purpose. It unpickles members by their extension, hands file names that
look like URLs to a shell (`pipe:`), and splits the shards among processes where each process needs all.
"""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from .images import load_image
from .remote import RemoteFile

Shard = Path | RemoteFile


def list_members(shard: Shard) -> list[tarfile.TarInfo]:
    """List all members of an uncompressed shard; a compressed one is refused, as members are read by offset.

    Raises:
        ValueError: the file is no uncompressed tar, or it was cut short.
    """
    try:
        with open_shard(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = archive.getmembers()
            end = archive.offset
    except tarfile.TarError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{shard} cannot be read as tar ({reason}); write the shard again, uncompressed"
        ) from error

    # A tar ends with blocks of zeros; tarfile accepts one that was cut between two members without a word.
    if read_range(shard, end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"{shard} has no end mark, so it was cut short; write the shard again")
    return members


def open_shard(shard: Shard) -> BinaryIO:
    """Open a shard for reading at any place."""
    return shard.open() if isinstance(shard, RemoteFile) else shard.open("rb")


def group_samples(members: Iterable[tarfile.TarInfo]) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Group the members of a shard to samples: key -> extension in lower case -> member.

    As in WebDataset, the key ends at the first dot of the file's name. Members that are no regular files, and
    names without an extension, are left out.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        if is_regular(member) and extension:
            samples.setdefault(f"{folder}/{key}" if folder else key, {})[extension.lower()] = member
    return samples


def is_regular(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file whose bytes lie in the shard: no link, no device, not sparse."""
    return member.isfile() and not member.issparse()


def read_member(shard: Shard, member: tarfile.TarInfo) -> bytes:
    """Read the bytes of one member of `shard`."""
    return read_range(shard, member.offset_data, member.size)


def read_range(shard: Shard, offset: int, size: int) -> bytes:
    """Read `size` bytes of the file from `offset` on; fewer where the file ends before."""
    if isinstance(shard, RemoteFile):
        return shard.read_range(offset, size)
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)


@dataclasses.dataclass(frozen=True, slots=True)
class ShardImage:
    """An image in a shard, which is read when it is called."""

    shard: Shard
    name: str
    offset: int
    size: int
    """In bytes."""

    def __call__(self) -> Image.Image:
        buffer = io.BytesIO(read_range(self.shard, self.offset, self.size))
        buffer.name = f"{self.shard}: {self.name}"  # for the error, if it is no image
        return load_image(buffer)
