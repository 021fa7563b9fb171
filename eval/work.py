"""Work on many images of an evaluation: in this process, or part by part on a Ray cluster.

A function of a model and some items, such as images, returns arrays with a row for each item. It must return
the same rows for any part of the items that begins and ends with one of its batches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tavq.base.engine import EngineConfig
from tavq.eval.config import SpreadEvaluation
from tavq.metrics.features import FeatureNetwork, load_network
from tavq.pipeline import Pipeline
from tavq.serve.config import check_ray

Model = Pipeline | FeatureNetwork
Arrays = dict[str, np.ndarray]


class Here:
    """Work in this process."""

    def __call__(
        self,
        function: Callable[..., Arrays],
        model: Model,
        items: Tensor | Sequence[Any],
        *options: Any,
        batch: int,
    ) -> Arrays:
        """Return `function(model, items, *options)`, which takes `batch` items at once."""
        return function(model, items, *options)

    def clear(self) -> None:
        """There is nothing to clear."""


class OnRay(Here):
    """Work on a Ray cluster: each batch is a task. What is done stays in a folder, so a stopped run resumes.

    Args:
        engine: the cluster.
        folder: of the parts; all nodes must see it, and the models, under the same paths.
    """

    def __init__(self, engine: EngineConfig, folder: Path):
        self.engine = engine
        self.folder = folder

    def __call__(
        self,
        function: Callable[..., Arrays],
        model: Model,
        items: Tensor | Sequence[Any],
        *options: Any,
        batch: int,
    ) -> Arrays:
        """Return what `Here` returns. The options must be hashable, and the function one of a module."""
        from tavq.serve.ray_jobs import PartJob, clear_parts

        parts = [_Part.of(items[start : start + batch]) for start in range(0, len(items), batch)]
        source = _Source.of(model)
        described = f"{function.__name__} {source} {options}"
        # A folder for each set of items: images generated with two seeds are measured one after the other.
        name = hashlib.sha256("\n".join([described, *map(str, parts)]).encode()).hexdigest()[:16]
        job = PartJob(
            self.folder / f"{function.__name__}-{name}",
            parts,
            1,
            _open_function,
            (function, source, options),
            fingerprint=described,
        )
        arrays = [dict(np.load(path, allow_pickle=False)) for path in job.run(self.engine)]
        if not arrays[0]:  # the function wrote files, which say themselves what is done
            clear_parts(job.folder)
        return {key: np.concatenate([part[key] for part in arrays]) for key in arrays[0]}

    def clear(self) -> None:
        """Remove the parts of this evaluation."""
        from tavq.serve.ray_jobs import clear_parts

        for folder in self.folder.glob("*-*"):
            clear_parts(folder)
        if self.folder.is_dir():
            self.folder.rmdir()


HERE = Here()


def work_of(run: SpreadEvaluation, result: Path) -> Here:
    """Return where an evaluation works, whose parts lie beside its result file."""
    if run.engine.engine == "local":
        return HERE
    check_ray()
    return OnRay(run.engine, result.resolve().with_suffix(".parts"))


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some items of a job. They are told apart by their content, and how it prints is short."""

    sha256: str
    items: Any = dataclasses.field(repr=False)

    @classmethod
    def of(cls, items: Tensor | Sequence[Any]) -> _Part:
        if isinstance(items, Tensor):
            # Not the tensor: of a part of it, all of its memory would travel.
            pixels = items.numpy()
            return cls(hashlib.sha256(pixels.tobytes()).hexdigest() + str(pixels.shape), pixels)
        return cls(hashlib.sha256(repr(items).encode()).hexdigest(), items)

    def open(self) -> Any:
        # A copy, because what Ray hands over cannot be written to.
        return torch.from_numpy(self.items.copy()) if isinstance(self.items, np.ndarray) else self.items


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a worker finds a model."""

    path: Path
    device: str
    sha256: str

    @classmethod
    def of(cls, model: Model) -> _Source:
        if isinstance(model, Pipeline):
            return cls(model.directory.resolve(), str(model.device), str(model.hashes))
        return cls(model.weights.resolve(), "cpu", model.sha256)

    def open(self) -> Model:
        if self.path.is_dir():
            return Pipeline(self.path, self.device)
        # Who started the job trusts this very network; a worker compares its hash again.
        os.environ["TAVQ_TRUST"] = f"{os.environ.get('TAVQ_TRUST', '')} {self.sha256}"
        network = load_network(None if self.path.suffix == ".pth" else self.path)
        if network.sha256 != self.sha256:
            raise ValueError(f"{network.weights} is another network on the node of a worker; copy it there")
        return network


def _open_function(
    function: Callable[..., Arrays], source: _Source, options: tuple[Any, ...]
) -> Callable[[Sequence[_Part], Path], None]:
    model = source.open()

    def write(parts: Sequence[_Part], path: Path) -> None:
        (part,) = parts
        arrays: dict[str, Any] = function(model, part.open(), *options)
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return write
