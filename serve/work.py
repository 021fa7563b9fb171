"""What the tasks of batch jobs do: each function is called once in a worker process, and loads the models.

They write the bytes that the command without Ray writes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tavq.captioner.config import DecodingConfig
from tavq.generator.config import SamplingConfig
from tavq.tokenizer.run_config import DescribeRun

from .ray_jobs import WritePart, write_rows


def open_captioner(checkpoint: str, device: str, decoding: DecodingConfig) -> WritePart:
    """Write the captions of (name, file) pairs, one JSON line an image."""
    from tavq.base.device import choose_device
    from tavq.captioner.caption_folder import caption_batches
    from tavq.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(checkpoint, choose_device(device))

    def write(images: Sequence[tuple[str, Path]], path: Path) -> None:
        batches = caption_batches(
            images,
            lambda batch: pipeline.caption(batch, decoding),
            size_px=pipeline.tokenizer.image_size_px,
        )
        write_rows(path, itertools.chain.from_iterable(batches))

    return write


def open_generator(
    checkpoint: str, device: str, sampling: SamplingConfig, options: tuple[tuple[str, Any], ...], out: Path
) -> WritePart:
    """Write the images of (file name, prompt, seed) into `out`, and their recipes, one JSON line an image."""
    from tavq.base.device import choose_device
    from tavq.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(checkpoint, choose_device(device))

    def write(jobs: Sequence[tuple[str, str, int]], path: Path) -> None:
        prompts = [prompt for _, prompt, _ in jobs]
        images = pipeline.generate_each(
            prompts if any(prompts) else None, [seed for _, _, seed in jobs], sampling, **dict(options)
        )
        recipes = []
        for (name, _, _), image in zip(jobs, images, strict=True):
            image.save(out / name)
            recipes.append({"file": name, **image.recipe})
        write_rows(path, recipes)

    return write


def open_encoder(
    checkpoint: str, image_size_px: int | None, device: str, data: str, keep: Path | None, crops: int
) -> WritePart:
    """Write the ids of ranges (split, first, last) of a dataset, one JSON line an image."""
    from tavq.base.device import choose_device
    from tavq.data.keep import keep_only
    from tavq.data.layouts import open_dataset
    from tavq.tokenizer.encode_dataset import crops_of, encode_range
    from tavq.tokenizer.foreign import open_tokenizer

    tokenizer = open_tokenizer(checkpoint, image_size_px).to(choose_device(device))
    dataset = keep_only(open_dataset(data), keep)

    def write(ranges: Sequence[tuple[str, int, int]], path: Path) -> None:
        ((split, first, last),) = ranges
        examples = dataset.select_split(split)
        encoded = encode_range(tokenizer, examples, crops_of(split, crops), first, last)
        write_rows(path, (ids_row(index, ids) for index, ids in encoded))

    return write


def open_indexer(checkpoint: str, device: str, folder: Path) -> WritePart:
    """Write the ids of photos (name, time of change, size) in a folder, one JSON line a photo."""
    from tavq.base.device import choose_device
    from tavq.photo_index import PhotoIndex
    from tavq.tokenizer.model import TAVQTokenizer

    tokenizer = TAVQTokenizer.from_pretrained(checkpoint).to(choose_device(device))
    index = PhotoIndex(folder, tokenizer, "")

    def write(photos: Sequence[tuple[str, int, int]], path: Path) -> None:
        encoded = index.encode_photos(folder, [name for name, _, _ in photos])
        write_rows(path, (ids_row(name, ids) for name, ids in encoded))

    return write


def open_describer(run: DescribeRun, model: Path) -> WritePart:
    """Write the descriptions of images (index, id, prompt) by a local model, one JSON line an image."""
    from tavq.base.device import choose_device
    from tavq.data.layouts import open_dataset
    from tavq.data.vision_language import LocalModel
    from tavq.tokenizer.describe_dataset import Describer

    dataset = open_dataset(run.data, run.split).take(run.limit)
    local = LocalModel(dataclasses.replace(run.vlm, model=str(model)), choose_device(run.device))
    describer = Describer(run, dataset, local)
    return lambda questions, path: write_rows(path, describer(questions))


def ids_row(name: int | str, ids: np.ndarray | str) -> dict[str, Any]:
    """Return the line of an image: its ids, or why it cannot be read."""
    return {"image": name} | ({"unreadable": ids} if isinstance(ids, str) else {"ids": ids.tolist()})


def ids_of_row(row: dict[str, Any]) -> tuple[Any, np.ndarray | str]:
    """Return what `ids_row` was given."""
    return row["image"], row["unreadable"] if "unreadable" in row else np.array(row["ids"])
