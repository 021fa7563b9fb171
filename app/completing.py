"""Complete photos as the page asks for it: a part is generated anew, and the photo keeps its shape.

Shapes: H W photo size in px.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from tavq.data.images import to_rgb
from tavq.generator.sampling import SamplingConfig
from tavq.pipeline import Generated, Pipeline

# What is generated anew, as the page names it.
PAINTED = "what I paint"
AROUND = "around the photo (outpaint)"
SOME = "random tokens (vary)"
MIDDLE = "the middle"
PRESETS: dict[str, tuple[float, float, float, float]] = {
    "top half": (0, 0, 1, 0.5),
    "bottom half": (0, 0.5, 1, 1),
    "left half": (0, 0, 0.5, 1),
    "right half": (0.5, 0, 1, 1),
    MIDDLE: (0.25, 0.25, 0.75, 0.75),
}
"""Left, top, right and bottom of the part, as shares of the photo's sides."""
PARTS = (PAINTED, *PRESETS, AROUND, SOME)
MAX_SIDE_PX = 768  # a photo is shrunk to it: what is generated has far fewer pixels
BLUR_PX = 40


@dataclasses.dataclass(frozen=True)
class Task:
    """A photo, and the part of it that is generated anew."""

    photo: Image.Image
    mask: Tensor | None
    """(H, W) bool, True where the image is generated anew; None for variations."""


def task_of(
    part: str, photo: Image.Image | None, strokes: Sequence[Image.Image | None], outpaint_percent: float
) -> Task:
    """Make the task that the page asks for.

    Args:
        part: one of `PARTS`.
        photo: of any size.
        strokes: layers of the photo's size, not transparent where the user painted.
        outpaint_percent: size of the photo in the larger image, for `AROUND`.

    Raises:
        ValueError: there is no photo, or nothing was painted.
    """
    if photo is None:
        raise ValueError("no photo; upload one, or click an example")
    photo = to_rgb(photo)
    photo.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))

    if part == SOME:
        return Task(photo, None)
    if part == AROUND:
        return _outpainted(photo, outpaint_percent / 100)
    if part == PAINTED:
        return Task(photo, _painted(photo, strokes))
    width, height = photo.size
    left, top, right, bottom = PRESETS[part]
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = True
    return Task(photo, mask)


def _painted(photo: Image.Image, strokes: Sequence[Image.Image | None]) -> Tensor:
    painted = np.zeros((photo.height, photo.width), dtype=bool)
    for layer in strokes:
        if layer is not None:
            painted |= np.asarray(layer.convert("RGBA").getchannel("A").resize(photo.size)) > 0
    if not painted.any():
        raise ValueError("nothing is painted; paint over the part that shall change, or choose another part")
    return torch.from_numpy(painted)


def _outpainted(photo: Image.Image, share: float) -> Task:
    """Shrink the photo into the middle of its own size; what lies around it is generated."""
    width, height = photo.size
    small = photo.resize((max(1, round(share * width)), max(1, round(share * height))))
    left = (width - small.width) // 2
    top = (height - small.height) // 2

    # The tokenizer sees the surroundings, too: blurred ones mislead it less than a plain colour.
    larger = photo.filter(ImageFilter.GaussianBlur(BLUR_PX))
    larger.paste(small, (left, top))
    mask = torch.ones(height, width, dtype=torch.bool)
    mask[top : top + small.height, left : left + small.width] = False
    return Task(larger, mask)


def completions(
    pipeline: Pipeline,
    task: Task,
    prompt: str,
    seeds: Sequence[int],
    settings: SamplingConfig,
    kept_percent: float,
) -> Iterator[Generated]:
    """Yield one image per seed, in the shape of the photo.

    Outside the mask they have the photo's own pixels. Variations keep `kept_percent` of its tokens.
    """
    for seed in seeds:
        if task.mask is None:
            generated = pipeline.vary(task.photo, kept_percent / 100, prompt, [seed], settings)[0]
            image = generated.image.resize(task.photo.size, Image.Resampling.BICUBIC)
        else:
            generated = pipeline.complete(task.photo, task.mask, prompt, [seed], settings)[0]
            large = generated.image.resize(task.photo.size, Image.Resampling.BICUBIC)
            image = Image.composite(large, task.photo, Image.fromarray(task.mask.numpy()))
        yield dataclasses.replace(generated, image=image)
