"""python app/gallery.py: draw the images that the page greets with, after the shipped weights have changed.

Then look at them, and choose other seeds in `GREETING` where they are poor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tavq.base.arguments import parse, run_main
from tavq.base.files import atomic_write
from tavq.pipeline import Pipeline, read_recipe

FOLDER = Path(__file__).resolve().parent / "gallery"
TOKENS_FILE = "tokens.npz"
# Prompt and seed of each image that greets. The seeds were chosen by looking at six images of each prompt.
GREETING = (
    ("a brown dog runs through the snow", 4),
    ("a dog swims in the water with a stick in its mouth", 3),
    ("two dogs run through a field", 3),
    ("people stand on the beach at sunset", 1),
    ("soccer players on a green field", 3),
    ("a black dog jumps over a log", 3),
    ("a white dog runs on the beach", 4),
    ("a football player in a red uniform runs with the ball", 3),
    ("a person skis down a snowy mountain", 5),
    ("a surfer rides a wave", 3),
    ("a man rides a bike on a dirt trail", 0),
    ("a person in a kayak on a river", 3),
)
# Prompts of the images whose tokens are kept, to show where a code occurs.
PROMPTS = (
    *(prompt for prompt, _ in GREETING),
    "a dog runs on the grass",
    "two dogs play in the snow",
    "a dog catches a frisbee",
    "a man on a snowboard jumps in the snow",
    "two children play in the water",
    "a boy jumps into a swimming pool",
    "a girl in a pink dress",
    "a little girl plays on a swing",
    "a man climbs a rock",
    "a motorcycle racer on a track",
    "a basketball player jumps for the ball",
    "a man stands on a mountain under a blue sky",
    "a man in a black shirt smiles",
    "a group of people sit on the street",
    "a baby in a red shirt",
    "a skateboarder does a trick on a ramp",
    "a horse and rider jump",
    "a crowd of people in the city at night",
)
IMAGES_PER_PROMPT = 6  # with seeds from 0


@dataclasses.dataclass(frozen=True)
class GalleryRun:
    """Draw the images that the page greets with, by the shipped weights."""

    out: Path = FOLDER
    """Directory for the PNG files and their tokens."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A PNG file that the loaded weights generated."""

    path: Path
    recipe: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{self.recipe['prompt']} · seed {self.recipe['seed']}"


def greeting(pipeline: Pipeline) -> list[Drawn]:
    """List the images of `FOLDER`; none where other weights than theirs are loaded."""
    drawn = [Drawn(path, read_recipe(path)) for path in sorted(FOLDER.glob("*.png"))]
    return [one for one in drawn if one.recipe["checkpoints"].items() <= pipeline.hashes.items()]


def drawn_tokens(codebook_hash: str) -> Tensor | None:
    """Return the ids (n, h, w) of generated images; None where another codebook than theirs is loaded."""
    with np.load(FOLDER / TOKENS_FILE) as file:
        if str(file["codebook_hash"]) != codebook_hash:
            return None
        return torch.from_numpy(file["ids"].astype(np.int64))


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(GalleryRun, argv, prog="python app/gallery.py")
    pipeline = Pipeline.from_pretrained()
    for number, (prompt, seed) in enumerate(GREETING):
        path = run.out / f"{number:02d}.png"
        pipeline.generate([prompt], [seed])[0].save(path)
        print(path)

    ids = [
        generated.ids
        for prompt in PROMPTS
        for generated in pipeline.generate([prompt] * IMAGES_PER_PROMPT, range(IMAGES_PER_PROMPT))
    ]
    with atomic_write(run.out / TOKENS_FILE) as temporary, temporary.open("wb") as file:
        stacked = torch.stack(ids).numpy().astype(np.uint16)
        np.savez_compressed(file, ids=stacked, codebook_hash=pipeline.tokenizer.codebook_hash)
    print(run.out / TOKENS_FILE)


if __name__ == "__main__":
    main()
