"""Images and tables that the demo shows: token grids, attention maps, words with their probability.

Shapes: h w token grid.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tavq.captioner.decoding import Caption, Word
from tavq.tokenizer.heatmaps import UnitMap, heat_overlay

SHEET_PX = 512  # longer side of a token grid or an overlay
MIN_NUMBERED_CELL_PX = 24  # in smaller cells a number cannot be read
GOLDEN_RATIO = 0.618034  # its multiples, modulo 1, spread neighbouring ids over the colour circle
SURE = "sure"
UNSURE = "unsure"


def token_grid(ids: np.ndarray) -> Image.Image:
    """Draw ids (h, w) as coloured, numbered cells; equal ids have equal colours."""
    rows, columns = ids.shape
    cell = max(4, SHEET_PX // max(rows, columns))
    sheet = Image.new("RGB", (columns * cell, rows * cell))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=max(8, cell // 3))

    for (row, column), number in np.ndenumerate(ids):
        x = column * cell
        y = row * cell
        colour = code_colour(int(number))
        draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)
        if cell >= MIN_NUMBERED_CELL_PX:
            # Black on light colours, white on dark ones, by luma (ITU-R BT.601).
            ink = "black" if np.dot(colour, (0.299, 0.587, 0.114)) > 140 else "white"
            draw.text((x + cell / 2, y + cell / 2), str(number), fill=ink, font=font, anchor="mm")
    return sheet


def code_colour(number: int) -> tuple[int, int, int]:
    """Return an RGB colour for a code; neighbouring numbers get colours far apart."""
    hue = number * GOLDEN_RATIO % 1.0
    lightness = 0.45 + 0.1 * (number % 4)
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.55)
    return round(255 * red), round(255 * green), round(255 * blue)


def enlarged(photo: Image.Image) -> Image.Image:
    """Resize a photo until its longer side is that of a sheet."""
    scale = SHEET_PX / max(photo.size)
    return photo.resize([max(1, round(side * scale)) for side in photo.size])


def percent(word: Word) -> str:
    return f"{100 * word.probability:.0f} %"


def marked_words(caption: Caption, unsure_below: float) -> list[tuple[str, str]]:
    """Return each word with its probability, and whether that lies below the threshold."""
    return [
        (f"{word.text} {percent(word)}", UNSURE if word.probability < unsure_below else SURE)
        for word in caption.words
    ]


def word_overlays(photo: Image.Image, caption: Caption) -> list[tuple[Image.Image, str]]:
    """Lay the attention of each word over the photo; return each overlay with its word."""
    large = enlarged(photo)
    return [
        (heat_overlay(large, word.patches), word.text) for word in caption.words if word.patches is not None
    ]


def unit_overlays(photo: Image.Image, maps: Sequence[UnitMap]) -> list[tuple[Image.Image, str]]:
    """Lay the map of each word, phrase and sentence over the photo; return each overlay with its text."""
    large = enlarged(photo)
    return [(heat_overlay(large, unit_map.map), unit_map.unit) for unit_map in maps]


def ranking(captions: Sequence[Caption]) -> list[list[int | str | float]]:
    """Return rows of rank, caption and score (`Caption.score`)."""
    return [[rank, caption.text, round(caption.score, 3)] for rank, caption in enumerate(captions, 1)]
