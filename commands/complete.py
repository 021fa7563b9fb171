"""tavq complete IMAGE PROMPT: generate a part of an image anew, or variations of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tyro.conf import OmitArgPrefixes, Positional

from tavq.base.arguments import parse, run_main
from tavq.base.device import Device, choose_device
from tavq.data.images import load_image
from tavq.generator.sampling import SamplingConfig
from tavq.pipeline import CHECKPOINT, Pipeline

from .generate import free_names

WHITE_FROM = 128  # grey level of a mask image from which on a pixel counts as white
SHARE = "share="


@dataclasses.dataclass(frozen=True)
class CompleteRun:
    """Generate a part of an image anew; the rest stays.

    Examples: tavq complete photo.jpg "a dog on the beach" --keep top;  tavq complete photo.jpg "a dog" --keep
    share=0.3 --num-images 4
    """

    image: Positional[Path]
    """The image."""
    prompt: Positional[str]
    """What the whole image shall show."""
    keep: str | None = None
    """The part that stays: top, left, box=x,y,w,h in px of the image, or share=0.3 for variations, which keep
    a random 30 % of the image's tokens."""
    mask: Path | None = None
    """Image of any size whose white part is generated anew."""
    num_images: int = 1
    """Number of images; image i has seed + i."""
    seed: int = 0
    """Seed of the first image."""
    out: Path = Path("out")
    """Directory for the numbered PNG files."""
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/ and generator/."""
    device: Device = "auto"
    """Device to run on."""
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig()

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}, expected 1 or more")
        if (self.keep is None) == (self.mask is None):
            raise ValueError(
                "name the part that stays by --keep top|left|box=x,y,w,h|share=0.3, or by --mask IMAGE"
            )


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CompleteRun, argv, prog="tavq complete")
    image = load_image(run.image)
    seeds = [run.seed + number for number in range(run.num_images)]

    # All of the flags are checked before the models are loaded.
    if run.keep is not None and run.keep.startswith(SHARE):
        share = _share(run.keep)
        pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
        results = pipeline.vary(image, share, run.prompt, seeds, run.sampling)
    else:
        mask = _mask_of(run, image)
        pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
        results = pipeline.complete(image, mask, run.prompt, seeds, run.sampling)

    for result in results:
        path = next(free_names(run.out))
        result.save(path)
        print(path)


def _share(keep: str) -> float:
    try:
        return float(keep.removeprefix(SHARE))
    except ValueError as error:
        raise ValueError(f"--keep is {keep!r}, expected a share such as share=0.3") from error


def _mask_of(run: CompleteRun, image: Image.Image) -> Tensor:
    if run.keep is not None:
        return completion_mask(run.keep, *image.size)
    if run.mask is not None:
        return _mask_image(run.mask)
    raise ValueError("neither --keep nor --mask is given")


def completion_mask(keep: str, width: int, height: int) -> Tensor:
    """Turn `top`, `left` or `box=x,y,w,h` into a mask (H, W) bool, True where the image is generated anew."""
    mask = torch.ones(height, width, dtype=torch.bool)
    if keep == "top":
        mask[: height // 2] = False
        return mask
    if keep == "left":
        mask[:, : width // 2] = False
        return mask

    try:
        x, y, w, h = (int(part) for part in keep.removeprefix("box=").split(","))
    except ValueError as error:
        raise ValueError(f"--keep is {keep!r}, expected top, left, box=x,y,w,h in px or share=0.3") from error
    # A box may reach over the edge; negative numbers would count from the other side.
    mask[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = False
    if mask.all():
        raise ValueError(f"the box {x},{y},{w},{h} lies outside the image, which is {width} x {height} px")
    return mask


def _mask_image(path: Path) -> Tensor:
    return torch.from_numpy(np.array(load_image(path).convert("L"))) >= WHITE_FROM
