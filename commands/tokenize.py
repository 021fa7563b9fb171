"""tavq tokenize --data DIR --out DIR [--checkpoint DIR]: encode a dataset into ids."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tavq.base.arguments import parse, run_main
from tavq.base.weights import local_directory
from tavq.data.config import SPLITS
from tavq.serve.config import check_ray
from tavq.tokenizer.run_config import TokenizeRun

if TYPE_CHECKING:
    from tavq.tokenizer.encode_dataset import Encoded

BATCHES_PER_PART = 8
"""Batches of images that a task of --engine ray encodes."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(TokenizeRun, argv, prog="tavq tokenize")
    if run.engine.engine == "ray":
        check_ray()

    from tavq.tokenizer.encode_dataset import encode_dataset

    if run.engine.engine == "ray":
        encode_on_ray(run)
    else:
        encode_dataset(run)
    print(run.out)


def encode_on_ray(run: TokenizeRun) -> None:
    """Encode the dataset with the work spread over a Ray cluster; this process writes the shards."""
    from tavq.data.keep import keep_only
    from tavq.data.layouts import open_dataset
    from tavq.serve.ray_jobs import PartJob, clear_parts
    from tavq.serve.work import ids_of_row, open_encoder
    from tavq.tokenizer.encode_dataset import IMAGES_AT_ONCE, encode_dataset, weights_hash
    from tavq.tokenizer.foreign import BASES, open_tokenizer

    checkpoint = run.checkpoint
    if not checkpoint.startswith(BASES):
        checkpoint = str(local_directory(checkpoint).resolve())
    weights = weights_hash(open_tokenizer(checkpoint, run.image_size_px), checkpoint)
    data = str(Path(run.data).resolve()) if Path(run.data).exists() else run.data
    keep = run.keep and run.keep.resolve()
    seen = keep_only(open_dataset(data), keep).fingerprint()
    size = IMAGES_AT_ONCE * BATCHES_PER_PART
    parts = run.out.with_name(f"{run.out.name}.parts")

    def encode(split: str, first: int, count: int) -> Iterator[Encoded]:
        job = PartJob(
            parts / split,
            [(split, start, min(start + size, count)) for start in range(0, count, size)],
            1,
            open_encoder,
            (checkpoint, run.image_size_px, run.device, data, keep, run.crops),
            fingerprint=f"tokenize {seen} {run.crops} {weights}",
        )
        encoded = map(ids_of_row, itertools.chain.from_iterable(job.rows(run.engine)))
        return ((index, ids) for index, ids in encoded if index >= first)

    encode_dataset(dataclasses.replace(run, device="cpu"), encode=encode)
    for split in SPLITS:
        clear_parts(parts / split)
    if parts.is_dir():
        parts.rmdir()
