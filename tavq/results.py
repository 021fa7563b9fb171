"""What `Pipeline` returns: images, captions, and the recipe that a generated PNG carries.

Shapes: h w token grid.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from tavq.base.files import atomic_write
from tavq.captioner.decoding import Caption
from tavq.data.images import write_png
from tavq.generator.config import EARLIER_VALUES, RENAMED_FIELDS

RECIPE_FIELD = "tavq"  # PNG text field that holds the recipe as JSON
PARAMETERS_FIELD = "parameters"  # PNG text field that other programs write and show: the recipe for people
CAPTION_SUFFIXES = (".txt", ".json")


@dataclasses.dataclass(frozen=True)
class Generated:
    """A generated image, and the recipe that generates it again."""

    image: Image.Image
    ids: Tensor
    """(h, w) int64."""
    recipe: dict[str, Any]
    """Prompt, seed, settings, hashes of the checkpoints, and version."""

    @property
    def text(self) -> str:
        """The prompt."""
        return self.recipe["prompt"]

    @property
    def seed(self) -> int:
        """The seed of this image."""
        return self.recipe["seed"]

    def save(self, path: str | Path) -> None:
        """Write a PNG that carries its recipe in text fields."""
        write_png(self.image, Path(path), self.png_fields())

    def png_fields(self) -> PngInfo:
        """Return the text fields of a PNG that carry the recipe."""
        fields = PngInfo()
        fields.add_itxt(RECIPE_FIELD, json.dumps(self.recipe))
        fields.add_itxt(PARAMETERS_FIELD, recipe_line(self.recipe))
        return fields


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """An image that was encoded and decoded."""

    image: Image.Image
    ids: Tensor
    """(h, w) int64."""

    def save(self, path: str | Path) -> None:
        """Write the image as PNG."""
        write_png(self.image, Path(path))


class Captions(list[Caption]):
    """The captions of one image, best first.

    Attributes:
        image: the image that they describe.
    """

    def __init__(self, image: Image.Image, captions: Iterable[Caption]):
        super().__init__(captions)
        self.image = image

    @property
    def text(self) -> str:
        """The best caption."""
        return self[0].text

    @property
    def score(self) -> float:
        """The score of the best caption."""
        return self[0].score

    def save(self, path: str | Path) -> None:
        """Write `.txt` (one caption a line), or `.json` with scores and word probabilities.

        Raises:
            ValueError: the path ends in something else.
        """
        path = Path(path)
        if path.suffix == ".txt":
            text = "".join(f"{caption.text}\n" for caption in self)
        elif path.suffix == ".json":
            text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        else:
            raise ValueError(f"cannot write captions to {path}; end the name in .txt or .json")
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def to_json(self) -> list[dict[str, Any]]:
        """Return plain values: text, score, and the words with their probabilities."""
        return [
            {
                "text": caption.text,
                "score": caption.score,
                "words": [{"text": word.text, "probability": word.probability} for word in caption.words],
            }
            for caption in self
        ]


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the recipe from a PNG that `Generated.save` wrote, in this version or an earlier one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file carries no recipe.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}; name a PNG that tavq generate wrote")
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(RECIPE_FIELD)
    except UnidentifiedImageError:
        text = None
    if text is None:
        raise ValueError(f"{path} carries no recipe; only PNG files that tavq generate wrote do")
    recipe = json.loads(text)
    settings = {RENAMED_FIELDS.get(name, name): value for name, value in recipe["settings"].items()}
    recipe["settings"] = EARLIER_VALUES | settings
    return recipe


def recipe_line(recipe: dict[str, Any]) -> str:
    """Write a recipe for people: the prompt, the negative prompt if there is one, and the settings."""
    settings = {"Seed": recipe["seed"], **recipe["settings"], "Version": f"ta-vq {recipe['version']}"}
    lines = [recipe["prompt"]]
    if "negative_prompt" in recipe:
        lines.append(f"Negative prompt: {recipe['negative_prompt']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)
