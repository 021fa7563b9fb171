"""A generated dataset whose truth is known: scenes of 2 to 6 objects with boxes, attributes and relations.

An example is a function of (split, index) alone. Its caption names one object, its long text all of them and
how they lie. `exchanged` gives hard negatives: a statement of the long text with an attribute or the relation
exchanged, which is never true of the scene by accident.

No relation says left or right, since training mirrors images and keeps their texts.

Shapes: coordinates are shares of the image's side, (0, 0) is top left.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from functools import cache, lru_cache, partial
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .dataset import Example
from .shapes import COLOURS, SHAPES, outline

SPLIT_SIZES = {"train": 10_000, "val": 200, "test": 500}
SIZE_PX = 96
RADII = {"large": 0.14, "small": 0.09}
KINDS = tuple(kind for kind in SHAPES if kind != "hexagon")  # so small it looks like a circle
TEXTURES = ("plain", "striped", "speckled", "chequered")
GROUNDS = {
    "white": "a white background",
    "grey": "a grey background",
    "sky": "sky",
    "grass": "grass",
    "sand": "sand",
    "water": "water",
}
"""Name -> how a caption says it."""
OPPOSITES = {"above": "below", "below": "above", "in front of": "behind", "behind": "in front of"}
RELATIONS = (*OPPOSITES, "beside")
Exchange = Literal["attributes", "relation"]
EXCHANGES: tuple[Exchange, ...] = ("attributes", "relation")

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

_OVERLAPPING = 0.4  # share of the scenes in which one object partly hides another
_JITTER = 0.03
_PERIOD = 1 / 16  # of a texture
_SUPERSAMPLING = 4


class Look(NamedTuple):
    """What an object looks like, in the order in which texts say it."""

    size: str
    colour: str
    texture: str
    kind: str

    @property
    def words(self) -> str:
        return " ".join(self)


LOOKS = tuple(Look(*words) for words in itertools.product(RADII, COLOURS, TEXTURES, KINDS))


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    look: Look
    x: float
    y: float
    layer: int = 0
    """Of two objects that overlap, the one with the larger layer is in front."""

    @property
    def radius(self) -> float:
        return RADII[self.look.size]

    @property
    def box(self) -> Box:
        """The smallest box around the object, what another hides included."""
        left, top, right, bottom = (share * self.radius for share in _extent(self.look.kind))
        return self.x + left, self.y + top, self.x + right, self.y + bottom


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects in the order in which the long text names them."""

    ground: str
    things: tuple[Thing, ...]
    seed: int = 0
    """Seed of the background's noise."""


@dataclasses.dataclass(frozen=True)
class Statement:
    """A sentence on two objects, true or false."""

    one: Look
    relation: str
    other: Look

    @property
    def text(self) -> str:
        return f"A {self.one.words} is {self.relation} a {self.other.words}."


def make_scene(split: str, index: int) -> Scene:
    """Sample the scene of one example; every scene allows both kinds of exchange."""
    rng = random.Random(f"scenes/{split}/{index}")  # seeded by text: the splits share no seed
    while True:
        scene = _sample_scene(rng)
        if not _is_crowded(scene) and all(_exchange(scene, what) for what in EXCHANGES):
            return scene


def _sample_scene(rng: random.Random) -> Scene:
    count = rng.randint(2, 6)
    cells = rng.sample(range(9), count)
    things = []
    for look, cell in zip(rng.sample(LOOKS, count), cells, strict=True):
        row, column = divmod(cell, 3)
        x = (column + 0.5) / 3 + rng.uniform(-_JITTER, _JITTER)
        y = (row + 0.5) / 3 + rng.uniform(-_JITTER, _JITTER)
        things.append(Thing(look, x, y))
    if rng.random() < _OVERLAPPING:
        first, second = things[:2]
        angle = rng.uniform(0, 2 * math.pi)
        distance = 0.7 * (first.radius + second.radius)
        x = first.x + distance * math.cos(angle)
        y = first.y + distance * math.sin(angle)
        things[1] = dataclasses.replace(second, x=x, y=y, layer=rng.choice((-1, 1)))
        rng.shuffle(things)  # else the first sentence would always be the one of the overlap
    return Scene(rng.choice(list(GROUNDS)), tuple(things), rng.randrange(2**32))


