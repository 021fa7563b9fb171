"""tavq reconstruct IMAGE: encode and decode images."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from tavq.base.arguments import parse, print_json, run_main
from tavq.base.device import Device, choose_device
from tavq.base.files import check_directory
from tavq.base.weights import CHECKPOINT

SHEET_IMAGE_PX = 288  # small images are enlarged to about this side on the sheet


@dataclasses.dataclass(frozen=True)
class ReconstructRun:
    """Encode and decode images, to see what the tokenizer keeps of them.

    Example: tavq reconstruct photo.jpg --out out/
    """

    images: Positional[tuple[Path, ...]]
    """Images to reconstruct."""
    out: Path = Path("out")
    """Directory for NAME.reconstruction.png and sheet.png, which shows the images above their
    reconstructions."""
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/."""
    device: Device = "auto"
    """Device to run on."""
    json: bool = False
    """Print one line of JSON for each result, instead of text."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(ReconstructRun, argv, prog="tavq reconstruct")
    if not run.images:
        raise ValueError("no image; name one, as in: tavq reconstruct photo.jpg")
    twice = [stem for stem, count in Counter(path.stem for path in run.images).items() if count > 1]
    if twice:
        raise ValueError(f"several images are called {twice[0]}; their reconstructions would share a name")

    check_directory(run.out)

    from PIL import Image

    from tavq.data.images import grid, load_image, squash, write_png
    from tavq.pipeline import Pipeline

    loaded = [load_image(path) for path in run.images]
    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    images, originals = [], []
    for image in loaded:
        images.append(squash(image, pipeline.tokenizer.image_size_px))
        originals.append(squash(image, pipeline.tokenizer.decode_size_px))
    results = pipeline.reconstruct(images)
    reconstructions = [result.image for result in results]
    for path, result in zip(run.images, results, strict=True):
        file = run.out / f"{path.stem}.reconstruction.png"
        result.save(file)
        if run.json:
            print_json({"image": str(path), "file": str(file), "ids": result.ids.tolist()})
        else:
            print(file)

    sheet = grid(originals + reconstructions, columns=len(images))
    scale = max(1, SHEET_IMAGE_PX // originals[0].width)
    enlarged = sheet.resize((scale * sheet.width, scale * sheet.height), Image.Resampling.NEAREST)
    write_png(enlarged, run.out / "sheet.png")
    if not run.json:
        print(run.out / "sheet.png")
