"""The tab that generates images like photos: one photo in other words, or two that are mixed.

It is there where the checkpoint has a lexicon (`tavq train lexicon`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from . import components
from .actions import Actions, open_photo, readable_errors
from .components import HIDDEN, QUEUED
from .settings import MAX_PROMPT_LETTERS

WORDS = 4  # few keep the gist, many the lay-out


class FromPhotos:
    """What the buttons of this tab do.

    Args:
        actions: the endpoints, whose `stop` ends the work of this tab, too.
    """

    def __init__(self, actions: Actions):
        self.actions = actions

    def draw(
        self,
        photo: str | None,
        second: str | None,
        image_words: int,
        prompt: str,
        num_images: int,
        seed: int,
        guidance_scale: float,
        temperature: float,
        top_k: int,
        top_p: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio finds it by this default
    ) -> Iterator[list[Any]]:
        """Generate images like the photos; yield what `Actions.follow` does."""

        def images() -> Iterator[Any]:
            with readable_errors():
                photos = [open_photo(one) for one in (photo, second) if one is not None]
                if not photos:
                    raise ValueError("no photo; upload one, or click an example")
            yield from self.actions.generate(
                prompt, num_images, seed, guidance_scale, temperature, top_k, top_p, 1, False,
                request, progress, images=photos, image_words=int(image_words),
            )  # fmt: skip

        yield from self.actions.follow(images(), num_images, request)


def images_from_photos(actions: Actions, drawn: Sequence[Path]) -> Any:
    """Build the tab, and return the handler of its main button."""
    most = actions.pipeline.lexicon.config.num_words
    from_photos = FromPhotos(actions)
    with gr.Row():
        with gr.Column(scale=2):
            photo = components.photo()
            with gr.Accordion("Mix with a second photo", open=False):
                second = components.photo("Second photo")
            words = gr.Slider(
                1, most, min(WORDS, most), step=1, label="Words for each photo",
                info="Few keep its gist, many its lay-out",
            )  # fmt: skip
            prompt = gr.Textbox(
                label="Prompt (may be empty)", placeholder="in the snow",
                max_length=MAX_PROMPT_LETTERS, elem_classes="enter-runs",
            )  # fmt: skip
            count, seed, run, stop = components.job("Generate like this")
            with gr.Accordion("Settings", open=False):
                sampling = components.sampling(actions.pipeline)
            components.photo_examples(photo, drawn)
        with gr.Column(scale=3):
            status = components.status()
            with gr.Column(visible=False) as results:
                gallery = components.gallery("Images like the photos")
                with gr.Accordion("All PNG files", open=False):
                    files = components.files()

    run.click(actions.start, queue=False, **HIDDEN).then(
        from_photos.draw,
        [photo, second, words, prompt, count, seed, *sampling],
        [results, gallery, files, gr.State([]), status],
        api_visibility="private",
        show_progress_on=status,
        **QUEUED,
    )
    stop.click(actions.stop, queue=False, **HIDDEN)
    return from_photos.draw
