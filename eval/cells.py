"""The cells of Markdown tables of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tavq.eval.results import Comparison

TIMES_100 = (
    "CIDEr",
    "BLEU",
    "METEOR",
    "ROUGE-L",
    "SPICE",
    "cycle_CIDEr",
    "t2i_R@",
    "i2t_R@",
    "prompt_R@",
    "photo_R@",
    "pointing",
    "binding",
    "captions,",
    "drawing",
    "reconstructions",
)
DIGITS = {"PSNR": 2, "SSIM": 3, "KID": 4, "precision": 3, "recall": 3, "usage": 3, "IS": 2}
DIGITS |= dict.fromkeys(("ends in a function word", "distinct captions"), 3)
DIGITS |= dict.fromkeys(("power", "correlation", "weave"), 2)  # of each octave or period


def format_metric(name: str, entry: dict[str, Any] | None) -> str:
    """Return one cell: the value, its interval in brackets, or its deviation; "-" if not measured."""
    if entry is None:
        return "-"
    factor, digits = _scale(name)
    value, low, high = (
        None if entry.get(key) is None else entry[key] * factor for key in ("value", "low", "high")
    )
    if low is not None:
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    if "deviation" in entry:
        return f"{value:.{digits}f} ± {entry['deviation'] * factor:.{digits}f}"
    return f"{value:.{digits}f}"


def format_difference(row: Comparison) -> str:
    """Return one cell: the second minus the first with its paired-bootstrap interval, bold where it
    excludes 0."""
    factor, digits = _scale(row.metric)
    text = f"{row.difference * factor:+.{digits}f}"
    if row.interval is None:
        return text
    text += f" [{row.interval.low * factor:+.{digits}f}, {row.interval.high * factor:+.{digits}f}]"
    return f"**{text}**" if row.interval.excludes_zero else text


def _scale(name: str) -> tuple[int, int]:
    """Factor and decimals with which a metric is shown."""
    return 100 if name.startswith(TIMES_100) else 1, DIGITS.get(name, DIGITS.get(name.split()[0], 1))


def markdown_row(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
