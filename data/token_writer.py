"""Token sets are written shard by shard, and a run that was stopped goes on behind its last whole shard."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tavq.base.files import atomic_write

from .tokens import META_FILE, TokenMeta, TokenRecord, TokenSet, open_shards

PLAN_FILE = "plan.json"
IMAGES_PER_SHARD = 5000


def write_tokens(
    directory: Path, records: Iterable[TokenRecord], meta: TokenMeta, images_per_shard: int = IMAGES_PER_SHARD
) -> None:
    """Write `records` as shards `SPLIT-000000.tar` and `meta.json`, which take the place of `directory`.

    Raises:
        FileExistsError: `directory` exists and is no token set.
    """
    with unfinished_tokens(directory, meta, {}, images_per_shard) as unfinished:
        unfinished.write(records)


class UnfinishedTokens:
    """A token set on its way: the shards that are whole, and those that are still to be written.

    Args:
        folder: of the shards.
        meta: which tokenizer makes them.
        images_per_shard: records of a shard; the last one of a split may hold fewer.
    """

    def __init__(self, folder: Path, meta: TokenMeta, images_per_shard: int):
        self.folder = folder
        self.meta = meta
        self.images_per_shard = images_per_shard

    def finished(self, split: str) -> TokenSet | None:
        """Return what an earlier run has written of a split, None if that is nothing."""
        shards = sorted(self.folder.glob(f"{split}-*.tar"))
        return open_shards(shards, self.meta) if shards else None

    def write(self, records: Iterable[TokenRecord], counts: dict[str, int] | None = None) -> None:
        """Write records as shards, those of a split in their order.

        Args:
            records: those that no finished shard holds.
            counts: split -> records in the finished shards.
        """
        numbers = defaultdict(int, counts or {})
        waiting: dict[str, list[TokenRecord]] = defaultdict(list)
        for record in records:
            group = waiting[record.split]
            group.append(record)
            if len(group) == self.images_per_shard:
                self._write_shard(group, numbers[record.split])
                numbers[record.split] += len(group)
                group.clear()
        for split, group in waiting.items():
            if group:
                self._write_shard(group, numbers[split])

    def _write_shard(self, records: list[TokenRecord], first: int) -> None:
        """Write one shard, whose first record has the number `first` in its split."""
        from webdataset import TarWriter

        shard = self.folder / f"{records[0].split}-{first // self.images_per_shard:06d}.tar"
        # An open file, because TarWriter takes a name that starts with `pipe:` for a shell command.
        with (
            atomic_write(shard) as temporary,
            temporary.open("wb") as file,
            TarWriter(file, mtime=0) as writer,
        ):
            for number, record in enumerate(records, start=first):
                writer.write(_sample(record, number))


@contextlib.contextmanager
def unfinished_tokens(
    directory: Path, meta: TokenMeta, plan: dict[str, Any], images_per_shard: int = IMAGES_PER_SHARD
) -> Iterator[UnfinishedTokens]:
    """Yield the token set that becomes `directory` when the block ends without an error.

    Until then its shards lie in `DIRECTORY.unfinished`, where the next call finds those that are whole.

    Args:
        directory: of the token set; one that lies there is replaced.
        meta: which tokenizer makes it.
        plan: all else that the shards depend on; without it, nothing of an earlier call is used.
        images_per_shard: records of a shard.

    Raises:
        FileExistsError: `directory` exists and is no token set.
        ValueError: the finished shards belong to another plan.
    """
    if directory.exists() and not (directory / META_FILE).exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists and holds no token set; name another --out")
    folder = directory.with_name(f"{directory.name}.unfinished")
    _begin(folder, plan and {**dataclasses.asdict(meta), **plan, "images_per_shard": images_per_shard})
    try:
        yield UnfinishedTokens(folder, meta, images_per_shard)
    except BaseException:
        if not any(folder.glob("*.tar")):
            shutil.rmtree(folder)
        raise

    with atomic_write(folder / META_FILE) as path:
        path.write_text(json.dumps(dataclasses.asdict(meta), indent=2) + "\n")
    if directory.exists():
        shutil.rmtree(directory)
    folder.rename(directory)
    (directory / PLAN_FILE).unlink(missing_ok=True)  # last: until the renaming a killed run needs it


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or take up the one of an earlier run with the same plan."""
    file = folder / PLAN_FILE
    now = json.loads(json.dumps(plan))
    before = json.loads(file.read_bytes()) if file.is_file() else {}
    shards = list(folder.glob("*.tar"))
    if before and now and shards and before != now:
        name = next(name for name in now if before.get(name) != now[name])
        raise ValueError(
            f"{folder} holds {len(shards)} shards of a run with another {name} ({before.get(name)}, now "
            f"{now[name]}); remove that folder to begin anew, or name another --out"
        )
    if before != now or not now:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*"):  # half a shard, of a killed run
        left.unlink()
    if now:
        with atomic_write(file) as path:
            path.write_text(json.dumps(now, indent=2) + "\n")


def _sample(record: TokenRecord, count: int) -> dict[str, object]:
    text = {"id": record.id, "captions": list(record.captions), "long_text": record.long_text}
    return {"__key__": f"{count:08d}", "json": text, "npy": record.ids.astype(np.int32)}