def _is_crowded(scene: Scene) -> bool:
    """Whether an object leaves the image, or more than two objects overlap."""
    pairs = list(itertools.combinations(scene.things, 2))
    close = sum(_distance(one, other) < one.radius + other.radius for one, other in pairs)
    overlapping = sum(_overlap(one, other) for one, other in pairs)
    leaves = any(
        not thing.radius <= share <= 1 - thing.radius
        for thing in scene.things
        for share in (thing.x, thing.y)
    )
    return leaves or close != overlapping or overlapping > 1


def _distance(one: Thing, other: Thing) -> float:
    return math.hypot(one.x - other.x, one.y - other.y)


def _overlap(one: Thing, other: Thing) -> bool:
    return one.layer != other.layer and _distance(one, other) < 0.75 * (one.radius + other.radius)


def relation_of(one: Thing, other: Thing) -> str:
    """Return how the long text says that `one` lies to `other`."""
    if _overlap(one, other):
        return "in front of" if one.layer > other.layer else "behind"
    if abs(one.y - other.y) > abs(one.x - other.x):
        return "above" if one.y < other.y else "below"
    return "beside"


def holds(relation: str, one: Thing, other: Thing) -> bool:
    """Whether a relation is true of two objects, whichever of its relations a text would name."""
    if relation in ("above", "below"):
        higher, lower = (one, other) if relation == "above" else (other, one)
        return higher.y < lower.y
    return relation_of(one, other) == relation


def is_true(statement: Statement, scene: Scene) -> bool:
    """Whether any two objects of the scene look and lie as the statement says."""
    return any(
        (one.look, other.look) == (statement.one, statement.other) and holds(statement.relation, one, other)
        for one, other in itertools.permutations(scene.things, 2)
    )


def statements_of(scene: Scene) -> list[Statement]:
    """Return what the long text says: how each object lies to the next one."""
    return [
        Statement(one.look, relation_of(one, other), other.look)
        for one, other in itertools.pairwise(scene.things)
    ]


def exchanged(scene: Scene, what: Exchange) -> tuple[Statement, Statement]:
    """Return the first statement of the long text that allows the exchange, and its false twin.

    Attributes: the two objects exchange their colours, or where these agree texture, size or shape. Relation:
    above and below, in front of and behind. "Beside" has no twin that is as frequent, so that a blind model
    could tell them apart, and is left out.

    Raises:
        ValueError: no statement allows it; in the scenes of `make_scene` one does.
    """
    pair = _exchange(scene, what)
    if pair is None:
        raise ValueError(f"no statement on {len(scene.things)} objects has a false twin; add another object")
    return pair


def _exchange(scene: Scene, what: Exchange) -> tuple[Statement, Statement] | None:
    looks = {thing.look for thing in scene.things}
    for statement in statements_of(scene):
        for twin in _twins(statement, what):
            # Objects with exchanged attributes must not lie elsewhere: the phrases are false, too.
            exists = what == "attributes" and {twin.one, twin.other} & looks
            if not exists and not is_true(twin, scene):
                return statement, twin
    return None


def _twins(statement: Statement, what: Exchange) -> list[Statement]:
    if what == "relation":
        opposite = OPPOSITES.get(statement.relation)
        return [dataclasses.replace(statement, relation=opposite)] if opposite else []
    one, other = statement.one, statement.other
    return [
        Statement(
            one._replace(**{name: getattr(other, name)}),
            statement.relation,
            other._replace(**{name: getattr(one, name)}),
        )
        for name in ("colour", "texture", "size", "kind")
        if getattr(one, name) != getattr(other, name)
    ]


def caption_of(scene: Scene, thing: Thing) -> str:
    """Write the short caption that names this object."""
    return f"A {thing.look.words} on {GROUNDS[scene.ground]}."


def long_text_of(scene: Scene) -> str:
    """Write all objects, how they lie, and the background."""
    sentences = [statement.text for statement in statements_of(scene)]
    return " ".join([*sentences, f"The background is {scene.ground}."])


