"""Result files: one JSON with metrics and the whole protocol, beside it the per-image statistics; and their
comparison.

`x.json` is written last and at once: a killed evaluation leaves nothing that looks complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tavq.base.files import atomic_write
from tavq.metrics import captions, spectral_scores
from tavq.metrics.bootstrap import Interval, Score, bootstrap_interval, paired_difference

METRIC_LIBRARIES = ("torch-fidelity", "pycocoevalcap", "pillow")
"""Libraries that compute, decode or resize; their versions are a part of the protocol."""
OTHER_LIBRARIES = ("ta-vq", "torch", "numpy", "transformers")
"""Libraries whose versions are recorded, but may differ between results that are compared."""
FREE_FIELDS = frozenset(
    [
        "label",
        "data",
        "command",
        "seconds",
        "date",
        "checkpoints",
        "generated_sha256",
        "environment",
        "backend",
        "skipped",
        "floors",
        "judge_shares_networks",
        "decoding.seed",
        "decoding.alignment",
        "sampling.micro_batch",
        "sampling.draft_tokens",
        "sampling.compile",
    ]
)
"""Protocol fields that say what was measured, where and when, but not how. All other fields must be equal.

The name of the dataset is free, its ids are not. Settings of speed are free, because the tokens stay the
same. So are the seed of captions, which beam search does not use, and the weight of alignment in choosing a
caption, which a plain codebook cannot have.
"""
RENAMED_FIELDS = {"sampling.guidance": "sampling.guidance_scale"}
"""Protocol field in result files of earlier versions -> its name today."""
OPTIONAL_FIELDS = ("decoding", "judge", "weave")
"""Protocol fields that are compared only where both files have them. How somebody else's captions were
decoded is not known, and a file without a judge or a weave lacks their metrics, too."""
BOOTSTRAP: dict[str, Any] = {"resamples": 1000, "level": 0.95, "seed": 0}


@dataclass(frozen=True)
class Results:
    """One result file."""

    path: Path
    metrics: dict[str, dict[str, Any]]
    protocol: dict[str, Any]

    @property
    def label(self) -> str:
        """Name in tables: the protocol's label, else the name of the file."""
        return self.protocol.get("label") or self.path.stem

    def per_image(self) -> dict[str, np.ndarray]:
        """Read the arrays beside the file: "ids" and statistics by metric; empty if there are none."""
        beside = per_image_path(self.path)
        if not beside.is_file():
            return {}
        with np.load(beside, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


@dataclass(frozen=True)
class Comparison:
    """One metric of two result files."""

    metric: str
    a: float
    b: float
    difference: float
    interval: Interval | None
    """Interval of the difference b - a, by the paired bootstrap, where both files have per-image
    statistics."""


def measured(value: float, n: int, **more: Any) -> dict[str, Any]:
    """Return the entry of one metric; `more` may hold low, high, over (what those two span), deviation."""
    known = {key: entry for key, entry in more.items() if entry is not None}
    return {"value": float(value), "n": int(n), **known}


def with_intervals(statistics: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return the entries of metrics given as per-image statistics (n,) or (n, k), with bootstrap intervals.

    A metric is the mean of its statistics, or computed from their sums: see `score_of`.
    """
    intervals = {
        name: bootstrap_interval(rows, score_of(name), **BOOTSTRAP) for name, rows in statistics.items()
    }
    return {name: dataclasses.asdict(interval) for name, interval in intervals.items()}


def score_of(metric: str) -> Score:
    """Return the function that turns the summed statistics of a metric into its value."""
    return spectral_scores.score_of(metric) or captions.score_of(metric)


def make_protocol(*, task: str, ids: Iterable[str], started: float, **fields: Any) -> dict[str, Any]:
    """Return a protocol: the given fields and what every run records by itself.

    Args:
        task: "tokenizer", "t2i", "captions", "images": what tables group by.
        ids: of the evaluated images, in order; stored as count and hash.
        started: `time.monotonic()` at the start.
        fields: split, reference set, resize filter, feature network, seeds, checkpoints, label, ...
    """
    ids = list(ids)
    return {
        "task": task,
        "n": len(ids),
        "ids_sha256": ids_sha256(ids),
        **fields,
        "bootstrap": {**BOOTSTRAP, "over": "images"},
        "libraries": library_versions(METRIC_LIBRARIES),
        "environment": {
            **library_versions(OTHER_LIBRARIES),
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - started, 1),
    }


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the distributions that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def ids_sha256(ids: Iterable[str]) -> str:
    """Hash a list of image ids, in order."""
    return hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest()


def references_sha256(references: Mapping[str, Iterable[str]]) -> str:
    """Hash image id -> human captions, in whatever file they came."""
    lines = sorted(json.dumps([str(i), *captions]) for i, captions in references.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def caption_fields(references: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return the protocol fields of caption metrics: what they are, and against which captions."""
    return {
        "references_sha256": references_sha256(references),
        "cider": "pycocoevalcap's (CIDEr-D formula), document frequencies of the evaluated references",
        "tokenizer": "PTB of CoreNLP 3.4.1, lower case, punctuation removed",
    }


def per_image_path(path: Path) -> Path:
    """Return where the per-image statistics of a result file lie."""
    return path.with_suffix(".per_image.npz")


def write_results(
    path: str | Path,
    metrics: Mapping[str, Mapping[str, Any]],
    protocol: Mapping[str, Any],
    *,
    per_image: Mapping[str, np.ndarray] | None = None,
    ids: Iterable[str] = (),
) -> None:
    """Write `path`, and `x.per_image.npz` beside it when per-image statistics are given, each at once.

    Args:
        metrics: name -> {"value", "n", and where known "low", "high"}; see `measured` and `with_intervals`.
        per_image: name -> (n,) or (n, k), rows in the order of `ids`; the paired bootstrap needs it.
    """
    path = Path(path)
    for name, entry in metrics.items():
        if not {"value", "n"} <= entry.keys() or not np.isfinite(entry["value"]):
            raise ValueError(f"metric {name} is {dict(entry)}; expected a finite value and n")

    text = json.dumps({"metrics": dict(metrics), "protocol": dict(protocol)}, indent=2, ensure_ascii=False)
    if per_image:
        with atomic_write(per_image_path(path)) as temporary, temporary.open("wb") as file:
            arrays: dict[str, Any] = {"ids": np.array(list(ids), dtype=str), **per_image}
            np.savez_compressed(file, **arrays)
    else:
        per_image_path(path).unlink(missing_ok=True)  # it would belong to an earlier run of this name

    # Last, so that a killed evaluation leaves nothing that looks complete.
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n")


def read_results(path: str | Path) -> Results:
    """Read a result file, or say what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no result file {path}; make one with an eval/run_*.py or tavq score")
    try:
        content = json.loads(path.read_text())
        return Results(path, dict(content["metrics"]), dict(content["protocol"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result file ({error}); expected metrics and protocol") from error


def protocol_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dotted field -> its two values, for the fields that define a protocol and differ."""
    flat_a = dict(_flatten(a))
    flat_b = dict(_flatten(b))
    free = FREE_FIELDS | {name for name in OPTIONAL_FIELDS if not (a.get(name) and b.get(name))}

    differences: dict[str, tuple[Any, Any]] = {}
    for name in {**flat_a, **flat_b}:
        if name in free or name.split(".")[0] in free:
            continue
        if flat_a.get(name) != flat_b.get(name):
            differences[name] = (flat_a.get(name), flat_b.get(name))
    return differences


def compare(a: str | Path, b: str | Path) -> list[Comparison]:
    """Compare the metrics that two result files have in common.

    Raises:
        ValueError: their protocols differ; the message names each field.
    """
    first = read_results(a)
    second = read_results(b)
    differences = protocol_differences(first.protocol, second.protocol)
    if differences:
        field, (value_a, value_b) = next(iter(differences.items()))
        raise ValueError(
            f"unlike protocols, differing in {', '.join(differences)} ({field}: {value_a!r} in "
            f"{first.path.name}, {value_b!r} in {second.path.name}); measure both alike"
        )

    rows_a = first.per_image()
    rows_b = second.per_image()
    common = [name for name in first.metrics if name in second.metrics]
    return [_compared(name, first.metrics[name], second.metrics[name], rows_a, rows_b) for name in common]


def format_comparison(a: str | Path, b: str | Path) -> str:
    """Return `compare` as lines of text; a metric that one file lacks is shown as absent."""
    names = "".join(f"{Path(path).stem[:15]:>16}" for path in (a, b))
    lines = [f"{'metric':<20}{names}{'difference':>14}  95 % interval"]
    for row in compare(a, b):
        interval = "no per-image scores"
        if row.interval is not None:
            verdict = "" if row.interval.excludes_zero else "  (may be 0)"
            interval = f"[{row.interval.low:+.5g}, {row.interval.high:+.5g}]{verdict}"
        lines.append(f"{row.metric:<20}{row.a:>16.5g}{row.b:>16.5g}{row.difference:>+14.5g}  {interval}")

    first = read_results(a).metrics
    second = read_results(b).metrics
    for name in [*first, *(name for name in second if name not in first)]:
        if name not in first or name not in second:
            cells = (f"{side[name]['value']:.5g}" if name in side else "absent" for side in (first, second))
            lines.append(f"{name:<20}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def _compared(name: str, a: Mapping, b: Mapping, rows_a: Mapping, rows_b: Mapping) -> Comparison:
    interval = None
    if name in rows_a and name in rows_b and np.array_equal(rows_a["ids"], rows_b["ids"]):
        interval = paired_difference(rows_a[name], rows_b[name], score_of(name), **BOOTSTRAP)
    return Comparison(name, a["value"], b["value"], b["value"] - a["value"], interval)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield dotted field and value, with the field's name of today."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            name = f"{prefix}{key}"
            yield RENAMED_FIELDS.get(name, name), value
