"""The page of the demo: three tabs of components, connected to the endpoints of `Actions`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from tavq.captioner.decoding import DecodingConfig
from tavq.generator.sampling import SamplingConfig
from tavq.pipeline import Pipeline

from .actions import BOX, LEFT, SHARE, TOP, Actions
from .views import SURE, UNSURE

EXAMPLES = Path(__file__).resolve().parent / "examples"
PROMPTS = (
    "a dog runs on the grass",
    "a man on a snowboard jumps in the snow",
    "two children play in the water",
    "a mountain under a blue sky",
)
MAX_IMAGES = 16
MAX_CANDIDATES = 16
MAX_BEAM = 10
UNSURE_BELOW = 0.3
GALLERY_PX = 650  # two rows of two images
CLEAN_EVERY_S = 3600
KEEP_FILES_S = 24 * 3600
# One job at a time: two on one model would only slow each other down.
QUEUED: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

THEME = gr.themes.Soft(
    primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=("system-ui", "sans-serif")
)
CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto}
.pixels img {
  image-rendering: pixelated; object-fit: contain !important; width: 100% !important; height: 100% !important;
}
"""


def build(pipeline: Pipeline, folder: Path) -> gr.Blocks:
    """Make the page.

    Args:
        pipeline: does the work.
        folder: that images are written to. It must lie in Gradio's temporary folder, or they are not served.
    """
    actions = Actions(pipeline, folder)
    with gr.Blocks(
        title="TA-VQ", analytics_enabled=False, delete_cache=(CLEAN_EVERY_S, KEEP_FILES_S)
    ) as page:
        gr.Markdown(_heading(pipeline))
        with gr.Tab("Text to image"):
            _text_to_image(actions)
        with gr.Tab("Image to text"):
            _image_to_text(actions)
        with gr.Tab("Reconstruction and completion"):
            _reconstruction(actions)
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


def _text_to_image(actions: Actions) -> None:
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
                seed = _seed()
            with gr.Row():
                run = gr.Button("Generate", variant="primary")
                stop = gr.Button("Stop", variant="stop")
            gr.Examples([[text] for text in PROMPTS], prompt, api_visibility="private")
            with gr.Accordion("Settings", open=False):
                sampling = _sampling(actions.pipeline)
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
            gallery = _gallery("Images")
            with gr.Row():
                used = gr.Number(label="Seed used", precision=0, interactive=False)
                recipe = gr.Textbox(label="Recipe", lines=2, interactive=False, scale=3, buttons=["copy"])
            files = _files()
    gr.on([run.click, prompt.submit], actions.start, queue=False, **HIDDEN).then(
        actions.generate,
        [prompt, count, seed, *sampling, best_of, live],
        [gallery, files, used, recipe],
        api_name="generate",
        show_progress_on=gallery,
        **QUEUED,
    )
    stop.click(actions.stop, queue=False, **HIDDEN)


def _image_to_text(actions: Actions) -> None:
    captioned = gr.State(None)
    chosen = gr.State(0)
    with gr.Row():
        with gr.Column(scale=2):
            photo = _photo()
            with gr.Row():
                beam = gr.Slider(1, MAX_BEAM, DecodingConfig().beam, step=1, label="Beam")
                n_best = gr.Slider(1, MAX_BEAM, 3, step=1, label="N-best", info="At most the beam")
            alignment = gr.Slider(
                0, 10, DecodingConfig().alignment, step=0.5, label="Alignment",
                info="Weight of the alignment score when captions are ranked; try 4",
            )  # fmt: skip
            unsure = gr.Slider(0, 1, UNSURE_BELOW, step=0.05, label="Unsure below this probability")
            run = gr.Button("Caption", variant="primary")
            _photo_examples(photo)
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


def _reconstruction(actions: Actions) -> None:
    h, w = actions.pipeline.tokenizer.grid_size
    size = actions.pipeline.tokenizer.image_size_px
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            photo = _photo()
            run = gr.Button("Reconstruct", variant="primary")
            _photo_examples(photo)
        with gr.Column(scale=5):
            with gr.Row():
                seen = _image(f"What the model sees: {size} x {size} px", "pixels")
                reconstruction = _image("Decoded from the tokens alone", "pixels")
                tokens = _image(f"The {h} x {w} tokens, one colour per code")
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
                seed = _seed()
            with gr.Accordion("Settings", open=False):
                sampling = _sampling(actions.pipeline)
            run = gr.Button("Complete", variant="primary")
        with gr.Column(scale=3):
            gallery = _gallery("Completions")
            used = gr.Number(label="Seed used", interactive=False)
            files = _files()
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


def _seed() -> gr.Number:
    return gr.Number(-1, label="Seed", info="-1: random", precision=0)


def _sampling(pipeline: Pipeline) -> Sequence[Component]:
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


def _gallery(label: str) -> gr.Gallery:
    """A gallery of small images, enlarged without smoothing; its download button gives the file itself."""
    return gr.Gallery(
        label=label, show_label=False, columns=2, fit_columns=False, height=GALLERY_PX, object_fit="contain",
        format="png", interactive=False, elem_classes="pixels", buttons=["download", "fullscreen"],
    )  # fmt: skip


def _files() -> gr.File:
    return gr.File(
        label="PNG files; each carries its recipe", file_count="multiple", interactive=False, height=160
    )


def _image(caption: str, css_class: str = "") -> gr.Image:
    """An image that is a result. Its caption stands above it: a floating label would hide a part of it."""
    with gr.Column(min_width=200):
        gr.Markdown(caption)
        return gr.Image(
            label=caption, show_label=False, format="png", interactive=False, height=250,
            elem_classes=css_class, buttons=["download", "fullscreen"],
        )  # fmt: skip


def _photo() -> gr.Image:
    """An upload that reaches the endpoint as a file, so that `load_image` converts it as everywhere else."""
    return gr.Image(
        label="Photo", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=300
    )


def _photo_examples(photo: gr.Image) -> None:
    gr.Examples([[str(path)] for path in sorted(EXAMPLES.glob("*.jpg"))], photo, api_visibility="private")