def draw(scene: Scene, size_px: int = SIZE_PX) -> Image.Image:
    """Draw a scene as an RGB image of `size_px` squared, edges smoothed."""
    image = _ground(scene.ground, scene.seed).resize((size_px, size_px), Image.Resampling.BILINEAR)
    for thing in sorted(scene.things, key=lambda thing: thing.layer):
        picture, mask = _sprite(thing.look, size_px)
        half = picture.width / 2
        corner = round(thing.x * size_px - half), round(thing.y * size_px - half)
        image.paste(picture, corner, mask)
    return image


@lru_cache(maxsize=2 * len(LOOKS))
def _sprite(look: Look, size_px: int) -> tuple[Image.Image, Image.Image]:
    """An object by itself: its picture, and where it is opaque."""
    side = round(2 * RADII[look.size] * size_px)
    large = side * _SUPERSAMPLING
    mask = Image.new("L", (large, large), 0)
    pen = ImageDraw.Draw(mask)
    if look.kind == "circle":
        pen.ellipse((0, 0, large - 1, large - 1), fill=255)
    else:
        pen.polygon(outline(look.kind, large / 2, large / 2, large / 2), fill=255)

    colour = np.array(COLOURS[look.colour], dtype=np.float32)
    shade = 1 - 0.65 * _pattern(look.texture, large, _PERIOD * size_px * _SUPERSAMPLING)
    picture = Image.fromarray((shade[..., None] * colour).round().astype(np.uint8))
    small = (side, side)
    return picture.resize(small, Image.Resampling.BOX), mask.resize(small, Image.Resampling.BOX)


@cache
def _extent(kind: str) -> Box:
    """The box of an object of radius 1 around (0, 0)."""
    if kind == "circle":
        return -1.0, -1.0, 1.0, 1.0
    x, y = zip(*outline(kind, 0.0, 0.0, 1.0), strict=True)
    return min(x), min(y), max(x), max(y)


def _pattern(texture: str, side: int, period: float) -> np.ndarray:
    """Where a texture is dark: (side, side) bool."""
    y, x = np.mgrid[:side, :side] / period
    if texture == "striped":
        return x % 1 < 0.5
    if texture == "chequered":
        return (x % 1 < 0.5) != (y % 1 < 0.5)
    if texture == "speckled":
        return np.hypot(x % 1 - 0.5, y % 1 - 0.5) < 0.28
    return np.zeros((side, side), dtype=bool)


def _ground(name: str, seed: int) -> Image.Image:
    """The background, `SIZE_PX` squared: flat, a gradient, or one of three textures from noise."""
    rng = np.random.default_rng(seed)
    down = np.linspace(0, 1, SIZE_PX)[:, None, None]
    if name == "sky":
        pixels = (1 - down) * (120, 160, 215) + down * (240, 225, 205)
    elif name == "grass":
        blades = rng.normal(size=(SIZE_PX // 8, SIZE_PX)).repeat(8, axis=0)
        pixels = np.array((128, 150, 100)) + 22 * np.roll(blades, 4, axis=0)[..., None]
    elif name == "sand":
        pixels = np.array((214, 196, 156)) + 12 * rng.normal(size=(SIZE_PX, SIZE_PX, 1))
    elif name == "water":
        bend = rng.uniform(0, 2 * math.pi, size=2)
        across = np.linspace(0, 2 * math.pi, SIZE_PX)
        waves = np.sin(60 * down[..., 0] + bend[0] + 2 * np.sin(across + bend[1]))
        pixels = np.array((130, 170, 190)) + 18 * waves[..., None]
    else:
        pixels = np.array({"white": 250.0, "grey": 150.0}[name])
    whole = np.broadcast_to(pixels, (SIZE_PX, SIZE_PX, 3))
    return Image.fromarray(whole.clip(0, 255).astype(np.uint8))


def scenes_examples(split: str, count: int | None = None, size_px: int = SIZE_PX) -> list[Example]:
    """Make the first `count` examples of a split, by default as many as `SPLIT_SIZES` says."""
    count = SPLIT_SIZES[split] if count is None else count
    return [_example(split, index, size_px) for index in range(count)]


def _example(split: str, index: int, size_px: int) -> Example:
    scene = make_scene(split, index)
    caption = caption_of(scene, scene.things[0])
    return Example(
        f"{split}-{index:05d}", partial(draw, scene, size_px), (caption,), long_text_of(scene), split
    )
