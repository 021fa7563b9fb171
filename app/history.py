"""The history that a browser keeps: prompt, seed, settings and a thumbnail of its latest images.

It lies in the browser's local storage, not on the server.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from tavq.pipeline import read_recipe

from .settings import of_recipe

MAX_ENTRIES = 32
THUMBNAIL_PX = 96
# The key and the secret are fixed, so that the history survives a restart of the server. It needs no secrecy:
# only pages of this server's address can read its local storage.
STORAGE_KEY = "tavq-history"
STORAGE_SECRET = "tavq-history-v1"
_PREFIX = "data:image/webp;base64,"

Entry = dict[str, Any]
"""The fields of `app.settings`, and `thumbnail`, a data URL."""


def storage() -> gr.BrowserState:
    return gr.BrowserState([], storage_key=STORAGE_KEY, secret=STORAGE_SECRET)


def remember(entries: Sequence[Entry] | None, files: Sequence[str]) -> list[Entry]:
    """Put the images of the PNG files in front of the entries; an image that is there already moves."""
    new = [entry_of(Path(file)) for file in reversed(files)]
    seen = [_identity(entry) for entry in new]
    kept = [entry for entry in entries or [] if _identity(entry) not in seen]
    return [*new, *kept][:MAX_ENTRIES]


def entry_of(path: Path) -> Entry:
    with Image.open(path) as image:
        small = image.convert("RGB").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=80)
    return of_recipe(read_recipe(path)) | {
        "thumbnail": _PREFIX + base64.b64encode(buffer.getvalue()).decode()
    }


def _identity(entry: Entry) -> Entry:
    return {name: value for name, value in entry.items() if name != "thumbnail"}


def thumbnails(entries: Sequence[Entry] | None) -> list[tuple[Image.Image, str]]:
    """Return each entry's thumbnail with its prompt and seed."""
    return [
        (_open(entry["thumbnail"]), f"{entry['prompt']} · seed {entry['seed']}") for entry in entries or []
    ]


def _open(thumbnail: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(thumbnail.removeprefix(_PREFIX))), formats=["WEBP"])
