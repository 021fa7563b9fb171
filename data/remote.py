"""Shards that lie elsewhere: named by a URL of a few known schemes, read in ranges through fsspec.

Other schemes are refused. WebDataset's `pipe:` would run a shell command, and fsspec's chains (`a::b`) open
whatever they name.
"""

from __future__ import annotations

import dataclasses
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

SCHEMES = ("https", "http", "s3", "gs", "hf")
"""What a URL of a dataset may begin with; s3 needs s3fs installed, gs needs gcsfs."""
BLOCK_BYTES = 2**20  # read ahead while the members of a shard are listed


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file named by a URL."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Last part of the path."""
        return PurePosixPath(urlsplit(self.url).path).name

    @property
    def stem(self) -> str:
        """Its name without the suffix."""
        return PurePosixPath(self.name).stem

    def open(self, *, ahead: bool = True) -> BinaryIO:
        """Open it for reading at any place; it is fetched in blocks, or not `ahead` of what is asked for."""
        system, path = self._system()
        cache: dict[str, Any] = {} if ahead else {"cache_type": "none"}
        return cast(BinaryIO, self._checked(system.open, path, "rb", block_size=BLOCK_BYTES, **cache))

    def read_range(self, offset: int, size: int) -> bytes:
        """Fetch `size` bytes from `offset` on; fewer where the file ends before."""
        if not size:
            return b""
        system, path = self._system()
        content = self._checked(system.cat_file, path, start=offset, end=offset + size)
        if len(content) > size:
            raise OSError(f"{self.url}: the server sends whole files, not the parts that are asked for")
        return content

    def state(self) -> str:
        """What changes when the file does: size, and what the server tells of its content."""
        system, path = self._system()
        info = self._checked(system.info, path)
        tags = ("size", "ETag", "etag", "LastModified", "Last-Modified", "mtime", "blob_id")
        return " ".join(str(info.get(tag)) for tag in tags)

    def _system(self) -> tuple[Any, str]:
        """Return fsspec's file system and the path in it, anew in each process, as it starts threads."""
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise ValueError(f"{self.url} cannot be read: {error}") from error

    def _checked(self, call: Any, *arguments: Any, **options: Any) -> Any:
        """Call fsspec; whatever error a server or its library gives names the file."""
        try:
            return call(*arguments, **options)
        except FileNotFoundError:
            raise FileNotFoundError(f"no file {self.url}; check the address") from None
        except Exception as error:  # each file system has errors of its own
            raise OSError(f"{self.url} cannot be read: {type(error).__name__} {error}") from error


def is_url(path: str) -> bool:
    """Whether `path` is a URL, of whatever scheme.

    Raises:
        ValueError: of a scheme that is not opened.
    """
    scheme, separator, _ = path.partition("://")
    if not separator or "/" in scheme:
        return False
    if scheme not in SCHEMES or "::" in path:
        raise ValueError(
            f"{path} is no address that is opened; expected one that begins with "
            f"{', '.join(f'{name}://' for name in SCHEMES)}"
        )
    return True
