"""What callers of `Pipeline` may give: one text or several, settings by name, masks of any kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tavq.base.seeding import image_seeds
from tavq.captioner.config import DecodingConfig
from tavq.data.images import ImageSource, open_image
from tavq.generator.config import SamplingConfig
from tavq.prompts import check_prompts, negatives_of, texts_of

WHITE_FROM = 128  # grey level of a mask image from which on a pixel counts as white
Settings = TypeVar("Settings", SamplingConfig, DecodingConfig)


@dataclasses.dataclass(frozen=True)
class Job:
    """One image to generate."""

    prompt: str
    """Empty for the learned null text: an image of nothing in particular."""
    seed: int
    negative: str | None
    """The negative prompt; None takes the learned null text."""


def jobs_of(
    prompt: str | Sequence[str] | None,
    seed: int | Sequence[int],
    num_images: int = 1,
    negative_prompt: str | Sequence[str] | None = None,
) -> list[Job]:
    """List the images that the arguments of `Pipeline.generate` ask for.

    Raises:
        ValueError: a prompt is empty, or seeds or negative prompts are not as many as prompts.
    """
    prompts = texts_of("" if prompt is None else prompt, "prompt")
    if prompt is not None:
        check_prompts(prompts)
    if isinstance(seed, Sequence) and (prompt is None or isinstance(prompt, str)):
        prompts = prompts * len(seed)
    first_seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
    negatives = negatives_of(negative_prompt, len(prompts))
    if not len(prompts) == len(first_seeds) == len(negatives):
        raise ValueError(
            f"got {len(prompts)} prompts, {len(first_seeds)} seeds and {len(negatives)} negative prompts; "
            "expected one for all, or as many as prompts"
        )
    return [
        Job(text, image_seed, negative)
        for text, first, negative in zip(prompts, first_seeds, negatives, strict=True)
        for image_seed in image_seeds(first, num_images)
    ]


def with_options(settings: Settings, options: Mapping[str, Any]) -> Settings:
    """Return `settings` with some fields replaced; an unknown name is a TypeError that lists them."""
    names = [field.name for field in dataclasses.fields(settings)]
    for name in options:
        if name not in names:
            raise TypeError(f"there is no argument {name!r}; beside the named ones: {', '.join(names)}")
    return dataclasses.replace(settings, **options)


def mask_of(mask: Tensor | ImageSource) -> Tensor:
    """Return a mask (H, W) bool; an image is masked where it is white."""
    if isinstance(mask, Tensor):
        return mask
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        return torch.from_numpy(mask)
    return torch.from_numpy(np.array(open_image(mask).convert("L"))) >= WHITE_FROM
