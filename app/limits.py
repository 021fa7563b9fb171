"""Limits of a demo that strangers use: what a field, an upload and a job may be, and the reason of a refusal.

This module knows nothing of Gradio, so that the command line is checked before anything heavy is imported.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

MIB = 2**20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats of uploads. EPS is not among them: Pillow starts Ghostscript to read it."""
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
"""Brands in the first box of files that phones call HEIC."""
SHOWN_CHARACTERS = 40  # of a value, in a message
LARGEST_WHOLE = 2**63 - 1  # what torch and JSON readers of other languages hold


@dataclass(frozen=True)
class Limits:
    """What one client, one job and one upload may take."""

    max_queue: int = 256
    """Jobs that may wait."""
    max_jobs_per_client: int = 2
    """Jobs of one client that may wait or run."""
    max_candidates_per_client: int = 64
    """Images that one client's jobs may sample in all: images times candidates of each."""
    job_seconds: float = 300.0
    """Seconds of computing after which a job is ended."""
    upload_mib: float = 20.0
    """Size of an upload."""
    max_megapixels: float = 50.0
    """Size of an image, checked before it is decoded."""
    max_text_characters: int = 10_000
    """Length of a prompt or another text."""

    @property
    def upload_bytes(self) -> int:
        return int(self.upload_mib * MIB)


class RefusedError(ValueError):
    """What a user asked for is not done; the message says in one line what was got and what is allowed."""


def check_number(field: str, value: Any, lowest: float | None, highest: float | None, *, whole: bool) -> None:
    """Refuse what is no finite number within the bounds; None leaves a side open."""
    expected = "a whole number" if whole else "a number"
    if lowest is not None and highest is not None:
        expected += f" from {lowest:,} to {highest:,}"
    elif lowest is not None:
        expected += f", {lowest:,} or more"
    elif highest is not None:
        expected += f", at most {highest:,}"

    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not _within(value, lowest, highest) or (whole and value != int(value)):
        raise RefusedError(f"{field} is {shown(value)}, expected {expected}")


def _within(number: float, lowest: float | None, highest: float | None) -> bool:
    # Compared before isfinite, which fails on integers too large for a float.
    if isinstance(number, int) and abs(number) > LARGEST_WHOLE:
        return False
    low = -LARGEST_WHOLE if lowest is None else lowest
    high = LARGEST_WHOLE if highest is None else highest
    return math.isfinite(number) and low <= number <= high


def check_text(field: str, value: Any, most_characters: int) -> None:
    """Refuse what is no text, is too long, or cannot be written as UTF-8."""
    if not isinstance(value, str):
        raise RefusedError(f"{field} is {shown(value)}, expected a text")
    if len(value) > most_characters:
        raise RefusedError(
            f"{field} has {len(value):,} characters, at most {most_characters:,} are allowed; shorten it"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(
            f"{field} holds half a character (a lone surrogate) at position {error.start}, expected text in "
            "UTF-8"
        ) from None


def check_choice(field: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse what is none of the choices."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise RefusedError(f"{field} is {shown(value)}, expected one of: {', '.join(map(str, choices))}")


def check_flag(field: str, value: Any) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise RefusedError(f"{field} is {shown(value)}, expected true or false")


def check_image_file(field: str, path: Path, limits: Limits) -> None:
    """Refuse a file that is too large or no image of `FORMATS`; only its header is read."""
    size = path.stat().st_size
    if size == 0:
        raise RefusedError(f"{field} is an empty file, expected an image; {_formats()}")
    if size > limits.upload_bytes:
        raise RefusedError(too_large(field, size, limits))
    with path.open("rb") as file:
        start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS:
        raise RefusedError(
            f"{field} is a HEIC photo, which is not read here; save it as JPEG "
            "(iPhone: Settings, Camera, Formats, Most Compatible)"
        )

    width, height = _size_by_header(field, path, limits)
    if width * height > limits.max_megapixels * 1e6:
        raise RefusedError(
            f"{field} is {width:,} x {height:,} px, that is {width * height / 1e6:.0f} megapixels, and at "
            f"most {limits.max_megapixels:g} are allowed; make it smaller"
        )


def _size_by_header(field: str, path: Path, limits: Limits) -> tuple[int, int]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Image.DecompressionBombError:  # does not tell the size; `serve` turns it off
        raise RefusedError(
            f"{field} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels, and at most "
            f"{limits.max_megapixels:g} are allowed; make it smaller"
        ) from None
    except Exception:  # broken headers make Pillow raise nearly anything
        raise RefusedError(f"{field} is no image that can be read; {_formats()}") from None


def too_large(field: str, size: int, limits: Limits) -> str:
    allowed = f"at most {limits.upload_mib:g} MiB are allowed"
    return f"{field} has {size / MIB:.1f} MiB or more, {allowed}; send a smaller file"


def _formats() -> str:
    return "send JPEG, PNG, WebP, GIF, BMP or TIFF"


def shown(value: Any) -> str:
    """Write a value of JSON for a message, shortened, with its kind where that is the mistake."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int):
        return str(value) if abs(value) <= LARGEST_WHOLE else f"a number of {_digits(value)} digits"
    text = repr(value)
    text = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
    return f"the text {text}" if isinstance(value, str) else text


def _digits(number: int) -> int:
    # Not len(str(number)): Python refuses to write very long integers.
    return min(int(abs(number).bit_length() * math.log10(2)) + 1, sys.maxsize)
