"""tavq cache: show what is kept on disk to save time, or clear it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from typing import Annotated

import tyro

from tavq.base.arguments import parse, print_json, run_main
from tavq.base.cache import CACHES, cache_directory, cache_root


@dataclasses.dataclass(frozen=True)
class CacheRun:
    """List the caches with their sizes, or clear them. What is cleared is computed again when it is needed.

    Examples: tavq cache, tavq cache --clear, tavq cache --clear teacher_maps
    """

    clear: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[NAME ...]")] = None
    """Caches to clear. Without a name all caches are cleared."""
    json: bool = False
    """Print one line of JSON for each result, instead of text."""

    def __post_init__(self) -> None:
        for name in self.clear or ():
            cache_directory(name)  # refuses an unknown name


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CacheRun, argv, prog="tavq cache")
    if run.clear is not None:
        clear_caches(run.clear or tuple(CACHES), as_json=run.json)
    elif run.json:
        print_json({"directory": str(cache_root()), "bytes": {name: cache_size(name) for name in CACHES}})
    else:
        list_caches()


def list_caches() -> None:
    """Print the size of each cache and what it holds."""
    sizes = {name: cache_size(name) for name in CACHES}
    print(f"{cache_root()} (set TAVQ_CACHE to move it)")
    for name, size in sizes.items():
        print(f"{name:<16}{_readable(size):>10}  {CACHES[name]}")
    print(f"{'total':<16}{_readable(sum(sizes.values())):>10}")


def clear_caches(names: Sequence[str], *, as_json: bool = False) -> None:
    """Delete caches, and print how much each took."""
    for name in names:
        size = cache_size(name)
        if cache_directory(name).exists():
            shutil.rmtree(cache_directory(name))
        if as_json:
            print_json({"cleared": name, "bytes": size})
        else:
            print(f"{name}: cleared {_readable(size)}")


def cache_size(name: str) -> int:
    """Return the bytes that a cache takes on disk."""
    return sum(file.stat().st_size for file in cache_directory(name).rglob("*") if file.is_file())


def _readable(size: int) -> str:
    """Write a number of bytes as people read it: 3.1 MB."""
    if size < 1000:
        return f"{size} B"
    exponent = min(3, (len(str(size)) - 1) // 3)
    return f"{size / 1000**exponent:.1f} {'_kMG'[exponent]}B"
