"""Components that several tabs of the page share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from tavq.generator.sampling import SamplingConfig
from tavq.pipeline import Pipeline

EXAMPLES = Path(__file__).resolve().parent / "examples"
MAX_IMAGES = 16
GALLERY_PX = 650  # two rows of two images
# One job at a time: two on one model would only slow each other down.
QUEUED: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def seed() -> gr.Number:
    return gr.Number(-1, label="Seed", info="-1: random", precision=0)


def sampling(pipeline: Pipeline) -> Sequence[Component]:
    """The sliders of `SamplingConfig`, in the order of the endpoints' arguments."""
    default = SamplingConfig()
    codes = pipeline.tokenizer.num_codes
    return (
        gr.Slider(
            0, 10, default.guidance_scale, step=0.1, label="Guidance scale", info="1 turns guidance off"
        ),
        gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature", info="0 takes the likeliest"),
        gr.Slider(0, codes, min(default.top_k, codes), step=1, label="Top-k", info="0 means all codes"),
        gr.Slider(0.01, 1, default.top_p, step=0.01, label="Top-p", info="1 means all codes"),
    )


def gallery(label: str) -> gr.Gallery:
    """A gallery of small images, enlarged without smoothing; its download button gives the file itself."""
    return gr.Gallery(
        label=label, show_label=False, columns=2, fit_columns=False, height=GALLERY_PX, object_fit="contain",
        format="png", interactive=False, elem_classes="pixels", buttons=["download", "fullscreen"],
    )  # fmt: skip


def files() -> gr.File:
    return gr.File(
        label="PNG files; each carries its recipe", file_count="multiple", interactive=False, height=160
    )


def image(caption: str, css_class: str = "") -> gr.Image:
    """An image that is a result. Its caption stands above it: a floating label would hide a part of it."""
    with gr.Column(min_width=200):
        gr.Markdown(caption)
        return gr.Image(
            label=caption, show_label=False, format="png", interactive=False, height=250,
            elem_classes=css_class, buttons=["download", "fullscreen"],
        )  # fmt: skip


def photo() -> gr.Image:
    """An upload that reaches the endpoint as a file, so that `load_image` converts it as everywhere else."""
    return gr.Image(
        label="Photo", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=300
    )


def photo_examples(photo: gr.Image) -> None:
    gr.Examples([[str(path)] for path in sorted(EXAMPLES.glob("*.jpg"))], photo, api_visibility="private")
