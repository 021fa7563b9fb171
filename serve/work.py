"""What the tasks of batch jobs do: each function is called once in a worker process, and loads the models.

They write the bytes that the command without Ray writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tavq.captioner.config import DecodingConfig
from tavq.generator.config import SamplingConfig

from .ray_jobs import WritePart


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
