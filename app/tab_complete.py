"""The tab that generates parts of a photo anew: painted, preset, around it, or random tokens of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from . import components
from .actions import Actions, readable_errors, sampling_settings
from .completing import AROUND, PAINTED, PARTS, SOME, completions, task_of
from .components import HIDDEN, QUEUED
from .settings import MAX_PROMPT_LETTERS

# The editor draws by WebGL, and shows nothing at all without it.
TELL_IF_NO_WEBGL = """
if (!document.createElement("canvas").getContext("webgl")) {
  element.innerHTML = "<p role='alert'><b>This browser has no WebGL, which this tab needs. Turn on " +
    "hardware acceleration in its settings, or use another browser.</b></p>";
}
"""
BRUSH = gr.Brush(default_size=24, colors=["#e11d48"], color_mode="fixed")


@dataclasses.dataclass(frozen=True)
class CompleteTab:
    """Components of this tab that the page connects to others."""

    editor: gr.ImageEditor
    part: gr.Radio
    prompt: gr.Textbox
    complete: Any
    """Handler of the main button."""
    vary: Any
    """Handler: paths, number of the selected one, then `settings` -> `outputs`."""
    settings: Sequence[Component]
    outputs: Sequence[Component]


class Completing:
    """What the buttons of this tab do.

    Args:
        actions: the endpoints, whose `stop` ends the work of this tab, too.
    """

    def __init__(self, actions: Actions):
        self.actions = actions

    def complete(
        self,
        edited: dict[str, Any] | None,
        part: str,
        outpaint: float,
        kept: float,
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
        """Generate the part anew; yield [results' group, gallery, files, comparison, photo, status].

        `outpaint` and `kept` are in percent. An error is a line of the status.
        """
        files: list[str] = []
        shown = gr.Column(visible=True)
        if self.actions.is_stopped(request):
            yield [gr.skip()] * 5 + [components.told("Stopped before it began.")]
            return
        try:
            with readable_errors():
                layers = (edited or {}).get("layers", [])
                task = task_of(part, (edited or {}).get("background"), layers, outpaint)
                settings = sampling_settings(guidance_scale, temperature, top_k, top_p)
                first = self.actions.used_seed(seed)
                self.actions.check(prompt)
                progress((0, num_images), unit="images")

                seeds = range(first, first + int(num_images))
                for generated in completions(self.actions.pipeline, task, prompt, seeds, settings, kept):
                    files.append(self.actions.save(generated))
                    progress((len(files), num_images), unit="images")
                    gallery = [(file, f"seed {first + number}") for number, file in enumerate(files)]
                    line = components.told(f"{len(files)} of {num_images} images")
                    pair = gr.skip() if len(files) > 1 else (task.photo, generated.image)
                    yield [shown, gallery, list(files), pair, task.photo, line]
                    shown = gr.skip()
                    if self.actions.is_stopped(request):
                        break
        except gr.Error as error:
            yield [gr.skip()] * 5 + [components.failed(error)]
            return
        if len(files) < num_images:
            yield [gr.skip()] * 5 + [components.told(f"Stopped after {len(files)} of {num_images} images.")]

    def vary(
        self,
        paths: Sequence[str],
        selected: int,
        outpaint: float,
        kept: float,
        prompt: str,
        num_images: int,
        seed: int,
        guidance_scale: float,
        temperature: float,
        top_k: int,
        top_p: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[list[Any]]:
        """Vary an image of another tab, as `complete` does."""
        with Image.open(paths[selected]) as image:
            edited = {"background": image.convert("RGB"), "layers": []}
        yield from self.complete(
            edited, SOME, outpaint, kept, prompt, num_images, seed, guidance_scale, temperature, top_k, top_p,
            request, progress,
        )  # fmt: skip

    @staticmethod
    def compare(photo: Image.Image, files: Sequence[str], event: gr.SelectData) -> tuple[Any, Any]:
        """Show the photo beside the image that was clicked."""
        with Image.open(files[event.index]) as image:
            return photo, image.convert("RGB")


def completion(actions: Actions, drawn: Sequence[Path]) -> CompleteTab:
    completing = Completing(actions)
    files = gr.State([])
    photo: gr.State = gr.State(None)
    with gr.Row():
        with gr.Column(scale=2):
            gr.HTML("", js_on_load=TELL_IF_NO_WEBGL)
            editor = gr.ImageEditor(
                label="Paint what shall change", type="pil", format="png", brush=BRUSH,
                layers=False, transforms=(), sources=("upload", "clipboard"), height=420, buttons=[],
            )  # fmt: skip
            part = gr.Radio([*PARTS], value=PAINTED, label="What is generated anew")
            outpaint = gr.Slider(
                20, 90, 60, step=5, label="Size of the photo in the larger image, %", visible=False
            )
            kept = gr.Slider(5, 95, 30, step=5, label="Tokens that stay, %", visible=False)
            prompt = gr.Textbox(
                label="Prompt for the whole image", max_length=MAX_PROMPT_LETTERS, elem_classes="enter-runs"
            )
            count, seed, run, stop = components.job("Complete")
            with gr.Accordion("Settings", open=False):
                sampling = components.sampling(actions.pipeline)
            components.photo_examples(editor, drawn)
        with gr.Column(scale=3):
            status = components.status()
            with gr.Column(visible=False) as results:
                comparison = components.comparison("Photo and result")
                gallery = components.gallery("Completions", columns=4)
                with gr.Accordion("All PNG files", open=False):
                    all_files = components.files()

    part.change(lambda chosen: gr.Slider(visible=chosen == AROUND), part, outpaint, **HIDDEN)
    part.change(lambda chosen: gr.Slider(visible=chosen == SOME), part, kept, **HIDDEN)
    outputs = [results, gallery, files, comparison, photo, status]
    settings = [outpaint, kept, prompt, count, seed, *sampling]
    run.click(actions.start, queue=False, **HIDDEN).then(
        completing.complete,
        [editor, part, *settings],
        outputs,
        api_visibility="private",
        show_progress_on=status,
        **QUEUED,
    )
    stop.click(actions.stop, queue=False, **HIDDEN)
    files.change(lambda paths: paths, files, all_files, **HIDDEN)
    gallery.select(completing.compare, [photo, files], comparison, **HIDDEN)
    return CompleteTab(editor, part, prompt, completing.complete, completing.vary, settings, outputs)
