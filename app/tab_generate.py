"""The tab that turns text into images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from tavq.pipeline import read_recipe, recipe_line

from . import components, history, settings
from .actions import Actions, readable_errors
from .components import HIDDEN, QUEUED
from .gallery import Drawn

GREETING_COLUMNS = 4


@dataclasses.dataclass(frozen=True)
class GenerateTab:
    """Components of this tab that the page connects to others."""

    draw: Any
    """Handler of the main button."""
    fields: Sequence[Component]
    """One for each of `settings.FIELDS`."""
    status: gr.HTML
    entries: gr.BrowserState
    history: gr.Gallery
    files: gr.State
    """Paths of the images that are complete."""
    selected: gr.State
    """Number of the image whose recipe is shown."""
    to_vary: gr.Button
    to_complete: gr.Button
    to_describe: gr.Button
    to_tokens: gr.Button


class Drawing:
    """What the buttons of this tab do.

    Args:
        actions: the endpoints.
        drawn: the images that greet.
    """

    def __init__(self, actions: Actions, drawn: Sequence[Drawn]):
        self.actions = actions
        self.drawn = drawn

    def draw(
        self,
        prompt: str,
        negative_prompt: str,
        num_images: int,
        seed: int,
        guidance_scale: float,
        temperature: float,
        top_k: int,
        top_p: float,
        best_of: int,
        live: bool,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio finds it by this default
    ) -> Iterator[list[Any]]:
        """Generate images; yield what `Actions.follow` does."""
        images = self.actions.generate(
            prompt, num_images, seed, guidance_scale, temperature, top_k, top_p, best_of, live,
            request, progress, negative_prompt,
        )  # fmt: skip
        yield from self.actions.follow(images, num_images, request)

    @staticmethod
    def show_recipe(files: Sequence[str], selected: int) -> tuple[str, str, gr.DownloadButton]:
        """Return the recipe of the selected image, its link's query, and its download."""
        if not files:
            return "", "", gr.DownloadButton(interactive=False)
        file = files[min(selected, len(files) - 1)]
        recipe = read_recipe(Path(file))
        query = settings.to_query(settings.of_recipe(recipe))
        return recipe_line(recipe), query, gr.DownloadButton(value=file, interactive=True)

    @staticmethod
    def reuse_seed(files: Sequence[str], selected: int) -> int:
        return read_recipe(Path(files[selected]))["seed"]

    def load_greeting(self, event: gr.SelectData) -> list[Any]:
        """Fill in the prompt and the settings of the image that was clicked."""
        recipe = self.drawn[event.index].recipe
        return self._filled_in(settings.of_recipe(recipe), _missing(settings.unlike_here(recipe)))

    def load_entry(self, entries: list[history.Entry], event: gr.SelectData) -> list[Any]:
        return self._filled_in(entries[event.index])

    def load_png(self, path: str | None) -> list[Any]:
        if path is None:
            return [gr.skip()] * (len(settings.FIELDS) + 1)
        try:
            with readable_errors():
                values, unknown = settings.of_png(path)
        except gr.Error as error:
            return [gr.skip()] * len(settings.FIELDS) + [components.failed(error)]
        return self._filled_in(values, _missing(unknown))

    def load_link(self, request: gr.Request) -> list[Any]:
        """Fill in what the link says behind its `?`."""
        return self._filled_in(settings.of_query(dict(request.query_params)))

    def _filled_in(self, values: dict[str, Any], notes: Sequence[str] = ()) -> list[Any]:
        taken, changes = settings.checked(values, self.actions.pipeline.tokenizer.num_codes)
        if not taken:
            return [gr.skip()] * (len(settings.FIELDS) + 1)
        line = "; ".join([f"Filled in: {', '.join(taken)}", *changes, *notes]) + "."
        return [*settings.updates(taken), components.told(line.replace("_", " "))]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a user fills in, and the buttons beside it."""

    prompt: gr.Textbox
    count: gr.Slider
    seed: gr.Number
    run: gr.Button
    stop: gr.Button
    negative: gr.Textbox
    sampling: Sequence[Any]
    best_of: gr.Slider
    live: gr.Checkbox
    png: gr.File

    @property
    def fields(self) -> list[Any]:
        """The components that a recipe fills in, in the order of `settings.FIELDS`."""
        return [self.prompt, self.negative, self.seed, *self.sampling, self.best_of]


@dataclasses.dataclass(frozen=True)
class Results:
    """What is shown of the images, and where they can be sent."""

    status: gr.HTML
    group: gr.Column
    gallery: gr.Gallery
    reuse: gr.Button
    to_vary: gr.Button
    to_complete: gr.Button
    to_describe: gr.Button
    to_tokens: gr.Button
    download: gr.DownloadButton
    recipe: gr.Textbox
    link: gr.Textbox
    all_files: gr.File
    greeting: gr.Gallery | None
    past: gr.Gallery
    clear: gr.Button


def text_to_image(page: gr.Blocks, actions: Actions, drawn: Sequence[Drawn]) -> GenerateTab:
    files = gr.State([])
    selected = gr.State(0)
    entries = history.storage()
    with gr.Row():
        with gr.Column(scale=2):
            inputs = _inputs(actions)
        with gr.Column(scale=3):
            results = _results(drawn)

    drawing = Drawing(actions, drawn)
    _connect_drawing(drawing, inputs, results, files, selected, entries)
    _connect_restoring(page, drawing, inputs, results, entries)
    return GenerateTab(
        drawing.draw, inputs.fields, results.status, entries, results.past, files, selected,
        results.to_vary, results.to_complete, results.to_describe, results.to_tokens,
    )  # fmt: skip


def _inputs(actions: Actions) -> Inputs:
    prompt = gr.Textbox(
        label="Prompt", placeholder="a dog runs on the grass", lines=2, autofocus=True,
        max_length=settings.MAX_PROMPT_LETTERS, elem_classes="enter-runs",
    )  # fmt: skip
    count, seed, run, stop = components.job("Generate")
    with gr.Accordion("Settings", open=False):
        negative = gr.Textbox(
            label="Negative prompt", info="What guidance leads away from",
            max_length=settings.MAX_PROMPT_LETTERS, elem_classes="enter-runs",
        )  # fmt: skip
        sampling = components.sampling(actions.pipeline)
        best_of = gr.Slider(
            1, settings.MAX_CANDIDATES, 1, step=1, label="Best of",
            info="Candidates per image; captioner and alignment choose one of them",
        )  # fmt: skip
        live = gr.Checkbox(
            True,
            label="Live preview",
            info="Shows each image row by row while it is generated (only with best of 1)",
        )
    png = gr.File(
        label="Drop a PNG to restore its settings",
        file_types=[".png"], height=140, elem_id="settings-png",
    )  # fmt: skip
    return Inputs(prompt, count, seed, run, stop, negative, sampling, best_of, live, png)


def _results(drawn: Sequence[Drawn]) -> Results:
    status = components.status()
    with gr.Column(visible=False) as group:
        gallery = components.gallery("Images")
        with gr.Row(elem_classes="send-to"):
            reuse = gr.Button("Reuse seed", size="sm", min_width=90)
            to_vary = gr.Button("Vary", size="sm", min_width=90)
            to_complete = gr.Button("Complete", size="sm", min_width=90)
            to_describe = gr.Button("Describe", size="sm", min_width=90)
            to_tokens = gr.Button("Tokens", size="sm", min_width=90)
            download = gr.DownloadButton("Download", size="sm", min_width=90)
        recipe = gr.Textbox(
            label="Recipe of the selected image", lines=2, interactive=False, buttons=["copy"]
        )
        link = gr.Textbox(label="Link to it", interactive=False, buttons=["copy"], max_lines=1)
        with gr.Accordion("All PNG files", open=False):
            all_files = components.files()
    greeting = None
    if drawn:
        gr.Markdown("#### Generated by these weights. Click one for its prompt and seed.")
        greeting = components.gallery(
            "Generated by these weights",
            value=[(str(one.path), one.title) for one in drawn],
            columns=GREETING_COLUMNS, allow_preview=False, buttons=[],
        )  # fmt: skip
    with gr.Accordion("History of this browser", open=False):
        past = components.gallery("History", columns=6, allow_preview=False, buttons=[], format="webp")
        clear = gr.Button("Forget all", size="sm")
    return Results(
        status, group, gallery, reuse, to_vary, to_complete, to_describe, to_tokens, download, recipe, link,
        all_files, greeting, past, clear,
    )  # fmt: skip


def _connect_drawing(
    drawing: Drawing, inputs: Inputs, results: Results, files: gr.State, selected: gr.State,
    entries: gr.BrowserState,
) -> None:  # fmt: skip
    """Connect the buttons that generate, stop, and choose among the images."""
    shown = [results.recipe, results.link, results.download]
    started = gr.on([inputs.run.click], drawing.actions.start, queue=False, **HIDDEN)
    drawing_event = started.then(
        drawing.draw,
        [
            inputs.prompt, inputs.negative, inputs.count, inputs.seed, *inputs.sampling, inputs.best_of,
            inputs.live,
        ],
        [results.group, results.gallery, results.all_files, files, results.status],
        api_visibility="private",
        show_progress_on=results.status,
        **QUEUED,
    )  # fmt: skip
    drawing_event.then(lambda: 0, None, selected, **HIDDEN).then(
        drawing.show_recipe, [files, selected], shown, **HIDDEN
    ).then(None, results.link, results.link, js=_ABSOLUTE_LINK)
    drawing_event.then(history.remember, [entries, files], entries, **HIDDEN)
    inputs.stop.click(drawing.actions.stop, queue=False, **HIDDEN)

    results.gallery.select(_selected_index, None, selected, **HIDDEN).then(
        drawing.show_recipe, [files, selected], shown, **HIDDEN
    ).then(None, results.link, results.link, js=_ABSOLUTE_LINK)
    results.reuse.click(drawing.reuse_seed, [files, selected], inputs.seed, **HIDDEN)


def _connect_restoring(
    page: gr.Blocks, drawing: Drawing, inputs: Inputs, results: Results, entries: gr.BrowserState
) -> None:
    """Connect what brings settings back: greeting, history, PNG files and links."""
    filled_in = [*inputs.fields, results.status]
    if results.greeting is not None:
        results.greeting.select(drawing.load_greeting, None, filled_in, **HIDDEN)
    results.past.select(drawing.load_entry, entries, filled_in, **HIDDEN)
    entries.change(history.thumbnails, entries, results.past, **HIDDEN)
    results.clear.click(lambda: [], None, entries, **HIDDEN)
    inputs.png.upload(drawing.load_png, inputs.png, filled_in, **HIDDEN).then(
        lambda: None, None, inputs.png, **HIDDEN
    )
    page.load(drawing.load_link, None, filled_in, **HIDDEN)
    page.load(history.thumbnails, entries, results.past, **HIDDEN)


# The address bar carries the link, too: a reload brings the settings back.
_ABSOLUTE_LINK = """(query) => {
  if (!query.startsWith("?")) return query;
  history.replaceState(null, "", query);
  return location.origin + location.pathname + query;
}"""


def _missing(names: Sequence[str]) -> list[str]:
    return [f"this page has no {name}" for name in names]


def _selected_index(event: gr.SelectData) -> int:
    return event.index
