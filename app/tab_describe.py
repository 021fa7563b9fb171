"""The tab that turns images into text: captions, words with their patches, maps of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from tavq.captioner.decoding import DecodingConfig

from . import components
from .actions import Actions, Captioned
from .components import HIDDEN, QUEUED
from .settings import MAX_BEAM
from .views import SURE, UNSURE

UNSURE_BELOW = 0.3
GALLERY: dict[str, Any] = {"columns": 4}


@dataclasses.dataclass(frozen=True)
class DescribeTab:
    """Components of this tab that the page connects to others."""

    photo: gr.Image
    describe: Any
    """Handler: `inputs` -> `outputs`."""
    inputs: Sequence[Component]
    outputs: Sequence[Component]


class Describing:
    """What the buttons of this tab do; an error is a line of the status."""

    def __init__(self, actions: Actions):
        self.actions = actions

    def describe(
        self, photo: str | None, beam: int, n_best: int, alignment: float, unsure_below: float
    ) -> list[Any]:
        """Caption a photo: [best caption, its words, patches, all captions, captioned, chosen, status]."""
        try:
            best, ranking, words, patches, captioned, chosen = self.actions.caption(
                photo, beam, n_best, alignment, unsure_below
            )
        except gr.Error as error:
            return [gr.skip()] * 6 + [components.failed(error)]
        return [best, words, patches, ranking, captioned, chosen, ""]

    def locate(self, photo: str | None, text: str) -> list[Any]:
        """Return [maps of the words, phrases and sentences of a text, status]."""
        try:
            return [self.actions.heatmaps(photo, text), ""]
        except gr.Error as error:
            return [gr.skip(), components.failed(error)]


def image_to_text(actions: Actions, drawn: Sequence[Path]) -> DescribeTab:
    describing = Describing(actions)
    captioned: gr.State = gr.State(None)
    chosen = gr.State(0)
    with gr.Row():
        with gr.Column(scale=2):
            photo = components.photo()
            run = gr.Button("Describe", variant="primary", elem_classes="run")
            components.shortcuts()
            with gr.Accordion("Settings", open=False):
                beam = gr.Slider(1, MAX_BEAM, DecodingConfig().beam, step=1, label="Beam")
                n_best = gr.Slider(1, MAX_BEAM, 3, step=1, label="N-best", info="At most the beam")
                alignment = gr.Slider(
                    0, 10, DecodingConfig().alignment, step=0.5, label="Alignment",
                    info="Weight of the alignment score when captions are ranked; try 4",
                )  # fmt: skip
                unsure = gr.Slider(0, 1, UNSURE_BELOW, step=0.05, label="Unsure below this probability")
            components.photo_examples(photo, drawn)
        with gr.Column(scale=3):
            status = components.status()
            best = gr.Textbox(label="Caption", interactive=False, buttons=["copy"])
            words = gr.HighlightedText(
                label="Words with their probability. Click one to see where the model looked.",
                color_map={SURE: "#0f766e", UNSURE: "#b45309"}, show_legend=True, show_inline_category=False,
            )  # fmt: skip
            patches = components.gallery("Attention of each word: red is much, yellow is little", **GALLERY)
            ranking = gr.Dataframe(
                headers=["rank", "caption", "score"], datatype=["number", "str", "number"],
                column_widths=["14%", "64%", "22%"], type="array", interactive=False, wrap=True, buttons=[],
                elem_classes="ranking",
                label="All captions. Score: mean log-probability of the words, plus alignment. Click one.",
            )  # fmt: skip
    with gr.Row():
        with gr.Column(scale=2):
            text = gr.Textbox(
                label="Where does a text lie on the photo?", placeholder="a black dog jumps over a log",
                info="Shows the transport plan between codes and words, phrases, sentences",
                max_length=1000,
            )  # fmt: skip
            show = gr.Button("Show")
        with gr.Column(scale=3):
            maps = components.gallery("Maps of a text", **GALLERY)

    inputs = [photo, beam, n_best, alignment, unsure]
    outputs = [best, words, patches, ranking, captioned, chosen, status]
    run.click(
        describing.describe,
        inputs,
        outputs,
        api_visibility="private",
        show_progress_on=status,
        **QUEUED,
    ).then(lambda caption: caption, best, text, **HIDDEN)
    gr.on(
        [show.click, text.submit],
        describing.locate,
        [photo, text],
        [maps, status],
        api_visibility="private",
        show_progress_on=status,
        **QUEUED,
    )
    ranking.select(_selected_row, None, chosen, **HIDDEN).then(
        _words, [captioned, chosen, unsure], [words, patches], **HIDDEN
    )
    unsure.release(_words, [captioned, chosen, unsure], [words, patches], **HIDDEN)
    words.select(_gallery_at_word, None, patches, **HIDDEN)
    return DescribeTab(photo, describing.describe, inputs, outputs)


def _words(captioned: Captioned | None, chosen: int, unsure_below: float) -> tuple[Any, Any]:
    return Actions.words(captioned, chosen, unsure_below)


def _selected_row(event: gr.SelectData) -> int:
    return event.index[0]


def _gallery_at_word(event: gr.SelectData) -> gr.Gallery:
    return gr.Gallery(selected_index=event.index)
