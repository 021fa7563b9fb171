"""python recipes/pictures.py [--checkpoint checkpoints/flickr8k]: make the images of README and docs anew.

Reconstructions of the example photos, three prompts by four seeds, and the page of twelve prompts. Nothing is
selected: the seeds are 0 to 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tavq.base.arguments import parse, run_main
from tavq.base.files import atomic_write
from tavq.base.weights import CHECKPOINT
from tavq.data.images import grid, open_image
from tavq.eval.table import write_block
from tavq.pipeline import Pipeline

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "app" / "examples"
SEEDS = (0, 1, 2, 3)
WEBP_QUALITY = 80
THREE = ("a brown dog runs through the grass", "a man on a mountain", "children play in the water")
TWELVE = {
    "one word": "dog",
    "a number and a place": "two dogs play in the snow",
    "a sport": "soccer players on a green field",
    "a landscape": "sunset over the sea",
    "a portrait": "portrait of a smiling woman",
    "a colour": "a child in a yellow raincoat",
    "a relation": "a man in a blue shirt to the left of a brown dog",
    "a city": "people walk through a city street at night",
    "a room": "a cat on a sofa",
    "an object": "a red car",
    "a style": "an oil painting of a castle, highly detailed",
    "a long text": "A girl in a pink dress runs through tall grass. A small white dog jumps beside her. "
    "The sky is blue, and there are mountains far away.",
}
"""Kind -> prompt, as people type them."""


@dataclasses.dataclass(frozen=True)
class PicturesRun:
    """Make the images of README and docs from a checkpoint.

    Example: python recipes/pictures.py --checkpoint checkpoints/flickr8k
    """

    checkpoint: str = CHECKPOINT
    """Directory that holds tokenizer/ and generator/."""
    docs: Path = ROOT / "docs"
    """Folder of the pages; images go to images/ in it."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(PicturesRun, argv, prog="python recipes/pictures.py")
    pipeline = Pipeline.from_pretrained(run.checkpoint)
    images = run.docs / "images"
    (images / "prompts").mkdir(parents=True, exist_ok=True)

    photos = [open_image(path) for path in sorted(EXAMPLES.glob("*.jpg"))]
    size = pipeline.tokenizer.decode_size_px
    pairs = [photo.resize((size, size), Image.Resampling.LANCZOS) for photo in photos]
    pairs += [one.image for one in pipeline.reconstruct(photos)]
    save(grid(pairs, columns=len(photos)), images / "reconstructions.png")
    save(grid([image for prompt in THREE for image in draw(pipeline, prompt)], 4), images / "prompts.png")

    rows = []
    for number, (kind, prompt) in enumerate(TWELVE.items()):
        file = images / "prompts" / f"{number:02d}.webp"
        save(grid(draw(pipeline, prompt), columns=4), file)
        rows.append(f"| {kind} | *{prompt}* | ![{prompt}]({file.relative_to(run.docs)}) |")
        print(file)
    page = run.docs / "prompts.md"
    if not page.exists():
        page.write_text("# Twelve prompts\n\n<!-- prompts: begin -->\n<!-- prompts: end -->\n")
    header = "| kind | prompt | seeds 0 to 3, not selected |\n| --- | --- | --- |"
    write_block(page, "prompts", "\n".join([header, *rows]))


def draw(pipeline: Pipeline, prompt: str) -> list[Image.Image]:
    """Return one image of each seed."""
    return [generated.image for generated in pipeline.generate(prompt, list(SEEDS))]


def save(image: Image.Image, path: Path) -> None:
    """Write an image under its name once it is whole."""
    with atomic_write(path) as temporary:
        image.save(temporary, path.suffix[1:], quality=WEBP_QUALITY, method=6)


if __name__ == "__main__":
    main()
