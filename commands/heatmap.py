"""tavq heatmap PHOTO TEXT [--out DIR] [--data DIR --count N]

Show where the words, phrases and sentences of a text lie on a photo.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from tyro.conf import Positional

from tavq.alignment.aligner import LEVEL_NAMES
from tavq.base.arguments import parse, run_main
from tavq.base.device import Device, choose_device
from tavq.base.files import atomic_write
from tavq.data.examples import readable_images
from tavq.data.images import load_image
from tavq.data.layouts import open_dataset
from tavq.pipeline import CHECKPOINT, Pipeline
from tavq.tokenizer.heatmaps import UnitMap, heat_overlay, overview


@dataclasses.dataclass(frozen=True)
class HeatmapRun:
    """Show where each word, phrase and sentence of a text lies on a photo: the transport plan between its
    codes and the text.

    Examples: tavq heatmap photo.jpg "a black dog jumps over a log" --out maps/ or, for the first ten test
    photos and their first captions, tavq heatmap --data flickr8k/ --count 10 --out maps/
    """

    photo: Positional[Path | None] = None
    """The photo, or a picture that tavq generate drew."""
    text: Positional[str | None] = None
    """What to look for."""
    data: str | None = None
    """Instead of a photo: a data set in any known layout, or `shapes`."""
    split: str = "test"
    """Of the data set."""
    count: int = 10
    """The first so many photos of the data set, each with its first caption."""
    out: Path = Path("maps")
    """Directory of NAME/overview.png and of one picture a word, phrase and sentence beside it."""
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/."""
    device: Device = "auto"

    def __post_init__(self) -> None:
        one = self.photo is not None and self.text is not None
        if one == (self.data is not None) or (self.data is not None and self.photo is not None):
            raise ValueError(
                'name a photo and a text, as in: tavq heatmap photo.jpg "a dog on grass", or --data DIR alone'
            )
        if self.count < 1:
            raise ValueError(f"count is {self.count}, expected 1 or more")


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(HeatmapRun, argv, prog="tavq heatmap")
    pairs = _pairs(run)
    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    for name, photo, text in pairs:
        maps = pipeline.heatmaps(photo, text)
        print(write_maps(run.out / name, photo, maps))


def _pairs(run: HeatmapRun) -> Iterator[tuple[str, Image.Image, str]]:
    """(name, photo, text) of each pair to draw."""
    if run.data is None:
        return iter([(run.photo.stem, load_image(run.photo), run.text)])
    dataset = open_dataset(run.data, run.split)
    photos = itertools.islice(readable_images(dataset), run.count)
    return ((Path(dataset[i].id).stem, photo, dataset[i].captions[0]) for i, photo in photos)


def write_maps(folder: Path, photo: Image.Image, maps: Sequence[UnitMap]) -> Path:
    """Write one picture a unit, and overview.png; gives the path of the latter."""
    for number, found in enumerate(maps, 1):
        kind = LEVEL_NAMES[found.kind - 1].removesuffix("s")
        title = re.sub(r"[^a-z0-9]+", "-", found.unit.lower()).strip("-")[:40]
        _save(heat_overlay(photo, found.map), folder / f"{number:02d}-{kind}-{title}.png")
    _save(overview(photo, maps), folder / "overview.png")
    return folder / "overview.png"


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")
