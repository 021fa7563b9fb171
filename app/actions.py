"""What the page's buttons do, by calls of `Pipeline`, with errors that people can read."""

from __future__ import annotations

import contextlib
import io
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from tavq.base.arguments import USER_ERRORS
from tavq.base.seeding import image_seeds
from tavq.captioner.decoding import Caption, DecodingConfig
from tavq.data.images import load_image
from tavq.generator.sampling import SamplingConfig
from tavq.pipeline import Generated, Pipeline, recipe_line

from . import components, metrics
from .views import marked_words, ranking, unit_overlays, word_overlays


@dataclass(frozen=True)
class Captioned:
    """A photo with its captions, best first."""

    photo: Image.Image
    captions: list[Caption]


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Show an error that the user can mend as one line on the page."""
    try:
        yield
    except USER_ERRORS as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from error


class Actions:
    """What several tabs of the page do.

    Args:
        pipeline: does the work.
        folder: that images are written to; the page serves files from there.
        stop_waiting: ends the jobs of a browser tab (its session) that wait in the queue.
    """

    def __init__(self, pipeline: Pipeline, folder: Path, stop_waiting: Callable[[str | None], None]):
        self.pipeline = pipeline
        self.folder = folder
        self.stop_waiting = stop_waiting
        self.stopped: set[str | None] = set()  # browser tabs whose generation shall end

    def generate(
        self,
        prompt: str,
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
        negative_prompt: str = "",
        images: Sequence[Image.Image] = (),
        image_words: int = 1,
    ) -> Iterator[tuple[list[Any], list[str], int, str]]:
        """Generate images. Yield (images, files, seed, recipe) again and again, until all are complete.

        A file is written when its image is complete. `images` are what they shall be like, in `image_words`
        words each; with them the prompt may be empty.
        """
        with readable_errors():
            settings = sampling_settings(guidance_scale, temperature, top_k, top_p)
            seed = self.used_seed(seed)
            if prompt.strip() or not images:
                self.check(prompt)

            gallery: list[Any] = []
            files: list[str] = []
            recipe = ""
            progress((0, num_images), unit="images")
            for generated, complete in self._generate(
                prompt, negative_prompt, seed, num_images, settings, best_of, live, images, image_words
            ):
                if complete:
                    files.append(self.save(generated))
                    gallery.append((files[-1], f"seed {generated.recipe['seed']}"))
                    recipe = recipe_line(generated.recipe)
                    progress((len(files), num_images), unit="images")
                    yield gallery, files, seed, recipe
                else:
                    yield [*gallery, (generated.image, "generating ...")], files, seed, recipe

                # Not by Gradio's cancelling, which would clear the images from the page.
                if self.is_stopped(request):
                    yield gallery, files, seed, recipe  # without the one that is not complete
                    return

    def follow(
        self, images: Iterator[tuple[list[Any], list[str], int, str]], num_images: int, request: gr.Request
    ) -> Iterator[list[Any]]:
        """Show what `generate` yields: yield [results' group, gallery, PNG files, paths, status].

        An error is a line of the status: Gradio's own would cover the images that are there.
        """
        files: list[str] = []
        shown = gr.Column(visible=True)
        if self.is_stopped(request):
            yield [gr.skip()] * 4 + [components.told("Stopped before it began.")]
            return
        try:
            for gallery, files, _, _ in images:
                line = f"{len(files)} of {num_images} images"
                yield [shown, gallery, files, list(files), components.told(line)]
                shown = gr.skip()
        except gr.Error as error:
            yield [gr.skip()] * 4 + [components.failed(error)]
            return
        if len(files) < num_images:
            line = f"Stopped after {len(files)} of {num_images} images."
            yield [gr.skip()] * 4 + [components.told(line)]

    def start(self, request: gr.Request) -> None:
        """Forget an earlier `stop` of this browser tab; called before its next job waits in the queue."""
        self.stopped.discard(request.session_hash)

    async def stop(self, request: gr.Request) -> None:
        """End the jobs of this browser tab: those that wait at once, one that runs after its current step.

        It is async to run in the server's event loop, which owns the queue.
        """
        self.stopped.add(request.session_hash)
        self.stop_waiting(request.session_hash)

    def is_stopped(self, request: gr.Request) -> bool:
        return request.session_hash in self.stopped

    def _generate(
        self,
        prompt: str,
        negative: str,
        seed: int,
        count: int,
        settings: SamplingConfig,
        best_of: int,
        live: bool,
        images: Sequence[Image.Image],
        image_words: int,
    ) -> Iterator[tuple[Generated, bool]]:
        """Yield (image, whether it is complete): row by row if `live`, else a micro-batch at a time."""
        if live and best_of == 1:
            rows = self.pipeline.tokenizer.grid_size[0]
            for image_seed in range(seed, seed + count):
                partials = self.pipeline.stream(prompt, image_seed, settings, negative_prompt=negative)
                for row, partial in enumerate(partials, 1):
                    yield partial, row == rows
            return

        generated = self.pipeline.generate_each(
            prompt if prompt.strip() else None,
            seed,
            settings,
            num_images=count,
            images=list(images) or None,
            image_words=image_words,
            negative_prompt=negative,
            best_of=best_of,
        )
        for image in generated:
            yield image, True

    def caption(
        self, photo: str | None, beam: int, n_best: int, alignment: float, unsure_below: float
    ) -> tuple[str, list[list[Any]], list[tuple[str, str]], list[Any], Captioned, int]:
        """Caption a photo.

        Returns:
            The best caption, the table of all, the words of the best one and their patches, and the arguments
            of a later call of `words`: all captions, and the number of the best one.
        """
        with readable_errors():
            image = open_photo(photo)
            settings = DecodingConfig(beam=int(beam), n_best=int(n_best), alignment=alignment)
            captions = self.pipeline.caption([image], settings, with_patches=True)[0]
            captioned = Captioned(image, captions)
            words, patches = self.words(captioned, 0, unsure_below)
            return captions[0].text, ranking(captions), words, patches, captioned, 0

    @staticmethod
    def words(
        captioned: Captioned | None, chosen: int, unsure_below: float
    ) -> tuple[list[tuple[str, str]], list[Any]]:
        """Return the words of a caption, marked where they are unsure, and the patches of each."""
        if captioned is None:
            return [], []
        caption = captioned.captions[chosen]
        return marked_words(caption, unsure_below), word_overlays(captioned.photo, caption)

    def heatmaps(self, photo: str | None, text: str) -> list[tuple[Image.Image, str]]:
        """Return the photo with the map of each word, phrase and sentence of a text, and their names."""
        with readable_errors():
            image = open_photo(photo)
            return unit_overlays(image, self.pipeline.heatmaps(image, text))

    def check(self, prompt: str) -> None:
        """Refuse an empty prompt; warn on the page where one is longer than the generator takes."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.pipeline.text_states([prompt])
        for warning in caught:
            gr.Warning(str(warning.message))

    @staticmethod
    def used_seed(seed: int | None) -> int:
        """Return the seed, or a random one for -1."""
        if seed is None:
            raise ValueError("no seed; enter 0 or more, or -1 for a random one")
        return image_seeds(int(seed), 1)[0]

    def save(self, generated: Generated) -> str:
        """Write the PNG with its recipe, under a new name that begins with the seed."""
        path = self.folder / f"seed-{generated.recipe['seed']}-{uuid.uuid4().hex[:8]}.png"
        generated.save(path)
        metrics.IMAGES.inc()
        return str(path)


def sampling_settings(
    guidance_scale: float, temperature: float, top_k: float, top_p: float
) -> SamplingConfig:
    """Return the settings that page and API offer; sliders give floats."""
    return SamplingConfig(
        guidance_scale=guidance_scale, temperature=temperature, top_k=int(top_k), top_p=top_p
    )


def open_photo(photo: str | None, missing: str = "no photo; upload one, or click an example") -> Image.Image:
    """Open an upload. Raises ValueError where there is none (with `missing`), or it is no image."""
    if photo is None:
        raise ValueError(missing)
    # From memory, so that no error names a path of this machine.
    return load_image(io.BytesIO(Path(photo).read_bytes()))
