"""tavq tokenize --data DIR --out DIR [--checkpoint DIR]: encode a dataset into ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tavq.base.arguments import parse, run_main
from tavq.base.files import file_hash
from tavq.base.weights import WEIGHTS_FILE, local_directory
from tavq.serve.config import check_ray
from tavq.tokenizer.run_config import TokenizeRun

if TYPE_CHECKING:
    from tavq.tokenizer.encode_dataset import EncodedRange

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
    from tavq.data.config import SPLITS
    from tavq.data.keep import keep_only
    from tavq.data.layouts import open_dataset
    from tavq.serve.ray_jobs import PartJob
    from tavq.serve.work import open_encoder, read_encoded
    from tavq.tokenizer.encode_dataset import IMAGES_AT_ONCE, encode_dataset

    checkpoint = local_directory(run.checkpoint).resolve()
    data = str(Path(run.data).resolve()) if Path(run.data).exists() else run.data
    keep = run.keep and run.keep.resolve()
    seen = keep_only(open_dataset(data), keep).fingerprint()
    size = IMAGES_AT_ONCE * BATCHES_PER_PART
    parts = run.out.with_name(f"{run.out.name}.parts")

    def job_of(split: str, count: int) -> PartJob:
        return PartJob(
            parts / split,
            [(split, first, min(first + size, count)) for first in range(0, count, size)],
            1,
            open_encoder,
            (str(checkpoint), run.device, data, keep, run.crops),
            fingerprint=f"tokenize {seen} {run.crops} {file_hash(checkpoint / WEIGHTS_FILE)}",
        )

    def ranges(split: str, count: int) -> Iterator[EncodedRange]:
        yield from map(read_encoded, job_of(split, count).run(run.engine))

    encode_dataset(dataclasses.replace(run, device="cpu"), ranges=ranges)
    for split in SPLITS:
        job_of(split, 0).clear()
    if parts.is_dir():
        parts.rmdir()
