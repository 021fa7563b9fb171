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
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from tavq.base.engine import EngineConfig
from tavq.base.files import atomic_write
from tavq.base.progress import Progress

from .cluster import connect

MANIFEST = "job.json"
WritePart = Callable[[Sequence[Any], Path], None]
"""Compute some items and write what comes of them to a file."""


@dataclasses.dataclass(frozen=True)
class PartJob:
    """A job that is done part by part."""

    folder: Path
    """Of the parts; it is removed by `clear` when they have been put together."""
    items: Sequence[Any]
    items_per_part: int
    open_writer: Callable[..., WritePart]
    """A function of a module. It is called once in each worker process, with `arguments`: models are loaded
    there."""
    arguments: tuple[Any, ...]
    """Hashable."""
    fingerprint: str
    """What the result depends on besides the items: settings and weights."""

    def paths(self) -> list[Path]:
        """Return the file of each part, in the order of the items."""
        count = -(-len(self.items) // self.items_per_part)
        return [self.folder.resolve() / f"part-{number:06d}" for number in range(count)]

    def run(self, engine: EngineConfig) -> list[Path]:
        """Compute the parts that are absent, and return the files of all.

        Raises:
            ValueError: the folder holds parts of another job, or what a task raised.
        """
        self._claim()
        paths = self.paths()
        absent = [number for number, path in enumerate(paths) if not path.exists()]
        if absent:
            with (
                _cluster(engine),
                Progress(total=len(paths), initial=len(paths) - len(absent), unit="part") as bar,
            ):
                for _ in self._finished(engine, absent, paths):
                    bar.update(1)
        return paths

    def clear(self) -> None:
        """Remove the folder, if it is one of parts."""
        if (self.folder / MANIFEST).is_file():
            shutil.rmtree(self.folder)

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
        size = self.items_per_part
        waiting = [
            task.remote(self.open_writer, self.arguments, self.items[n * size : (n + 1) * size], paths[n])
            for n in absent
        ]
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            try:
                ray.get(done)
            except RayTaskError as error:
                raise error.cause from None
            yield

    def _claim(self) -> None:
        """Note in the folder whose parts it holds, or check that they are of this job."""
        digest = hashlib.sha256(f"{self.fingerprint}\n{self.items_per_part}\n".encode())
        for item in self.items:
            digest.update(f"{item}\n".encode())
        manifest = {"job": digest.hexdigest()}
        path = self.folder / MANIFEST
        if path.exists() and json.loads(path.read_text()) != manifest:
            raise ValueError(
                f"{self.folder} holds parts of another job (other inputs, settings or weights); finish it "
                "with the command that began it, or remove the folder"
            )
        if not path.exists():
            with atomic_write(path) as aside:
                aside.write_text(json.dumps(manifest))


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
