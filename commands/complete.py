"""tavq complete IMAGE PROMPT: generate a part of an image anew, or variations of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import OmitArgPrefixes, Positional

from tavq.base.arguments import parse, print_json, run_main
from tavq.base.device import Device, choose_device
from tavq.base.files import check_directory
from tavq.base.seeding import RANDOM, image_seeds
from tavq.base.weights import CHECKPOINT
from tavq.generator.config import SamplingConfig, check_negative_prompt
from tavq.prompts import check_prompts

from .generate import free_names

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

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
    """The part that stays: top, bottom, left, right, box=x,y,w,h in px of the image, or share=0.3 for
    variations, which keep a random 30 % of the image's tokens."""
    mask: Path | None = None
    """Image of any size whose white part is generated anew."""
    negative_prompt: str | None = None
    """What the images shall not show: guidance leads away from it, in place of the learned null text."""
    num_images: int = 1
    """Number of images; image i has seed + i."""
    seed: int = 0
    """Seed of the first image; -1 chooses one at random and prints it."""
    out: Path = Path("out")
    """Directory for the numbered PNG files."""
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/ and generator/."""
    device: Device = "auto"
    """Device to run on."""
    json: bool = False
    """Print one line of JSON for each result, instead of text."""
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig()

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}, expected 1 or more")
        check_negative_prompt(self.negative_prompt, self.sampling)
        if (self.keep is None) == (self.mask is None):
            raise ValueError(
                "name the part that stays by --keep top|bottom|left|right|box=x,y,w,h|share=0.3, "
                "or by --mask IMAGE"
            )


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CompleteRun, argv, prog="tavq complete")
    check_prompts([run.prompt])
    check_directory(run.out)

    from tavq.data.images import load_image

    image = load_image(run.image)
    seeds = image_seeds(run.seed, run.num_images)
    options: dict[str, Any] = {
        "prompt": run.prompt,
        "seed": seeds,
        "settings": run.sampling,
        "negative_prompt": run.negative_prompt,
    }

    # All of the flags are checked before the models are loaded.
    share = _share(run.keep) if run.keep is not None and run.keep.startswith(SHARE) else None
    mask = _mask_of(run, image) if share is None else None

    from tavq.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    if run.seed == RANDOM and not run.json:
        print(f"seed {seeds[0]}")
    if share is not None:
        results = pipeline.vary(image, share, **options)
    elif mask is not None:
        results = pipeline.complete(image, mask, **options)

    for result in results:
        path = next(free_names(run.out))
        result.save(path)
        if run.json:
            print_json({"file": str(path), **result.recipe})
        else:
            print(path)


def _mask_of(run: CompleteRun, image: Image.Image) -> Tensor:
    if run.keep is not None:
        return completion_mask(run.keep, *image.size)
    if run.mask is not None:
        from tavq.inputs import mask_of

        mask = mask_of(run.mask)
        if not mask.any():
            raise ValueError(f"{run.mask} has no white part, so nothing is to be generated; paint it white")
        return mask
    raise ValueError("neither --keep nor --mask is given")


def completion_mask(keep: str, width: int, height: int) -> Tensor:
    """Turn --keep into a mask (H, W) bool, True where the image is generated anew."""
    import torch

    halves = {
        "top": (0, 0, width, height // 2),
        "bottom": (0, height // 2, width, height - height // 2),
        "left": (0, 0, width // 2, height),
        "right": (width // 2, 0, width - width // 2, height),
    }
    x, y, w, h = halves[keep] if keep in halves else _box(keep)

    mask = torch.ones(height, width, dtype=torch.bool)
    # A box may reach over the edge; negative numbers would count from the other side.
    mask[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = False
    if mask.all():
        raise ValueError(f"the box {x},{y},{w},{h} lies outside the image, which is {width} x {height} px")
    return mask


def _box(keep: str) -> tuple[int, int, int, int]:
    """Read box=x,y,w,h."""
    try:
        x, y, w, h = (int(part) for part in keep.removeprefix("box=").split(","))
    except ValueError as error:
        raise ValueError(
            f"--keep is {keep!r}, expected top, bottom, left, right, box=x,y,w,h in px or share=0.3"
        ) from error
    return x, y, w, h


def _share(keep: str) -> float:
    """Read share=S, the fraction of the tokens that stay."""
    try:
        share = float(keep.removeprefix(SHARE))
    except ValueError as error:
        raise ValueError(f"--keep is {keep!r}, expected a share such as share=0.3") from error
    if not 0 < share < 1:
        raise ValueError(f"the share of tokens that stay is {share}, expected above 0 and below 1")
    return share
