"""tavq heatmap IMAGE TEXT [--out DIR] [--data DIR --count N]

Show where the words, phrases and sentences of a text lie on an image.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from tavq.alignment.config import LEVEL_NAMES
from tavq.base.arguments import parse, print_json, run_main
from tavq.base.device import Device, choose_device
from tavq.base.files import check_directory
from tavq.base.weights import CHECKPOINT

if TYPE_CHECKING:
    from PIL import Image

    from tavq.tokenizer.heatmaps import UnitMap


@dataclasses.dataclass(frozen=True)
class HeatmapRun:
    """Show where each word, phrase and sentence of a text lies on an image.

    The maps are columns of the transport plan between the codes of the image and the text.

    Examples: tavq heatmap photo.jpg "a black dog jumps over a log" --out maps/;  tavq heatmap --data
    flickr8k/ --count 10 --out maps/
    """

    image: Positional[Path | None] = None
    """The image."""
    text: Positional[str | None] = None
    """The text whose words, phrases and sentences are shown."""
    data: str | None = None
    """Dataset in any known layout, hf:OWNER/NAME, `shapes` or `scenes`, instead of an image and a text."""
    split: str = "test"
    """Split of the dataset: train, val or test."""
    count: int = 10
    """Number of images of the dataset, from the first on, each with its first caption."""
    out: Path = Path("maps")
    """Directory for NAME/overview.png, with an image for each word, phrase and sentence beside it."""
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/."""
    device: Device = "auto"
    """Device to run on."""
    json: bool = False
    """Print one line of JSON for each result, instead of text."""

    def __post_init__(self) -> None:
        has_pair = self.image is not None and self.text is not None
        has_data = self.data is not None
        if has_pair == has_data or (has_data and self.image is not None):
            raise ValueError(
                'name an image and a text, as in: tavq heatmap photo.jpg "a dog", or --data DIR alone'
            )
        if self.count < 1:
            raise ValueError(f"count is {self.count}, expected 1 or more")


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(HeatmapRun, argv, prog="tavq heatmap")
    check_directory(run.out)

    from tavq.pipeline import Pipeline

    pairs = _pairs(run)
    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    for name, image, text in pairs:
        maps = pipeline.heatmaps(image, text)
        overview = write_maps(run.out / name, image, maps)
        if run.json:
            units = [{"unit": unit_map.unit, "map": unit_map.map.tolist()} for unit_map in maps]
            print_json({"name": name, "file": str(overview), "units": units})
        else:
            print(overview)


def _pairs(run: HeatmapRun) -> Iterator[tuple[str, Image.Image, str]]:
    """Return (name, image, text) of each pair to show."""
    from tavq.data.dataset import readable_images
    from tavq.data.images import load_image
    from tavq.data.layouts import open_dataset

    if run.data is not None:
        dataset = open_dataset(run.data, run.split)
        images = itertools.islice(readable_images(dataset), run.count)
        return ((Path(dataset[i].id).stem, image, dataset[i].captions[0]) for i, image in images)
    if run.image is not None and run.text is not None:
        return iter([(run.image.stem, load_image(run.image), run.text)])
    raise ValueError("neither an image and a text nor --data is given")


def write_maps(folder: Path, image: Image.Image, maps: Sequence[UnitMap]) -> Path:
    """Write one image per unit, and overview.png, whose path is returned."""
    from tavq.data.images import write_png
    from tavq.tokenizer.heatmaps import heat_overlay, overview

    for number, unit_map in enumerate(maps, 1):
        kind = LEVEL_NAMES[unit_map.kind - 1].removesuffix("s")
        title = re.sub(r"[^a-z0-9]+", "-", unit_map.unit.lower()).strip("-")[:40]
        write_png(heat_overlay(image, unit_map.map), folder / f"{number:02d}-{kind}-{title}.png")
    write_png(overview(image, maps), folder / "overview.png")
    return folder / "overview.png"
