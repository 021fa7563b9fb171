"""The tab that reconstructs an image from its tokens, and generates parts of it anew."""

from __future__ import annotations

import gradio as gr

from . import components
from .actions import BOX, LEFT, SHARE, TOP, Actions
from .components import HIDDEN, MAX_IMAGES, QUEUED


def reconstruction(actions: Actions) -> None:
    h, w = actions.pipeline.tokenizer.grid_size
    size = actions.pipeline.tokenizer.image_size_px
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            photo = components.photo()
            run = gr.Button("Reconstruct", variant="primary")
            components.photo_examples(photo)
        with gr.Column(scale=5):
            with gr.Row():
                seen = components.image(f"What the model sees: {size} x {size} px", "pixels")
                reconstruction = components.image("Decoded from the tokens alone", "pixels")
                tokens = components.image(f"The {h} x {w} tokens, one colour per code")
            with gr.Accordion("The ids as numbers", open=False):
                ids = gr.JSON(show_label=False)
    outputs = [seen, reconstruction, tokens, ids]
    run.click(actions.reconstruct, photo, outputs, api_name="reconstruct", **QUEUED)
    gr.Markdown("### Completion and variations: a part of the photo stays, the rest is generated")
    _completion(actions, photo)


def _completion(actions: Actions, photo: gr.Image) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            prompt = gr.Textbox(label="Prompt for the whole image", max_length=1000)
            keep = gr.Radio([TOP, LEFT, BOX, SHARE], value=TOP, label="What stays")
            with gr.Group(visible=False) as box_group:
                box = [
                    gr.Slider(0, 100, share, step=1, label=f"Box: {side}, % of the photo")
                    for side, share in (("left", 25), ("top", 25), ("width", 50), ("height", 50))
                ]
            share = gr.Slider(5, 95, 30, step=5, label="Tokens that stay, %", visible=False)
            with gr.Row():
                count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images")
                seed = components.seed()
            with gr.Accordion("Settings", open=False):
                sampling = components.sampling(actions.pipeline)
            run = gr.Button("Complete", variant="primary")
        with gr.Column(scale=3):
            gallery = components.gallery("Completions")
            used = gr.Number(label="Seed used", interactive=False)
            files = components.files()
    keep.change(lambda kept: gr.Group(visible=kept == BOX), keep, box_group, **HIDDEN)
    keep.change(lambda kept: gr.Slider(visible=kept == SHARE), keep, share, **HIDDEN)
    run.click(
        actions.complete,
        [photo, prompt, keep, *box, share, count, seed, *sampling],
        [gallery, files, used],
        api_name="complete",
        show_progress_on=gallery,
        **QUEUED,
    )
