"""The demo's endpoints: what its buttons do, by calls of `Pipeline`, with errors that people can read."""

from __future__ import annotations

import contextlib
import io
import random
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from tavq.base.arguments import USER_ERRORS
from tavq.captioner.decoding import Caption, DecodingConfig
from tavq.commands.complete import completion_mask
from tavq.data.images import load_image
from tavq.generator.sampling import SamplingConfig
from tavq.pipeline import Generated, Pipeline, recipe_line

from . import metrics
from .views import marked_words, ranking, token_grid, unit_overlays, word_overlays

MAX_RANDOM_SEED = 2**31

# What stays of an image that is completed, as the page and the endpoint name it.
TOP = "top half"
LEFT = "left half"
BOX = "a box"
SHARE = "some of its tokens"


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
    """The endpoints.

    Args:
        pipeline: does the work.
        folder: that images are written to; the page serves files from there.
    """

    def __init__(self, pipeline: Pipeline, folder: Path):
        self.pipeline = pipeline
        self.folder = folder
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
    ) -> Iterator[tuple[list[Any], list[str], int, str]]:
        """Generate images. Yield (images, files, seed, recipe) again and again, until all are complete.

        A file is written when its image is complete.
        """
        with readable_errors():
            settings = SamplingConfig(
                guidance_scale=guidance_scale, temperature=temperature, top_k=int(top_k), top_p=top_p
            )
            seed = _used_seed(seed)
            self._check(prompt)

            gallery: list[Any] = []
            files: list[str] = []
            recipe = ""
            progress((0, num_images), unit="images")
            for generated, complete in self._generate(prompt, seed, num_images, settings, best_of, live):
                if complete:
                    files.append(self._save(generated))
                    gallery.append((files[-1], f"seed {generated.recipe['seed']}"))
                    recipe = recipe_line(generated.recipe)
                    progress((len(files), num_images), unit="images")
                    yield gallery, files, seed, recipe
                else:
                    yield [*gallery, (generated.image, "generating ...")], files, seed, recipe

                # Not by Gradio's cancelling, which would clear the images from the page.
                if request.session_hash in self.stopped:
                    return

    def start(self, request: gr.Request) -> None:
        """Forget an earlier `stop` of this browser tab; called before its next job waits in the queue."""
        self.stopped.discard(request.session_hash)

    def stop(self, request: gr.Request) -> None:
        """End the generation of this browser tab after the current row of tokens, or the current image."""
        self.stopped.add(request.session_hash)

    def _generate(
        self, prompt: str, seed: int, count: int, settings: SamplingConfig, best_of: int, live: bool
    ) -> Iterator[tuple[Generated, bool]]:
        """Yield (image, whether it is complete): row by row if `live`, else a micro-batch at a time."""
        seeds = range(seed, seed + count)
        if live and best_of == 1:
            rows = self.pipeline.tokenizer.grid_size[0]
            for image_seed in seeds:
                for row, partial in enumerate(self.pipeline.stream(prompt, image_seed, settings), 1):
                    yield partial, row == rows
            return

        batch_size = max(1, settings.micro_batch // best_of)
        for first in range(0, count, batch_size):
            batch = list(seeds[first : first + batch_size])
            for image in self.pipeline.generate([prompt] * len(batch), batch, settings, best_of=best_of):
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
            image = _open(photo)
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
            image = _open(photo)
            return unit_overlays(image, self.pipeline.heatmaps(image, text))

    def reconstruct(self, photo: str | None) -> tuple[Image.Image, Image.Image, Image.Image, list[list[int]]]:
        """Return what the tokenizer sees, its reconstruction, and its tokens as an image and as numbers."""
        with readable_errors():
            image = _open(photo)
            reconstruction = self.pipeline.reconstruct([image])[0]
            size = self.pipeline.tokenizer.image_size_px
            seen = image.resize((size, size), Image.Resampling.BICUBIC)
            ids = reconstruction.ids
            return seen, reconstruction.image, token_grid(ids.numpy()), ids.tolist()

    def complete(
        self,
        photo: str | None,
        prompt: str,
        keep: str,
        box_left: float,
        box_top: float,
        box_width: float,
        box_height: float,
        share: float,
        num_images: int,
        seed: int,
        guidance_scale: float,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> tuple[list[tuple[str, str]], list[str], int]:
        """Keep a part of the photo and generate the rest. Return the images, their files, and the first seed.

        The box is in percent of the photo, the share in percent of its tokens.
        """
        with readable_errors():
            image = _open(photo)
            settings = SamplingConfig(
                guidance_scale=guidance_scale, temperature=temperature, top_k=int(top_k), top_p=top_p
            )
            seed = _used_seed(seed)
            self._check(prompt)
            seeds = list(range(seed, seed + int(num_images)))
            if keep == SHARE:
                results = self.pipeline.vary(image, share / 100, prompt, seeds, settings)
            else:
                part = _part(keep, image, box_left, box_top, box_width, box_height)
                mask = completion_mask(part, *image.size)
                results = self.pipeline.complete(image, mask, prompt, seeds, settings)

            files = [self._save(generated) for generated in results]
            gallery = [(file, f"seed {image_seed}") for file, image_seed in zip(files, seeds, strict=True)]
            return gallery, files, seed

    def _check(self, prompt: str) -> None:
        """Refuse an empty prompt; warn on the page where one is longer than the generator takes."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.pipeline.text_states([prompt])
        for warning in caught:
            gr.Warning(str(warning.message))

    def _save(self, generated: Generated) -> str:
        """Write the PNG with its recipe, under a new name that begins with the seed."""
        path = self.folder / f"seed-{generated.recipe['seed']}-{uuid.uuid4().hex[:8]}.png"
        generated.save(path)
        metrics.IMAGES.inc()
        return str(path)


def _open(photo: str | None) -> Image.Image:
    if photo is None:
        raise ValueError("no photo; upload one, or click an example")
    # From memory, so that no error on the page names a path of this machine.
    return load_image(io.BytesIO(Path(photo).read_bytes()))


def _used_seed(seed: int | None) -> int:
    if seed is None:
        raise ValueError("no seed; enter 0 or more, or -1 for a random one")
    if seed < -1:
        raise ValueError(f"the seed is {seed}, expected 0 or more, or -1 for a random one")
    return random.SystemRandom().randrange(MAX_RANDOM_SEED) if seed == -1 else int(seed)


def _part(keep: str, photo: Image.Image, left: float, top: float, width: float, height: float) -> str:
    """Write the part that stays as `completion_mask` takes it: top, left or box=x,y,w,h in px."""
    if keep in (TOP, LEFT):
        return keep.split()[0]
    shares = zip((left, top, width, height), photo.size * 2, strict=True)
    return "box=" + ",".join(str(round(share / 100 * side)) for share, side in shares)
