"""Images and tables that the demo shows: attention maps, captions, words with their probability."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from tavq.captioner.decoding import Caption, Word
from tavq.tokenizer.heatmaps import UnitMap, heat_overlay

SHEET_PX = 512  # longer side of an overlay
SURE = "sure"
UNSURE = "unsure"


def enlarged(photo: Image.Image) -> Image.Image:
    """Resize a photo until its longer side is `SHEET_PX`."""
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
