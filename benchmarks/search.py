"""Speed and loss of `tavq search` among made-up vectors.

python benchmarks/search.py [--into docs/neighbours.md]

The vectors are a mixture of 5,000 Gaussians in 384 dimensions, the queries further draws from it.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from tavq import photo_index
from tavq.base.arguments import parse, run_main
from tavq.eval.table import write_block
from tavq.photo_index import EXACT_UP_TO, new_index

WIDTH = 384
CLUSTERS = 5000
NOISE = 0.7  # spread within a cluster, relative to that of the centres
NEAREST = 10


@dataclasses.dataclass(frozen=True)
class SearchBenchmark:
    """Build and search indices of made-up vectors.

    Example: python benchmarks/search.py --photos 10000 1000000
    """

    photos: tuple[int, ...] = (10_000, 1_000_000)
    """Numbers of vectors."""
    queries: int = 100
    """Searches, one at a time."""
    candidates: int = photo_index.CANDIDATES
    """Candidates that a search takes from the index."""
    into: Path | None = None
    """Markdown file whose block `search` is filled with the table."""


def made_up(count: int, seed: int) -> np.ndarray:
    """Draw vectors (count, WIDTH) float32, the same centres at every seed."""
    centres = np.random.default_rng(0).standard_normal((CLUSTERS, WIDTH), dtype=np.float32)
    rng = np.random.default_rng(seed)
    drawn = centres[rng.integers(CLUSTERS, size=count)]
    drawn += NOISE * rng.standard_normal(drawn.shape, dtype=np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def measured(index: faiss.Index, queries: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """Search one query at a time: rows found (queries, count), and the median seconds of a search."""
    found, seconds = [], []
    for query in queries:
        started = time.perf_counter()
        found.append(index.search(query[None], count)[1][0])
        seconds.append(time.perf_counter() - started)
    return np.stack(found), float(np.median(seconds))


def row_of(count: int, run: SearchBenchmark) -> str:
    """Measure an index of `count` vectors, as a row of the table."""
    vectors, queries = made_up(count, 1), made_up(run.queries, 2)
    started = time.perf_counter()
    index = new_index(vectors[: photo_index.VECTORS_AT_ONCE], count)
    for start in range(0, count, photo_index.VECTORS_AT_ONCE):
        part = vectors[start : start + photo_index.VECTORS_AT_ONCE]
        index.add_with_ids(part, np.arange(start, start + len(part)))
    build_s = time.perf_counter() - started

    found, search_s = measured(index, queries, min(run.candidates, count))
    exact = np.stack([np.argsort(-(vectors @ query))[:NEAREST] for query in queries])
    recall = np.mean([np.isin(best, row).mean() for best, row in zip(exact, found, strict=True)])
    with tempfile.NamedTemporaryFile() as file:
        faiss.write_index(index, file.name)
        size_mb = Path(file.name).stat().st_size / 1e6
    kind = "all compared" if count <= EXACT_UP_TO else f"{index.nprobe} of {index.nlist} cells"
    speed = f"{build_s:.1f} s | {size_mb:,.0f} MB | {1000 * search_s:.1f} ms"
    return f"| {count:,} | {kind} | {speed} | {recall:.1%} |"


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(SearchBenchmark, argv, prog="python benchmarks/search.py")
    faiss.omp_set_num_threads(1)
    title = f"nearest {NEAREST} among the {run.candidates:,} candidates"
    rows = [
        f"| vectors | searched | build | file | search | {title} |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
        *(row_of(count, run) for count in run.photos),
    ]
    print("\n".join(rows))
    if run.into is not None:
        write_block(run.into, "search", "\n".join(rows))


if __name__ == "__main__":
    main()
