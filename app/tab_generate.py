"""The tab that turns text into images."""

from __future__ import annotations

import gradio as gr

from . import components
from .actions import Actions
from .components import HIDDEN, MAX_IMAGES, QUEUED

PROMPTS = (
    "a dog runs on the grass",
    "a man on a snowboard jumps in the snow",
    "two children play in the water",
    "a mountain under a blue sky",
)
MAX_CANDIDATES = 16


def text_to_image(actions: Actions) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            prompt = gr.Textbox(
                label="Prompt",
                placeholder="a dog runs on the grass",
                lines=2,
                max_length=1000,
                autofocus=True,
            )
            with gr.Row():
                count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images")
                seed = components.seed()
            with gr.Row():
                run = gr.Button("Generate", variant="primary")
                stop = gr.Button("Stop", variant="stop")
            gr.Examples([[text] for text in PROMPTS], prompt, api_visibility="private")
            with gr.Accordion("Settings", open=False):
                sampling = components.sampling(actions.pipeline)
                best_of = gr.Slider(
                    1, MAX_CANDIDATES, 1, step=1, label="Best of",
                    info="Candidates per image; captioner and alignment choose one of them",
                )  # fmt: skip
                live = gr.Checkbox(
                    True,
                    label="Live preview",
                    info="Shows each image row by row while it is generated (only with best of 1)",
                )
        with gr.Column(scale=3):
            gallery = components.gallery("Images")
            with gr.Row():
                used = gr.Number(label="Seed used", precision=0, interactive=False)
                recipe = gr.Textbox(label="Recipe", lines=2, interactive=False, scale=3, buttons=["copy"])
            files = components.files()
    gr.on([run.click, prompt.submit], actions.start, queue=False, **HIDDEN).then(
        actions.generate,
        [prompt, count, seed, *sampling, best_of, live],
        [gallery, files, used, recipe],
        api_name="generate",
        show_progress_on=gallery,
        **QUEUED,
    )
    stop.click(actions.stop, queue=False, **HIDDEN)
