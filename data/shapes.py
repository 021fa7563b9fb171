"""A generated dataset of coloured shapes, with captions at three granularities.

An example is a function of (split, index) alone, so it is the same scene at every size and in every run. Two
captions describe the scene (objects, their relation, the background), two the objects, one is bare words.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import partial

from PIL import Image, ImageDraw

from .dataset import Example

SPLIT_SIZES = {"train": 2000, "val": 200, "test": 200}
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (35, 87, 201),
    "yellow": (247, 206, 31),
    "purple": (128, 60, 170),
    "orange": (245, 130, 32),
}
GROUNDS = {"white": (250, 250, 250), "black": (16, 16, 16), "grey": (150, 150, 150), "pink": (250, 190, 205)}
SIZES = {"large": 0.20, "small": 0.11}
_CORNERS = {"triangle": 3, "square": 4, "hexagon": 6}
SHAPES = ("circle", *_CORNERS, "star")
_SUPERSAMPLING = 2


@dataclass(frozen=True)
class Shape:
    """One object: `x`, `y` and `radius` as shares of the image side."""

    size: str
    colour: str
    kind: str
    x: float
    y: float
    radius: float

    @property
    def words(self) -> str:
        return f"{self.size} {self.colour} {self.kind}"

    @property
    def phrase(self) -> str:
        return f"{'an' if self.words[0] in 'aeiou' else 'a'} {self.words}"


@dataclass(frozen=True)
class Scene:
    ground: str
    shapes: tuple[Shape, ...]


def make_scene(split: str, index: int) -> Scene:
    """Sample the scene of one example: one to three different shapes, each in a quarter of its own."""
    rng = random.Random(f"shapes/{split}/{index}")  # seeded by text: the splits share no seed
    quarters = rng.sample([(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)], rng.randint(1, 3))
    names = rng.sample([(s, c, k) for s in SIZES for c in COLOURS for k in SHAPES], len(quarters))
    shapes = tuple(
        Shape(*name, x + rng.uniform(-0.05, 0.05), y + rng.uniform(-0.05, 0.05), SIZES[name[0]])
        for name, (x, y) in zip(names, quarters, strict=True)
    )
    return Scene(rng.choice(list(GROUNDS)), shapes)


def describe(scene: Scene) -> tuple[str, ...]:
    """Write the five captions of a scene: scene, scene, objects, objects, words."""
    phrases = [shape.phrase for shape in scene.shapes]
    first = phrases[0]
    relations = [f"{_relation(scene.shapes[0], other)} {other.phrase}" for other in scene.shapes[1:]]
    where = f"is {' and '.join(relations)}" if relations else "stands alone"
    counted = ("One shape lies", "Two shapes lie", "Three shapes lie")[len(phrases) - 1]
    return (
        f"{first} {where} on a {scene.ground} background.".capitalize(),
        f"{counted} on a {scene.ground} background: {_listed(phrases)}.",
        f"{_listed(phrases)}.".capitalize(),
        f"{_listed(phrases[::-1])}.".capitalize(),
        ", ".join(shape.words for shape in scene.shapes) + ".",
    )


def draw(scene: Scene, size_px: int) -> Image.Image:
    """Draw a scene as an RGB image of `size_px` squared, edges smoothed."""
    side = size_px * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), GROUNDS[scene.ground])
    pen = ImageDraw.Draw(image)
    for shape in scene.shapes:
        x, y, radius = (share * side for share in (shape.x, shape.y, shape.radius))
        if shape.kind == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[shape.colour])
        else:
            pen.polygon(outline(shape.kind, x, y, radius), fill=COLOURS[shape.colour])
    return image.resize((size_px, size_px), Image.Resampling.BOX)


def shapes_examples(split: str, count: int | None = None, size_px: int = 128) -> list[Example]:
    """Make the first `count` examples of a split ("train" 2,000, "val" and "test" 200 by default)."""
    count = SPLIT_SIZES[split] if count is None else count
    return [_example(split, index, size_px) for index in range(count)]


def _example(split: str, index: int, size_px: int) -> Example:
    scene = make_scene(split, index)
    return Example(f"{split}-{index:05d}", partial(draw, scene, size_px), describe(scene), None, split)


def _relation(one: Shape, other: Shape) -> str:
    if abs(one.x - other.x) > abs(one.y - other.y):
        return "left of" if one.x < other.x else "right of"
    return "above" if one.y < other.y else "below"


def _listed(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def outline(kind: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if kind == "star":
        radii, corners, turn = [radius, 0.42 * radius], 10, -math.pi / 2
    else:
        corners = _CORNERS[kind]
        radii, turn = [radius], -math.pi / 4 if kind == "square" else -math.pi / 2
    angles = (turn + 2 * math.pi * corner / corners for corner in range(corners))
    return [
        (x + radii[corner % len(radii)] * math.cos(angle), y + radii[corner % len(radii)] * math.sin(angle))
        for corner, angle in enumerate(angles)
    ]
