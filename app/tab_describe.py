"""The tab that turns images into text: captions, words with their patches, maps of a text."""

from __future__ import annotations

import gradio as gr

from tavq.captioner.decoding import DecodingConfig

from . import components
from .actions import Actions
from .components import HIDDEN, QUEUED
from .views import SURE, UNSURE

MAX_BEAM = 10
UNSURE_BELOW = 0.3


def image_to_text(actions: Actions) -> None:
    captioned = gr.State(None)
    chosen = gr.State(0)
    with gr.Row():
        with gr.Column(scale=2):
            photo = components.photo()
            with gr.Row():
                beam = gr.Slider(1, MAX_BEAM, DecodingConfig().beam, step=1, label="Beam")
                n_best = gr.Slider(1, MAX_BEAM, 3, step=1, label="N-best", info="At most the beam")
            alignment = gr.Slider(
                0, 10, DecodingConfig().alignment, step=0.5, label="Alignment",
                info="Weight of the alignment score when captions are ranked; try 4",
            )  # fmt: skip
            unsure = gr.Slider(0, 1, UNSURE_BELOW, step=0.05, label="Unsure below this probability")
            run = gr.Button("Caption", variant="primary")
            components.photo_examples(photo)
        with gr.Column(scale=3):
            best = gr.Textbox(label="Caption", interactive=False, buttons=["copy"])
            ranking = gr.Dataframe(
                headers=["rank", "caption", "score"], datatype=["number", "str", "number"],
                column_widths=["12%", "70%", "18%"], type="array", interactive=False, wrap=True, buttons=[],
                label="All captions. Score: mean log-probability of the words, plus alignment. Click one.",
            )  # fmt: skip
            words = gr.HighlightedText(
                label="Words with their probability. Click one to see where the model looked.",
                color_map={SURE: "#99f6e4", UNSURE: "#fdba74"}, show_legend=True, show_inline_category=False,
            )  # fmt: skip
            gr.Markdown("Attention of each word to the image: red is much, yellow is little")
            patches = gr.Gallery(
                label="Patches", show_label=False, columns=4, height=420, object_fit="contain",
                format="png", interactive=False, buttons=["download", "fullscreen"],
            )  # fmt: skip
            text = gr.Textbox(
                label="Where does a text lie on the photo?", placeholder="a black dog jumps over a log",
                info="Shows the transport plan between codes and words, phrases, sentences",
                max_length=1000,
            )  # fmt: skip
            show = gr.Button("Show")
            maps = gr.Gallery(
                label="Maps", show_label=False, columns=4, height=420, object_fit="contain",
                format="png", interactive=False, buttons=["download", "fullscreen"],
            )  # fmt: skip
    run.click(
        actions.caption,
        [photo, beam, n_best, alignment, unsure],
        [best, ranking, words, patches, captioned, chosen],
        api_name="caption",
        **QUEUED,
    ).then(lambda caption: caption, best, text, **HIDDEN)
    gr.on([show.click, text.submit], actions.heatmaps, [photo, text], maps, api_name="heatmaps", **QUEUED)
    ranking.select(_selected_row, None, chosen, **HIDDEN).then(
        actions.words, [captioned, chosen, unsure], [words, patches], **HIDDEN
    )
    unsure.release(actions.words, [captioned, chosen, unsure], [words, patches], **HIDDEN)
    words.select(_gallery_at_word, None, patches, **HIDDEN)


def _selected_row(event: gr.SelectData) -> int:
    return event.index[0]


def _gallery_at_word(event: gr.SelectData) -> gr.Gallery:
    return gr.Gallery(selected_index=event.index)
