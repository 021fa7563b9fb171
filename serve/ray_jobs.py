"""One job on many machines: items are cut into parts, and each part is written to a file of its own.

A part depends on its items alone, never on who computes it or how many do. Its file is written aside and
renamed, so it is whole or absent. That makes everything else simple: what a lost worker had not finished is
computed again elsewhere, writing a part twice changes nothing, and a job that is started again computes the
parts that are absent.

All nodes must see the folder of parts, and what the items name, under the same paths.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from tavq.base.engine import EngineConfig
from tavq.base.files import atomic_write
from tavq.base.progress import Progress

from .cluster import connect

MANIFEST = "job.json"
TASKS_AT_ONCE = 64
"""Tasks that are handed to Ray at once, at least: it holds what they are given in shared memory."""
WritePart = Callable[[Sequence[Any], Path], None]
"""Compute some items and write what comes of them to a file."""


@dataclasses.dataclass(frozen=True)
class PartJob:
    """A job that is done part by part."""

    folder: Path
    """Of the parts; `clear_parts` removes it when they have been put together."""
    items: Sequence[Any]
    """What tells them apart is how they print."""
    items_per_part: int
    open_writer: Callable[..., WritePart]
    """A function of a module. It is called once in each worker process, with `arguments`: models are loaded
    there."""
    arguments: tuple[Any, ...]
    """Hashable."""
    fingerprint: str
    """What the result depends on besides the items: settings and weights."""

    def run(self, engine: EngineConfig) -> list[Path]:
        """Compute the parts that are absent, and return the files of all in the order of the items.

        A job whose parts are all there may be repeated with some of its items alone: those that a caller who
        was stopped had not used yet. The parts are then those of all items.

        Raises:
            ValueError: the folder holds parts of another job, or what a task raised.
        """
        paths = self._claim()
        absent = [number for number, path in enumerate(paths) if not path.exists()]
        if absent:
            with (
                _cluster(engine),
                Progress(total=len(paths), initial=len(paths) - len(absent), unit="part") as bar,
            ):
                for _ in self._finished(engine, absent, paths):
                    bar.update(1)
        return paths

    def rows(self, engine: EngineConfig) -> Iterator[list[dict[str, Any]]]:
        """Like `run`, for a writer that writes JSON lines; yield the rows of each part."""
        for path in self.run(engine):
            yield [json.loads(line) for line in path.read_bytes().splitlines()]

    def _finished(self, engine: EngineConfig, absent: Sequence[int], paths: Sequence[Path]) -> Iterator[None]:
        # Tasks and not actors: what a lost node held goes to the nodes that are left, which an actor that
        # waits for a free place there could block. -1: a lost worker is no reason to give up.
        remote = ray.remote(
            num_cpus=engine.cpus_per_task,
            num_gpus=engine.gpus_per_task,
            max_retries=-1,
            retry_exceptions=False,
        )
        task: Any = remote(_write_part)
        at_once = max(TASKS_AT_ONCE, 2 * int(ray.cluster_resources().get("CPU", 0)))
        size = self.items_per_part
        left = iter(absent)
        waiting: list[Any] = []
        while True:
            for number in itertools.islice(left, at_once - len(waiting)):
                items = self.items[number * size : (number + 1) * size]
                waiting.append(task.remote(self.open_writer, self.arguments, items, paths[number]))
            if not waiting:
                return

            (done,), waiting = ray.wait(waiting, num_returns=1)
            try:
                ray.get(done)
            except RayTaskError as error:
                raise error.cause from None
            yield

    def _claim(self) -> list[Path]:
        """Note in the folder whose parts it holds, or check that they are of this job; return their files."""
        settings = hashlib.sha256(f"{self.fingerprint}\n{self.items_per_part}\n".encode()).hexdigest()
        items = [hashlib.sha256(str(item).encode()).hexdigest()[:16] for item in self.items]
        manifest = {"settings": settings, "items": items}
        path = self.folder / MANIFEST
        if not path.exists():
            with atomic_write(path) as aside:
                aside.write_text(json.dumps(manifest))
            return self._paths(len(items))

        there = json.loads(path.read_text())
        paths = self._paths(len(there["items"]))
        is_part = set(items) <= set(there["items"]) and all(path.exists() for path in paths)
        if there != manifest and not (there["settings"] == settings and is_part):
            raise ValueError(
                f"{self.folder} holds parts of another job (other inputs, settings or weights); finish it "
                "with the command that began it, or remove the folder"
            )
        return paths

    def _paths(self, items: int) -> list[Path]:
        """The file of each part of a job of so many items."""
        count = -(-items // self.items_per_part)
        return [self.folder.resolve() / f"part-{number:06d}" for number in range(count)]


def clear_parts(folder: Path) -> None:
    """Remove a folder of parts, if it is one."""
    if (folder / MANIFEST).is_file():
        shutil.rmtree(folder)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a part that `PartJob.rows` reads."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


@contextlib.contextmanager
def _cluster(engine: EngineConfig) -> Iterator[None]:
    """Hold a connection to the cluster while the block runs; one that a caller has made stays."""
    if ray.is_initialized():
        yield
        return
    connect(engine.address)
    try:
        yield
    finally:
        ray.shutdown()


def _write_part(
    open_writer: Callable[..., WritePart], arguments: tuple[Any, ...], items: Sequence[Any], path: Path
) -> None:
    """Write one part, unless somebody has."""
    if path.exists():
        return
    write = _opened(open_writer, arguments)
    with atomic_write(path) as aside:
        write(items, aside)


@functools.lru_cache(maxsize=1)
def _opened(open_writer: Callable[..., WritePart], arguments: tuple[Any, ...]) -> WritePart:
    """Load the models once in each worker process, which Ray keeps from task to task."""
    return open_writer(*arguments)
