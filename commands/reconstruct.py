"""tavq reconstruct IMAGE: encode and decode images."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tyro.conf import Positional

from tavq.base.arguments import parse, run_main
from tavq.base.device import Device, choose_device
from tavq.base.files import atomic_write
from tavq.data.images import grid, load_image
from tavq.pipeline import CHECKPOINT, Pipeline


@dataclasses.dataclass(frozen=True)
class ReconstructRun:
    """Encode and decode photos.

    Example: tavq reconstruct photo.jpg --out out/
    """

    images: Positional[tuple[Path, ...]]
    """Photos."""
    out: Path = Path("out")
    """Directory of NAME.reconstruction.png and sheet.png: the photos above what became of them."""
    checkpoint: str = CHECKPOINT
    """Directory or hub id that holds tokenizer/."""
    device: Device = "auto"


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(ReconstructRun, argv, prog="tavq reconstruct")
    pictures = [load_image(path) for path in run.images]
    if not pictures:
        raise ValueError("no photo; name one, as in: tavq reconstruct photo.jpg")
    twice = [stem for stem, count in Counter(path.stem for path in run.images).items() if count > 1]
    if twice:
        raise ValueError(f"several photos are called {twice[0]}; their reconstructions would share a name")
    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    rebuilt = [result.image for result in pipeline.reconstruct(pictures)]
    for path, image in zip(run.images, rebuilt, strict=True):
        _write_png(image, run.out / f"{path.stem}.reconstruction.png")
    squashed = [picture.resize(image.size) for picture, image in zip(pictures, rebuilt, strict=True)]
    sheet = grid(squashed + rebuilt, columns=len(rebuilt))
    _write_png(
        sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST), run.out / "sheet.png"
    )


def _write_png(image: Image.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")
    print(path)
