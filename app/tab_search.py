"""The tab that searches a folder of photos by words, a photo, or both; there with `tavq demo --index`."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from tavq.data.images import UnreadableImageError, load_image
from tavq.photo_index import PhotoIndex

from . import components
from .actions import Actions, open_photo, readable_errors
from .components import QUEUED
from .settings import MAX_PROMPT_LETTERS

THUMBNAIL_PX = 320
MAX_FOUND = 60


class Searching:
    """What the button of this tab does.

    Args:
        actions: of the page, whose pipeline has the text encoder.
        index: of the photos.
    """

    def __init__(self, actions: Actions, index: PhotoIndex):
        self.actions = actions
        self.index = index

    def find(self, words: str, like: str | None, top: int) -> list[Any]:
        """Return [thumbnails of the photos found with their names, status]; an error is a line of it."""
        try:
            with readable_errors():
                photo = None if like is None else open_photo(like)
                encoder = self.actions.pipeline.alignment_encoder
                hits = self.index.search(encoder.encode, words, photo, int(top))
        except gr.Error as error:
            return [gr.skip(), components.failed(error)]
        found = [(image, hit.path.name) for hit in hits if (image := _thumbnail(hit.path)) is not None]
        gone = len(hits) - len(found)
        line = f"{len(found)} photos, best first."
        return [found, components.told(f"{line} {gone} more cannot be read any more." if gone else line)]


def search_photos(actions: Actions, index: PhotoIndex) -> None:
    """Build the tab."""
    searching = Searching(actions, index)
    with gr.Row():
        with gr.Column(scale=2):
            words = gr.Textbox(
                label="What the photos show", placeholder="a dog on the beach",
                max_length=MAX_PROMPT_LETTERS, elem_classes="enter-runs",
            )  # fmt: skip
            like = components.photo("A photo that they look like (may be empty)")
            top = gr.Slider(1, MAX_FOUND, 12, step=1, label="Photos")
            run = gr.Button("Search", variant="primary", elem_classes="run")
            components.shortcuts()
        with gr.Column(scale=3):
            status = components.status()
            found = components.gallery("Photos found", columns=4, format="webp")

    run.click(
        searching.find,
        [words, like, top],
        [found, status],
        api_visibility="private",
        show_progress_on=status,
        **QUEUED,
    )


def _thumbnail(path: Any) -> Image.Image | None:
    """The photo, shrunk; None where it was deleted or damaged since the index was made."""
    try:
        image = load_image(path)
    except (FileNotFoundError, UnreadableImageError):
        return None
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return image
