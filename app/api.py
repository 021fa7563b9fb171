"""The endpoints for programs: stable names, apart from the page, whose components may change.

Each endpoint is a function below. Components that nobody sees describe its arguments and results: from them,
Gradio derives types, bounds and names, for `gradio_client`, for HTTP and for assistants (MCP).
docs/api.md shows how to call them.
"""

from __future__ import annotations

import inspect
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from tavq.base.seeding import image_seeds
from tavq.captioner.decoding import DecodingConfig
from tavq.commands.complete import completion_mask
from tavq.generator.sampling import SamplingConfig
from tavq.pipeline import Generated, Pipeline

from . import metrics
from .actions import open_photo, readable_errors, sampling_settings
from .jobs import MODEL, SLOTS

MAX_IMAGES = 16
MAX_CANDIDATES = 16
MAX_BEAM = 10
MAX_SEED = 2**31 - 1
KINDS = {1: "word", 2: "phrase", 3: "sentence"}

Images = tuple[list[str], list[dict[str, Any]]]
"""Files of images, and the recipe of each."""


class Endpoints:
    """What programs may ask for.

    Args:
        pipeline: does the work.
        folder: that images are written to; files are served from there.
    """

    def __init__(self, pipeline: Pipeline, folder: Path):
        self.pipeline = pipeline
        self.folder = folder

    def generate(
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
    ) -> Iterator[Images]:
        """Generate images from text. The result grows image by image.

        Args:
            prompt: what the image shows, in English.
            negative_prompt: what the images shall not show; guidance leads away from it.
            num_images: how many images.
            seed: seed of the first image, the next ones count up; -1 takes a random one.
            guidance_scale: how closely the image follows the prompt; 1 turns guidance off.
            temperature: randomness; 0 takes the likeliest code each time.
            top_k: sample among this many likeliest codes; 0 means all.
            top_p: sample among the fewest likeliest codes that hold this much probability.
            best_of: candidates per image, of which the best is returned.
        """
        with readable_errors():
            settings = sampling_settings(guidance_scale, temperature, top_k, top_p)
            self._check(prompt)
            yield from self._collected(
                self.pipeline.generate_each(
                    prompt,
                    image_seeds(seed, num_images),
                    settings,
                    negative_prompt=negative_prompt,
                    best_of=best_of,
                )
            )

    def draw(self, prompt: str, seed: int) -> str:
        """Draw one image from text. Its file name tells the seed. Assistants show a result that is one image.

        Args:
            prompt: what the image shows, in English, such as "a dog runs on the grass".
            seed: the same seed draws the same image again; -1 takes a random one.
        """
        with readable_errors():
            self._check(prompt)
            return self._save(self.pipeline.generate(prompt, seed)[0])

    def caption(self, image: str, beam: int, n_best: int, alignment: float) -> list[dict[str, Any]]:
        """Describe an image. Return captions, best first, each with text, score and its words' probabilities.

        Args:
            image: the image file.
            beam: width of the beam search.
            n_best: how many captions, at most the beam.
            alignment: weight of the alignment of image and caption when captions are ranked; 0 turns it off.
        """
        with readable_errors():
            photo = _open(image)
            settings = DecodingConfig(beam=beam, n_best=n_best, alignment=alignment)
            return self.pipeline.caption(photo, settings)[0].to_json()

    def heatmaps(self, image: str, text: str) -> list[dict[str, Any]]:
        """Find where each word, phrase and sentence of a text lies on an image.

        Return for each its text, its kind, and a map over the token grid that sums to 1.

        Args:
            image: the image file.
            text: a description of the image.
        """
        with readable_errors():
            maps = self.pipeline.heatmaps(_open(image), text)
            return [{"text": m.unit, "kind": KINDS[m.kind], "map": m.map.tolist()} for m in maps]

    def reconstruct(self, image: str) -> tuple[str, list[list[int]]]:
        """Encode an image as tokens and decode it again. Return the decoded image and the grid of token ids.

        Args:
            image: the image file.
        """
        with readable_errors():
            reconstruction = self.pipeline.reconstruct([_open(image)])[0]
            path = self.folder / f"reconstruction-{uuid.uuid4().hex[:8]}.png"
            reconstruction.image.save(path)
            return str(path), reconstruction.ids.tolist()

    def complete(
        self,
        image: str,
        prompt: str,
        keep: str,
        negative_prompt: str,
        num_images: int,
        seed: int,
        guidance_scale: float,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> Iterator[Images]:
        """Keep a part of an image and generate the rest. The result grows image by image.

        Args:
            image: the image file.
            prompt: text for the whole image.
            keep: what stays, top, bottom, left, right or box=x,y,w,h in pixels of the image.
            negative_prompt: what the images shall not show; guidance leads away from it.
            num_images: how many images.
            seed: seed of the first image, the next ones count up; -1 takes a random one.
            guidance_scale: how closely the image follows the prompt; 1 turns guidance off.
            temperature: randomness; 0 takes the likeliest code each time.
            top_k: sample among this many likeliest codes; 0 means all.
            top_p: sample among the fewest likeliest codes that hold this much probability.
        """
        with readable_errors():
            photo = _open(image)
            settings = sampling_settings(guidance_scale, temperature, top_k, top_p)
            mask = _mask(keep, *photo.size)
            self._check(prompt)
            yield from self._collected(
                self.pipeline.complete(photo, mask, prompt, one, settings, negative_prompt=negative_prompt)[0]
                for one in image_seeds(seed, num_images)
            )

    def vary(
        self,
        image: str,
        prompt: str,
        share: float,
        negative_prompt: str,
        num_images: int,
        seed: int,
        guidance_scale: float,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> Iterator[Images]:
        """Generate variations: a random share of the image's tokens stays. The result grows image by image.

        Args:
            image: the image file.
            prompt: text for the variations.
            share: share of the tokens that stay, above 0 and below 1.
            negative_prompt: what the images shall not show; guidance leads away from it.
            num_images: how many images.
            seed: seed of the first image, the next ones count up; -1 takes a random one.
            guidance_scale: how closely the image follows the prompt; 1 turns guidance off.
            temperature: randomness; 0 takes the likeliest code each time.
            top_k: sample among this many likeliest codes; 0 means all.
            top_p: sample among the fewest likeliest codes that hold this much probability.
        """
        with readable_errors():
            photo = _open(image)
            settings = sampling_settings(guidance_scale, temperature, top_k, top_p)
            self._check(prompt)
            yield from self._collected(
                self.pipeline.vary(photo, share, prompt, one, settings, negative_prompt=negative_prompt)[0]
                for one in image_seeds(seed, num_images)
            )

    def _collected(self, images: Iterator[Generated]) -> Iterator[Images]:
        """Write each image, and yield the files and recipes of all so far."""
        files: list[str] = []
        recipes: list[dict[str, Any]] = []
        for generated in images:
            files.append(self._save(generated))
            recipes.append(generated.recipe)
            yield files, recipes

    def _check(self, prompt: str) -> None:
        """Refuse an empty prompt; warn the client where one is longer than the generator takes."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.pipeline.text_states([prompt or ""])
        for warning in caught:
            gr.Warning(str(warning.message))

    def _save(self, generated: Generated) -> str:
        path = self.folder / f"seed-{generated.recipe['seed']}-{uuid.uuid4().hex[:8]}.png"
        generated.save(path)
        metrics.IMAGES.inc()
        return str(path)


def _open(image: str | None) -> Image.Image:
    return open_photo(image, "image is null, expected an uploaded file")


def _mask(keep: str | None, width: int, height: int) -> Any:
    try:
        return completion_mask(keep or "", width, height)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("--")) from error


def add_endpoints(pipeline: Pipeline, folder: Path) -> None:
    """Add the endpoints to the page that is being built.

    Call it before anything else is added: of two endpoints with one name, Gradio renames the later.
    """
    endpoints = Endpoints(pipeline, folder)
    results: dict[Callable[..., Any], Callable[[], list[Component]]] = {
        endpoints.generate: _images_and_recipes,
        endpoints.draw: lambda: [_image()],
        endpoints.caption: lambda: [gr.JSON(label="captions")],
        endpoints.heatmaps: lambda: [gr.JSON(label="maps")],
        endpoints.reconstruct: lambda: [_image(), gr.JSON(label="ids")],
        endpoints.complete: _images_and_recipes,
        endpoints.vary: _images_and_recipes,
    }
    with gr.Column(visible=False):
        for function, outputs in results.items():
            arguments = inspect.signature(function).parameters
            gr.Button().click(
                function,
                [_argument(name, pipeline.tokenizer.num_codes) for name in arguments],
                outputs(),
                api_name=function.__name__,
                concurrency_id=MODEL,
                concurrency_limit=SLOTS,
                show_progress="hidden",
            )


def hide_others(page: gr.Blocks) -> None:
    """Take the page's own endpoints, whose arguments follow its components, out of the API."""
    for block_fn in page.fns.values():
        if not isinstance(getattr(block_fn.fn, "__self__", None), Endpoints):
            block_fn.api_visibility = "private"


def _argument(name: str, num_codes: int) -> Component:
    """Make the component that gives an argument its type, bounds and default."""
    sampling = SamplingConfig()
    decoding = DecodingConfig()
    match name:
        case "image":
            return gr.Image(label=name, type="filepath", image_mode=None)
        case "prompt" | "text":
            return gr.Textbox(label=name)
        case "negative_prompt":
            return gr.Textbox("", label=name)
        case "keep":
            return gr.Textbox("top", label=name)
        case "seed":
            return gr.Number(-1, label=name, precision=0, minimum=-1, maximum=MAX_SEED)
        case "num_images":
            return gr.Slider(1, MAX_IMAGES, 1, step=1, precision=0, label=name)
        case "best_of":
            return gr.Slider(1, MAX_CANDIDATES, 1, step=1, precision=0, label=name)
        case "guidance_scale":
            return gr.Slider(0, 20, sampling.guidance_scale, step=0.1, label=name)
        case "temperature":
            return gr.Slider(0, 10, sampling.temperature, step=0.05, label=name)
        case "top_k":
            return gr.Slider(0, num_codes, min(sampling.top_k, num_codes), step=1, precision=0, label=name)
        case "top_p":
            return gr.Slider(0.01, 1, sampling.top_p, step=0.01, label=name)
        case "share":
            return gr.Slider(0.01, 0.99, 0.5, step=0.01, label=name)
        case "beam":
            return gr.Slider(1, MAX_BEAM, decoding.beam, step=1, precision=0, label=name)
        case "n_best":
            return gr.Slider(1, MAX_BEAM, decoding.n_best, step=1, precision=0, label=name)
        case "alignment":
            return gr.Slider(0, 10, decoding.alignment, step=0.5, label=name)
    raise ValueError(f"no component is known for the argument {name}; add it to _argument")


def _images_and_recipes() -> list[Component]:
    return [gr.File(label="images", file_count="multiple"), gr.JSON(label="recipes")]


def _image() -> gr.Image:
    return gr.Image(label="image", format="png")
