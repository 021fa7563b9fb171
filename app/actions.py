"""What the demo's buttons do: each method is one endpoint over `Pipeline`, with errors people can read."""

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

from .views import marked_words, ranking, token_grid, unit_overlays, word_overlays

MAX_RANDOM_SEED = 2**31

TOP, LEFT, BOX, SHARE = "top half", "left half", "a box", "some of its tokens"


@dataclass(frozen=True)
class Described:
    """A photo with the captions found for it, the best first."""

    photo: Image.Image
    captions: list[Caption]


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Show a mistake that the user can mend as one line on the page."""
    try:
        yield
    except USER_ERRORS as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from error


class Actions:
    """The endpoints, over one pipeline.

    Args:
        pipeline: loaded.
        folder: where pictures are written; the page serves files from there.
    """

    def __init__(self, pipeline: Pipeline, folder: Path):
        self.pipeline, self.folder = pipeline, folder
        self.stopped: set[str | None] = set()  # sessions whose drawing shall end

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
        """Yield (pictures, files, seed, recipe) again and again, until every picture is drawn.

        A file is written when a picture is whole. After `stop`, the pictures so far stay on the page
        (Gradio's own cancelling would clear them).
        """
        with readable_errors():
            settings = SamplingConfig(
                guidance_scale=guidance_scale, temperature=temperature, top_k=int(top_k), top_p=top_p
            )
            seed, shown, files, recipe = _used_seed(seed), [], [], ""
            self._check(prompt)
            progress((0, num_images), unit="pictures")
            for picture, whole in self._drawn(prompt, seed, num_images, settings, best_of, live):
                if whole:
                    files.append(self._saved(picture))
                    shown.append((files[-1], f"seed {picture.recipe['seed']}"))
                    recipe = recipe_line(picture.recipe)
                    progress((len(files), num_images), unit="pictures")
                    yield shown, files, seed, recipe
                else:
                    yield [*shown, (picture.image, "drawing ...")], files, seed, recipe
                if request.session_hash in self.stopped:
                    return

    def start(self, request: gr.Request) -> None:
        """Forget an earlier `stop` of this browser tab; called before the drawing waits for its turn."""
        self.stopped.discard(request.session_hash)

    def stop(self, request: gr.Request) -> None:
        """End the drawing of this browser tab after the row, or the picture, in hand."""
        self.stopped.add(request.session_hash)

    def _drawn(
        self, prompt: str, seed: int, count: int, settings: SamplingConfig, best_of: int, live: bool
    ) -> Iterator[tuple[Generated, bool]]:
        """Yield pictures, and whether each is whole: row by row if `live`, else a micro-batch at a time."""
        seeds = range(seed, seed + count)
        if live and best_of == 1:
            rows = self.pipeline.tokenizer.grid_size[0]
            for one in seeds:
                for row, picture in enumerate(self.pipeline.stream(prompt, one, settings), 1):
                    yield picture, row == rows
            return
        together = max(1, settings.micro_batch // best_of)
        for start in range(0, count, together):
            some = list(seeds[start : start + together])
            for picture in self.pipeline.generate([prompt] * len(some), some, settings, best_of=best_of):
                yield picture, True

    def caption(
        self, photo: str | None, beam: int, n_best: int, alignment: float, unsure_below: float
    ) -> tuple[str, list[list[Any]], list[tuple[str, str]], list[Any], Described, int]:
        """Return the best caption, the ranking, the best one's words and patches, and what `words` needs."""
        with readable_errors():
            image = _opened(photo)
            settings = DecodingConfig(beam=int(beam), n_best=int(n_best), alignment=alignment)
            described = Described(image, self.pipeline.caption([image], settings, with_patches=True)[0])
            best = described.captions[0].text
            return best, ranking(described.captions), *self.words(described, 0, unsure_below), described, 0

    @staticmethod
    def words(
        described: Described | None, chosen: int, unsure_below: float
    ) -> tuple[list[tuple[str, str]], list[Any]]:
        """The words of a caption, those under the threshold marked, and the patches behind each."""
        if described is None:
            return [], []
        caption = described.captions[chosen]
        return marked_words(caption, unsure_below), word_overlays(described.photo, caption)

    def heatmaps(self, photo: str | None, text: str) -> list[tuple[Image.Image, str]]:
        """Return the photo with the place of each word, phrase and sentence of a text, and which it is."""
        with readable_errors():
            image = _opened(photo)
            return unit_overlays(image, self.pipeline.heatmaps(image, text))

    def reconstruct(self, photo: str | None) -> tuple[Image.Image, Image.Image, Image.Image, list[list[int]]]:
        """Return what the tokenizer sees, what it makes of it, its tokens as a picture and as numbers."""
        with readable_errors():
            image = _opened(photo)
            rebuilt = self.pipeline.reconstruct([image])[0]
            size = self.pipeline.tokenizer.image_size_px
            seen = image.resize((size, size), Image.Resampling.BICUBIC)
            return seen, rebuilt.image, token_grid(rebuilt.ids.numpy()), rebuilt.ids.tolist()

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
        """Return pictures whose kept part comes from the photo, their files, and the first seed.

        The box is in percent of the photo, the share in percent of its tokens.
        """
        with readable_errors():
            image = _opened(photo)
            settings = SamplingConfig(
                guidance_scale=guidance_scale, temperature=temperature, top_k=int(top_k), top_p=top_p
            )
            seed = _used_seed(seed)
            self._check(prompt)
            seeds = list(range(seed, seed + int(num_images)))
            if keep == SHARE:
                pictures = self.pipeline.vary(image, share / 100, prompt, seeds, settings)
            else:
                part = _kept(keep, image, box_left, box_top, box_width, box_height)
                mask = completion_mask(part, *image.size)
                pictures = self.pipeline.complete(image, mask, prompt, seeds, settings)
            files = [self._saved(picture) for picture in pictures]
            shown = [(file, f"seed {one}") for file, one in zip(files, seeds, strict=True)]
            return shown, files, seed

    def _check(self, prompt: str) -> None:
        """Refuse an empty prompt; warn on the page where one is longer than the generator reads."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.pipeline.text_states([prompt])
        for warning in caught:
            gr.Warning(str(warning.message))

    def _saved(self, picture: Generated) -> str:
        """Write the PNG with its recipe under a name of its own; the seed leads it."""
        path = self.folder / f"seed-{picture.recipe['seed']}-{uuid.uuid4().hex[:8]}.png"
        picture.save(path)
        return str(path)


def _opened(photo: str | None) -> Image.Image:
    if photo is None:
        raise ValueError("no photo; upload one, or click an example")
    return load_image(io.BytesIO(Path(photo).read_bytes()))  # so that no error names the page's own folder


def _used_seed(seed: int | None) -> int:
    if seed is None:
        raise ValueError("no seed; enter 0 or more, or -1 for a random one")
    if seed < -1:
        raise ValueError(f"the seed is {seed}, expected 0 or more, or -1 for a random one")
    return random.SystemRandom().randrange(MAX_RANDOM_SEED) if seed == -1 else int(seed)


def _kept(keep: str, photo: Image.Image, left: float, top: float, width: float, height: float) -> str:
    """The part that stays as `completion_mask` reads it: top, left or box=x,y,w,h in px."""
    if keep in (TOP, LEFT):
        return keep.split()[0]
    shares = zip((left, top, width, height), photo.size * 2, strict=True)
    return "box=" + ",".join(str(round(share / 100 * side)) for share, side in shares)
