"""Components that several tabs of the page share."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from tavq.generator.sampling import SamplingConfig
from tavq.pipeline import Pipeline

from .settings import LIMITS

EXAMPLES = Path(__file__).resolve().parent / "examples"
MAX_IMAGES = 16
# One job at a time: two on one model would only slow each other down.
QUEUED: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
STATUS = "status"
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def seed() -> gr.Number:
    return gr.Number(-1, label="Seed", info="-1: random", precision=0)


def job(label: str) -> tuple[gr.Slider, gr.Number, gr.Button, gr.Button]:
    """How many images and which seed, and the buttons that begin (with this label) and stop."""
    with gr.Row():
        count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images")
        first_seed = seed()
    with gr.Row():
        run = gr.Button(label, variant="primary", elem_classes="run")
        stop = gr.Button("Stop", variant="stop")
    shortcuts()
    return count, first_seed, run, stop


def sampling(pipeline: Pipeline) -> Sequence[Component]:
    """The sliders of `SamplingConfig`, in the order of the endpoints' arguments."""
    default = SamplingConfig()
    codes = pipeline.tokenizer.num_codes
    return (
        gr.Slider(
            *LIMITS["guidance_scale"], default.guidance_scale, step=0.1,
            label="Guidance scale", info="1 turns guidance off",
        ),
        gr.Slider(
            *LIMITS["temperature"], default.temperature, step=0.05,
            label="Temperature", info="0 takes the likeliest",
        ),
        gr.Slider(0, codes, min(default.top_k, codes), step=1, label="Top-k", info="0 means all codes"),
        gr.Slider(*LIMITS["top_p"], default.top_p, step=0.01, label="Top-p", info="1 means all codes"),
    )  # fmt: skip


def gallery(label: str, **options: Any) -> gr.Gallery:
    """A gallery of generated images; its download button gives the file itself."""
    # On a phone the fourth column would lie outside of the page.
    many = options.get("columns", 2) > 2
    defaults: dict[str, Any] = {
        "columns": 2,
        "fit_columns": False,
        "object_fit": "contain",
        "format": "png",
        "interactive": False,
        "elem_classes": ["results", "many"] if many else ["results"],
        "buttons": ["download", "fullscreen"],
    }
    return gr.Gallery(label=label, show_label=False, **(defaults | options))


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


def comparison(caption: str) -> gr.ImageSlider:
    """Two images over each other, with a line to move between them."""
    return gr.ImageSlider(
        label=caption, type="pil", format="png", interactive=False, max_height=520, buttons=["fullscreen"]
    )


def photo(label: str = "Photo") -> gr.Image:
    """An upload that reaches the endpoint as a file, so that `load_image` converts it as everywhere else."""
    return gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=300
    )


def photo_examples(photo: Component, drawn: Sequence[Path]) -> None:
    """Images to click: those that these weights generated, and the photographs of `EXAMPLES`."""
    label = "Generated images, and photographs of what the model has not learnt" if drawn else "Photographs"
    paths = [*drawn, *sorted(EXAMPLES.glob("*.jpg"))]
    gr.Examples(
        [[str(path)] for path in paths], photo, examples_per_page=len(paths), api_visibility="private",
        label=label,
    )  # fmt: skip


def status() -> gr.HTML:
    """A line that screen readers read out when it changes; see `told` and `failed`."""
    return gr.HTML(
        "", html_template='<div role="status" aria-live="polite">${value}</div>', elem_classes=STATUS
    )


def told(line: str) -> str:
    """Write a line for `status`."""
    return f"<p>{html.escape(line)}</p>"


def failed(error: gr.Error | str) -> str:
    """Write an error for `status`: it stays there until the next job, and covers no image."""
    reason = error if isinstance(error, str) else str(error.message)
    return f'<p class="error">{html.escape(reason)}</p>'


def only_failed(outputs: Sequence[Any], reason: str) -> list[Any] | None:
    """Return what a handler with these outputs returns to show an error and change nothing else.

    None where its last output is no `status`. Gradio's own message would cover what is there.
    """
    if not outputs or STATUS not in (getattr(outputs[-1], "elem_classes", None) or []):
        return None
    return [gr.skip()] * (len(outputs) - 1) + [failed(reason)]


def shortcuts() -> None:
    gr.HTML('<p class="shortcuts"><kbd>Enter</kbd> or <kbd>Ctrl</kbd>+<kbd>Enter</kbd> runs this tab.</p>')
