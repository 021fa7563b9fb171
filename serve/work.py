"""What the tasks of batch jobs do: each function is called once in a worker process, and loads the models.

They write the bytes that the command without Ray writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tavq.captioner.config import DecodingConfig
from tavq.generator.config import SamplingConfig

from .ray_jobs import WritePart

if TYPE_CHECKING:
    from tavq.tokenizer.encode_dataset import EncodedRange


def open_captioner(checkpoint: str, device: str, decoding: DecodingConfig) -> WritePart:
    """Write the captions of (name, file) pairs, one JSON line an image."""
    from tavq.base.device import choose_device
    from tavq.captioner.caption_folder import caption_part
    from tavq.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(checkpoint, choose_device(device))

    def write(images: Sequence[tuple[str, Path]], path: Path) -> None:
        rows = caption_part(
            images, lambda batch: pipeline.caption(batch, decoding), pipeline.tokenizer.image_size_px
        )
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")

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
        with path.open("w") as recipes:
            for (name, _, _), image in zip(jobs, images, strict=True):
                image.save(out / name)
                recipes.write(json.dumps({"file": name, **image.recipe}) + "\n")

    return write


def open_encoder(checkpoint: str, device: str, data: str, keep: Path | None, crops: int) -> WritePart:
    """Write the ids of ranges (split, first, last) of a dataset, as `read_encoded` reads them."""
    import numpy as np

    from tavq.base.device import choose_device
    from tavq.data.keep import keep_only
    from tavq.data.layouts import open_dataset
    from tavq.tokenizer.encode_dataset import crops_of, encode_range
    from tavq.tokenizer.model import TAVQTokenizer

    tokenizer = TAVQTokenizer.from_pretrained(checkpoint).to(choose_device(device))
    dataset = keep_only(open_dataset(data), keep)

    def write(ranges: Sequence[tuple[str, int, int]], path: Path) -> None:
        ((split, first, last),) = ranges
        examples = dataset.select_split(split)
        ids, unreadable = encode_range(tokenizer, examples, crops_of(split, crops), first, last)
        arrays: dict[str, Any] = {str(index): rows for index, rows in ids.items()}
        with path.open("wb") as file:
            np.savez(file, unreadable=np.array(json.dumps(unreadable)), **arrays)

    return write


def read_encoded(path: Path) -> EncodedRange:
    """Read a part of `open_encoder`."""
    import numpy as np

    with np.load(path, allow_pickle=False) as part:
        ids = {int(name): part[name] for name in part.files if name != "unreadable"}
        unreadable = {int(index): reason for index, reason in json.loads(str(part["unreadable"])).items()}
    return ids, unreadable
