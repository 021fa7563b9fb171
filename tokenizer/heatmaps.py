"""Word-to-patch maps: where the transport plan lays each word, phrase and sentence of a text on an image.

Pure arithmetic on the aligned codes, no further model. Words are laid on Z_1, phrases on Z_2, sentences on
Z_3, or on the levels that they were paired with in training.

Shapes: B images, N = h*w tokens an image, U text units, M text width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tavq.alignment.config import LEVEL_NAMES, AlignmentConfig
from tavq.alignment.transport import sinkhorn_plan
from tavq.alignment.units import split_units
from tavq.data.images import grid, to_tensor

from .model import TAVQTokenizer

ITERATIONS = 50  # more than in training: a map is drawn once, and shall be the converged plan
TILE_PX, CAPTION_PX = 200, 34  # width of a picture in the overview, and height of the title under it
COLUMNS = 6
MAX_TINT = 0.7  # share of colour over the photo where a unit lies most


@dataclasses.dataclass(frozen=True)
class UnitMap:
    """Where one unit of a text lies on an image."""

    kind: int
    """1 a word, 2 a phrase, 3 a sentence."""
    unit: str
    map: np.ndarray
    """(h, w) float32, sums to 1: the share of the unit's mass on each token."""

    @property
    def peak(self) -> float:
        """The largest share, in units of an even one: 1 for a map that says nothing."""
        return float(self.map.max() * self.map.size)


@torch.inference_mode()
def text_plan(
    tokenizer: TAVQTokenizer,
    ids: Tensor,
    vectors: Tensor,
    mask: Tensor,
    level: int,
    epsilon: float = AlignmentConfig.epsilon,
) -> tuple[Tensor, Tensor]:
    """The semi-relaxed transport plan between each image and its own text.

    Args:
        tokenizer: gives codes, projection, and the sum of `epsilon` and relaxation that it was trained with.
        ids: (B, N) int64, of `level`.
        vectors: (B, U, M) units, unit length.
        mask: (B, U) bool, at least one True a row.
        level: 1, 2 or 3.
        epsilon: entropic regularisation relative to the mean cost of each image.

    Returns:
        plan (B, N, U): columns of units that exist sum to one over their number, others to 0; and the cost
        1 - cos of the same shape.
    """
    cost = 1 - tokenizer.project(ids, level) @ vectors.transpose(1, 2)
    valid = mask.unsqueeze(1).float()
    # Epsilon is relative to the mean cost, as in training; padding does not count.
    mean = (cost * valid).sum(dim=(1, 2), keepdim=True) / (valid.sum(dim=2, keepdim=True) * cost.shape[1])
    relaxation = max(tokenizer.config.transport_temperature - epsilon, 0.0)
    plan = sinkhorn_plan(cost / mean, mask, epsilon=epsilon, relaxation=relaxation, iterations=ITERATIONS)
    return plan, cost


def unit_maps(
    tokenizer: TAVQTokenizer, image: Image.Image, text: str, encode: Callable[[Sequence[str]], Tensor]
) -> list[UnitMap]:
    """One map for each word, phrase and sentence of `text`, in this order.

    A generated image goes through its pixels like any other: its ids alone lack Z_1 and Z_2.

    Args:
        tokenizer: aligned with text.
        image: any size; squashed to the square.
        text: what to look for.
        encode: texts -> vectors (n, M) of unit length, by the encoder that the tokenizer is aligned with.

    Raises:
        ValueError: the tokenizer is plain, or the text is empty.
    """
    check_aligned(tokenizer)
    units = split_units(text)
    device = next(tokenizer.parameters()).device
    ids = tokenizer.encode_levels(to_tensor(image, tokenizer.image_size_px).unsqueeze(0).to(device))
    maps: list[UnitMap] = []
    for kind, level in tokenizer.aligned_levels.items():
        texts = getattr(units, LEVEL_NAMES[kind - 1])
        if not texts:
            continue
        vectors = encode(texts).to(device).unsqueeze(0)
        mask = torch.ones(1, len(texts), dtype=torch.bool, device=device)
        plan, _ = text_plan(tokenizer, ids[:, level - 1].flatten(1), vectors, mask, level)
        # A column of the plan has the mass 1 / U; each map shall sum to 1.
        masses = (plan[0].T * len(texts)).view(-1, *tokenizer.grid_size).cpu().numpy()
        maps += [UnitMap(kind, unit, mass) for unit, mass in zip(texts, masses, strict=True)]
    if not maps:
        raise ValueError(f"the text {text!r} holds no word; write what the image shows")
    return maps


def check_aligned(tokenizer: TAVQTokenizer, level: int | None = None) -> None:
    """Raise ValueError for a tokenizer whose codes were never aligned with text, at any level or at
    `level`."""
    levels = tokenizer.aligned_levels
    if not levels:
        align = tokenizer.config.provenance.align
        raise ValueError(
            f"this tokenizer was trained with --align {align}, its codes are not projected to words; "
            "use one that was trained with --align ot or gaussian, or fit its projections by "
            "tavq align --probe-only"
        )
    if level is not None and level not in levels.values():
        raise ValueError(
            f"Z_{level} of this tokenizer is not aligned with text; "
            "train one whose --alignment.pairing names it"
        )


def heat_overlay(photo: Image.Image, shares: np.ndarray) -> Image.Image:
    """Colour the greyed photo where a unit lies more than evenly: yellow is little, red is much.

    Args:
        photo: any size, which is kept.
        shares: (h, w), at least 0, sums to 1. Where no token has twice the even share, the colour stays
            faint.
    """
    excess = np.clip(shares * shares.size - 1, 0, None)
    small = Image.fromarray((excess / max(excess.max(), 1)).astype(np.float32))
    heat = np.clip(np.asarray(small.resize(photo.size, Image.Resampling.BICUBIC)), 0, 1)[..., None]
    grey = np.asarray(photo.convert("L"), dtype=np.float32)[..., None]
    colour = np.concatenate([np.full_like(heat, 255), 225 * (1 - heat), np.zeros_like(heat)], axis=-1)
    tint = MAX_TINT * heat
    return Image.fromarray((grey * (1 - tint) + colour * tint).round().astype(np.uint8))


def overview(photo: Image.Image, maps: Sequence[UnitMap]) -> Image.Image:
    """All maps on one sheet, the photo first; under each its unit and how far its peak exceeds an even
    share."""
    height = round(TILE_PX * photo.height / photo.width)
    small = photo.resize((TILE_PX, height), Image.Resampling.LANCZOS)
    tiles = [_titled(small, "the photo", "")]
    for found in maps:
        kind = LEVEL_NAMES[found.kind - 1].removesuffix("s")
        note = f"{kind}, peak {found.peak:.1f} x even"
        tiles.append(_titled(heat_overlay(small, found.map), found.unit, note))
    return grid(tiles, columns=min(COLUMNS, len(tiles)), gap_px=6)


def _titled(picture: Image.Image, title: str, note: str) -> Image.Image:
    tile = Image.new("RGB", (picture.width, picture.height + CAPTION_PX), "white")
    tile.paste(picture, (0, 0))
    pen = ImageDraw.Draw(tile)
    font = ImageFont.load_default(13)
    pen.text((2, picture.height + 2), _shortened(title, font, picture.width - 4), "black", font)
    pen.text((2, picture.height + 18), note, (110, 110, 110), ImageFont.load_default(11))
    return tile


def _shortened(title: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    """`title`, cut with an ellipsis where it is wider than `width_px`."""
    if font.getlength(title) <= width_px:
        return title
    while font.getlength(title + "...") > width_px:
        title = title[:-1]
    return title + "..."
