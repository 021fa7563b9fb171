"""tavq complete PHOTO PROMPT: draw a part of a photo anew, or variations of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tyro.conf import OmitArgPrefixes, Positional

from tavq.base.arguments import parse, run_main
from tavq.base.device import Device, choose_device
from tavq.data.images import load_image
from tavq.generator.sampling import SamplingConfig
from tavq.pipeline import CHECKPOINT, Pipeline

from .generate import free_names

MIN_MASK_GREY = 128  # of a mask picture; lighter is drawn anew


@dataclasses.dataclass(frozen=True)
class CompleteRun:
    """Draw a part of a photo anew; the rest stays.

    Examples: tavq complete photo.jpg "a dog on the beach" --keep top;  tavq complete photo.jpg "a dog" --keep
    share=0.3 --num-images 4
    """

    image: Positional[Path]
    """The photo."""
    prompt: Positional[str]
    """What the whole picture shall show."""
    keep: str | None = None
    """The part that stays: top, left, box=x,y,w,h in px of the photo, or share=0.3 for variations, which keep
    a random 30 % of the photo's tokens."""
    mask: Path | None = None
    """Picture of any size whose white part is drawn anew."""
    num_images: int = 1
    seed: int = 0
    out: Path = Path("out")
    """Directory of the numbered PNG files."""
    checkpoint: str = CHECKPOINT
    device: Device = "auto"
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig()

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}, expected 1 or more")
        if (self.keep is None) == (self.mask is None):
            raise ValueError(
                "name the part that stays by --keep top|left|box=x,y,w,h|share=0.3, or by --mask PICTURE"
            )


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CompleteRun, argv, prog="tavq complete")
    photo = load_image(run.image)
    share = _share(run.keep) if run.keep and run.keep.startswith("share=") else None
    if share is None:
        mask = kept_part(run.keep, *photo.size) if run.keep else _mask_of(run.mask)
    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    asked = run.prompt, [run.seed + i for i in range(run.num_images)], run.sampling
    drawn = pipeline.complete(photo, mask, *asked) if share is None else pipeline.vary(photo, share, *asked)
    for picture in drawn:
        path = next(free_names(run.out))
        picture.save(path)
        print(path)


def _share(keep: str) -> float:
    try:
        return float(keep.removeprefix("share="))
    except ValueError as error:
        raise ValueError(f"--keep is {keep!r}, expected a share such as share=0.3") from error


def kept_part(keep: str, width: int, height: int) -> torch.Tensor:
    """`top`, `left` or `box=x,y,w,h` -> mask (H, W) bool, True where the picture is drawn anew."""
    mask = torch.ones(height, width, dtype=torch.bool)
    if keep == "top":
        mask[: height // 2] = False
    elif keep == "left":
        mask[:, : width // 2] = False
    else:
        try:
            x, y, w, h = (int(part) for part in keep.removeprefix("box=").split(","))
        except ValueError as error:
            raise ValueError(
                f"--keep is {keep!r}, expected top, left, box=x,y,w,h in px or share=0.3"
            ) from error
        mask[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = False
        if mask.all():
            raise ValueError(
                f"the box {x},{y},{w},{h} lies outside the photo, which is {width} x {height} px"
            )
    return mask


def _mask_of(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(load_image(path).convert("L"))) >= MIN_MASK_GREY
