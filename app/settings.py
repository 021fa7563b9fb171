"""Prompt, seed and settings of an image, as PNG files, links and the history of a browser carry them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from tavq.generator.config import EARLIER_VALUES, RENAMED_FIELDS
from tavq.generator.sampling import SamplingConfig
from tavq.results import PARAMETERS_FIELD, RECIPE_FIELD

MAX_PROMPT_LETTERS = 1000
MAX_CANDIDATES = 16
MAX_BEAM = 10
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**53),  # the largest whole number that a browser keeps exactly
    "guidance_scale": (0, 10),
    "temperature": (0, 2),
    "top_k": (0, 2**20),
    "top_p": (0.01, 1),
    "best_of": (1, MAX_CANDIDATES),
}
"""Smallest and largest value that the page takes."""
TEXTS = ("prompt", "negative_prompt")
FIELDS = (*TEXTS, *LIMITS)
WHOLE = ("seed", "top_k", "best_of")  # the other numbers have decimals

_A1111_NAMES = {"Seed": "seed", "CFG scale": "guidance_scale"}
"""Names in the parameters of AUTOMATIC1111's web UI, and of those that copy it -> ours."""
_A1111_PAIR = re.compile(r'\s*([\w \-/]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')


def of_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Take the fields that the page has from a recipe (`Generated.recipe`)."""
    settings = {RENAMED_FIELDS.get(name, name): value for name, value in recipe.get("settings", {}).items()}
    merged = {**settings, **{name: recipe[name] for name in FIELDS if name in recipe}}
    return {name: merged[name] for name in FIELDS if name in merged}


def unlike_here(recipe: Mapping[str, Any]) -> list[str]:
    """Name the settings of a recipe that the page has no field for, where they differ from its own."""
    own = dataclasses.asdict(SamplingConfig())
    others = EARLIER_VALUES | recipe.get("settings", {})
    others = {name: value for name, value in others.items() if name not in FIELDS}
    return [f"{name} {value}" for name, value in others.items() if value != own.get(name, value)]


def of_png(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Read the settings from a PNG of this program, or of one that writes A1111's `parameters`.

    Only the header is read: no pixel is decoded.

    Returns:
        The fields that the page has, and the names of those that it has not.

    Raises:
        ValueError: the file is no PNG, or carries no settings.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            texts = {name: text for name, text in image.info.items() if isinstance(text, str)}
    except (OSError, SyntaxError) as error:
        raise ValueError("this file is not a PNG; drop one that was downloaded here") from error

    if RECIPE_FIELD in texts:
        try:
            recipe = json.loads(texts[RECIPE_FIELD])
            return of_recipe(recipe), unlike_here(recipe)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError("the recipe in this PNG is damaged; drop another file") from error
    if PARAMETERS_FIELD in texts:
        return of_parameters(texts[PARAMETERS_FIELD])
    raise ValueError("this PNG carries no settings; drop one that was downloaded here")


def of_parameters(text: str) -> tuple[dict[str, Any], list[str]]:
    """Read A1111's text: the prompt, perhaps a line `Negative prompt: ...`, and a line `Name: value, ...`."""
    *lines, last = text.strip().split("\n")
    pairs: dict[str, str] = dict(_A1111_PAIR.findall(last))
    if not pairs.keys() & {*_A1111_NAMES, *LIMITS}:
        lines, pairs = [*lines, last], {}

    unknown = [name for name in pairs if _A1111_NAMES.get(name, name) not in LIMITS]
    prompt, _, negative = "\n".join(lines).partition("Negative prompt:")
    values = {_A1111_NAMES.get(name, name): value for name, value in pairs.items() if name not in unknown}
    return {"prompt": prompt.strip(), "negative_prompt": negative.strip(), **values}, unknown


def of_query(parameters: Mapping[str, str]) -> dict[str, Any]:
    """Take the fields that the page has from the part of a link behind `?`."""
    return {name: parameters[name] for name in FIELDS if name in parameters}


def to_query(values: Mapping[str, Any]) -> str:
    """Write values as the part of a link behind `?`, with it."""
    return "?" + urllib.parse.urlencode({name: values[name] for name in FIELDS if name in values})


def checked(values: Mapping[str, Any], num_codes: int) -> tuple[dict[str, Any], list[str]]:
    """Turn values of any origin into such as the page's fields take.

    Args:
        values: field -> value; numbers may be written as text.
        num_codes: size of the codebook, the largest top-k.

    Returns:
        Field -> value; and a line for each value that was changed or left out.
    """
    notes: list[str] = []
    taken: dict[str, Any] = {}
    for name in TEXTS:
        text = values.get(name)
        if not isinstance(text, str):
            continue
        taken[name] = text[:MAX_PROMPT_LETTERS]
        if len(text) > MAX_PROMPT_LETTERS:
            notes.append(f"{name} is cut after {MAX_PROMPT_LETTERS} letters")

    for name, (smallest, largest) in LIMITS.items():
        if name not in values:
            continue
        largest = min(largest, num_codes) if name == "top_k" else largest
        try:
            number = float(values[name])
            if math.isnan(number):
                raise ValueError
            inside = min(max(number, smallest), largest)
            taken[name] = round(inside) if name in WHOLE else inside
        except (TypeError, ValueError, OverflowError):
            notes.append(f"{name} is {str(values[name])[:20]!r}, which is no number: left out")
            continue
        if inside != number:
            notes.append(f"{name} {number:g} became {inside:g}, the nearest that this page takes")
    return taken, notes


def updates(taken: Mapping[str, Any]) -> list[Any]:
    """Write values for the page's components in the order of `FIELDS`; those that are absent stay."""
    return [taken.get(name, gr.skip()) for name in FIELDS]
