"""The page of the demo: tabs of components, connected to the endpoints of `Actions`."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from tavq.pipeline import Pipeline

from .actions import Actions
from .api import add_endpoints, hide_others
from .guard import GuardedBlocks
from .limits import Limits
from .tab_complete import reconstruction
from .tab_describe import image_to_text
from .tab_generate import text_to_image

CLEAN_EVERY_S = 3600
KEEP_FILES_S = 24 * 3600


def build(pipeline: Pipeline, folder: Path, limits: Limits | None = None) -> GuardedBlocks:
    """Make the page.

    Args:
        pipeline: does the work.
        folder: that images are written to. It must lie in Gradio's temporary folder, or they are not served.
        limits: what clients, jobs and uploads may take.
    """
    actions = Actions(pipeline, folder)
    with GuardedBlocks(
        limits or Limits(),
        title="TA-VQ",
        analytics_enabled=False,
        delete_cache=(CLEAN_EVERY_S, KEEP_FILES_S),
    ) as page:
        add_endpoints(pipeline, folder)
        gr.Markdown(_heading(pipeline))
        with gr.Tab("Text to image"):
            text_to_image(actions)
        with gr.Tab("Image to text"):
            image_to_text(actions)
        with gr.Tab("Reconstruction and completion"):
            reconstruction(actions)
    hide_others(page)
    return page


def _heading(pipeline: Pipeline) -> str:
    tokenizer = pipeline.tokenizer
    h, w = tokenizer.grid_size
    size = tokenizer.decode_size_px
    return (
        "# TA-VQ: one vocabulary for images and text\n"
        f"An image is {h} x {w} tokens from a codebook of {tokenizer.num_codes} codes, which is aligned with "
        f"language. Images are decoded at {size} x {size} px.\n"
        f"Weights: `{pipeline.directory.name}`, on {pipeline.device}."
    )
