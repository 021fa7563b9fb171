"""The page of the demo: its tabs, and the buttons that lead from one to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from tavq.base.weights import WEIGHTS_FILE
from tavq.photo_index import PhotoIndex
from tavq.pipeline import Pipeline

from .actions import Actions
from .api import add_endpoints, hide_others
from .completing import SOME
from .components import HIDDEN, QUEUED
from .gallery import greeting
from .guard import GuardedBlocks
from .limits import Limits
from .tab_about import how_it_works
from .tab_complete import CompleteTab, completion
from .tab_describe import DescribeTab, image_to_text
from .tab_generate import GenerateTab, text_to_image
from .tab_photos import images_from_photos
from .tab_search import search_photos
from .tab_tokens import TokensTab, tokens

CLEAN_EVERY_S = 3600
KEEP_FILES_S = 24 * 3600
GENERATE = "generate"
DESCRIBE = "describe"
COMPLETE = "complete"
TOKENS = "tokens"
AFTER_SENDING: dict[str, Any] = {**QUEUED, "api_visibility": "private", "show_progress": "minimal"}
LEARNT = {
    "flickr8k": "Trained on 6,000 photos of people and dogs outdoors; other subjects come out poorly.",
}
"""What the shipped weights can draw, by the name of their directory."""


def build(
    pipeline: Pipeline, folder: Path, limits: Limits | None = None, index: PhotoIndex | None = None
) -> GuardedBlocks:
    """Make the page.

    Args:
        pipeline: does the work.
        folder: that images are written to. It must lie in Gradio's temporary folder, or they are not served.
        limits: what clients, jobs and uploads may take.
        index: photos that everybody who sees the page may search; None leaves the tab out.
    """
    drawn = greeting(pipeline)
    paths = [one.path for one in drawn]
    with GuardedBlocks(
        limits or Limits(),
        title="TA-VQ",
        analytics_enabled=False,
        delete_cache=(CLEAN_EVERY_S, KEEP_FILES_S),
    ) as page:
        actions = Actions(pipeline, folder, page.stop_waiting)
        add_endpoints(pipeline, folder)
        gr.Markdown(_heading(pipeline))
        with gr.Tabs() as tabs:
            with gr.Tab("Text to image", id=GENERATE):
                generate = text_to_image(page, actions, drawn)
            with gr.Tab("Image to text", id=DESCRIBE):
                describe = image_to_text(actions, paths)
            with gr.Tab("Complete", id=COMPLETE):
                complete = completion(actions, paths)
            with gr.Tab("Tokens", id=TOKENS):
                play = tokens(actions, paths)
            page.stoppable = [generate.draw, complete.complete, complete.vary]
            if (pipeline.directory / "lexicon" / WEIGHTS_FILE).is_file():
                with gr.Tab("From photos", id="photos"):
                    page.stoppable.append(images_from_photos(actions, paths))
            if index is not None:
                with gr.Tab("Search", id="search"):
                    search_photos(actions, index)
            with gr.Tab("How it works", id="about"):
                how_it_works(pipeline)
        _send_to(actions, tabs, generate, describe, complete, play)
        smooth = gr.Checkbox(False, label="Show pixels instead of smoothing enlarged images")
        smooth.change(None, smooth, None, js='(on) => { document.body.classList.toggle("pixelated", on); }')
    hide_others(page)
    return page


def _send_to(
    actions: Actions,
    tabs: gr.Tabs,
    generate: GenerateTab,
    describe: DescribeTab,
    complete: CompleteTab,
    play: TokensTab,
) -> None:
    """Connect the buttons under a generated image to the tabs that take it."""
    chosen = [generate.files, generate.selected]
    prompt = generate.fields[0]

    def to(tab: str):
        return lambda files, selected: (gr.Tabs(selected=tab), files[selected])

    generate.to_describe.click(to(DESCRIBE), chosen, [tabs, describe.photo], **HIDDEN).then(
        describe.describe, describe.inputs, describe.outputs, **AFTER_SENDING
    )
    generate.to_tokens.click(to(TOKENS), chosen, [tabs, play.photo], **HIDDEN).then(
        play.read, play.photo, play.outputs, **AFTER_SENDING
    ).then(play.explain, play.board, play.explained, **AFTER_SENDING)

    to_complete = [tabs, complete.editor]
    generate.to_complete.click(to(COMPLETE), chosen, to_complete, **HIDDEN).then(
        lambda text: text, prompt, complete.prompt, **HIDDEN
    )
    generate.to_vary.click(actions.start, queue=False, **HIDDEN).then(
        to(COMPLETE), chosen, to_complete, **HIDDEN
    ).then(lambda text: (text, SOME), prompt, [complete.prompt, complete.part], **HIDDEN).then(
        complete.vary, [*chosen, *complete.settings], complete.outputs, **AFTER_SENDING
    )


def _heading(pipeline: Pipeline) -> str:
    tokenizer = pipeline.tokenizer
    h, w = tokenizer.grid_size
    size = tokenizer.decode_size_px
    name = pipeline.directory.name
    return (
        "# TA-VQ: one vocabulary for images and text\n"
        f"{LEARNT.get(name, '')}\n"
        f"An image is {h} x {w} tokens from a codebook of {tokenizer.num_codes:,} codes, which is aligned "
        f"with language. Images are decoded at {size} x {size} px. Weights: `{name}`, on {pipeline.device}."
    )
