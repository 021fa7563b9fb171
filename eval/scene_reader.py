"""A small classifier that reads the objects of a drawn scene, trained on `--data scenes` alone.

It labels each cell of a grid with size, colour, texture and shape of the object there. What a prompt asks for
is looked up in these labels, and relations follow from the places of the cells.

Shapes: B images, g g grid of cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tavq.base.files import atomic_write
from tavq.base.progress import Progress
from tavq.data.images import to_tensor
from tavq.data.scenes import COLOURS, KINDS, RADII, TEXTURES, Look, Scene, Statement, draw, make_scene

SIZE_PX = 64
GRID = 16
VALUES = {"size": tuple(RADII), "colour": tuple(COLOURS), "texture": TEXTURES, "kind": (*KINDS, "nothing")}
TRAINING_SCENES = 4000
TRAINING_STEPS = 1200
BATCH = 32
LEARNING_RATE = 3e-3
LEAST_CERTAINTY = 0.5  # of a cell's shape; at the edges of objects the reader guesses
NEAR = 0.3  # the largest distance of two objects that may overlap, as a share of the image's side
SUBJECTS = ("shape", "colour", "colour and shape", "relation")


class SceneReader(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> for each attribute the logits of its values (B, values, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = [len(values) for values in VALUES.values()]
        layers: list[nn.Module] = []
        for width, wider, stride, dilation in ((3, 32, 2, 1), (32, 64, 2, 1), (64, 64, 1, 1), (64, 64, 1, 2)):
            layers += [nn.Conv2d(width, wider, 3, stride, padding=dilation, dilation=dilation)]
            layers += [nn.GroupNorm(8, wider), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(64, sum(self.counts), 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(VALUES, self.layers(images).split(self.counts, dim=1), strict=True))

    @torch.inference_mode()
    def read(self, image: Image.Image) -> ReadScene:
        """Label the cells of one image of any size."""
        logits = self(to_tensor(image, SIZE_PX)[None])
        labels = {name: values[0].argmax(dim=0).numpy() for name, values in logits.items()}
        certainty = logits["kind"][0].softmax(dim=0).amax(dim=0).numpy()
        return ReadScene(labels, certainty)


class ReadScene:
    """What the reader saw in an image.

    Args:
        labels: attribute -> (g, g) indices into `VALUES`.
        certainty: (g, g), of the shape.
    """

    def __init__(self, labels: dict[str, np.ndarray], certainty: np.ndarray):
        self.labels = labels
        self.certainty = certainty

    def find(self, **asked: str) -> tuple[float, float] | None:
        """Return the place (x, y) of the surest cell that looks as asked, such as colour="red"; None if no
        cell does."""
        nothing = VALUES["kind"].index("nothing")
        fits = (self.certainty > LEAST_CERTAINTY) & (self.labels["kind"] != nothing)
        for name, value in asked.items():
            fits &= self.labels[name] == VALUES[name].index(value)
        if not fits.any():
            return None
        row, column = np.unravel_index(np.where(fits, self.certainty, -1).argmax(), fits.shape)
        return (column + 0.5) / GRID, (row + 0.5) / GRID

    def shows(self, statement: Statement) -> bool:
        """Whether both objects are there, by colour and shape, and lie as the statement says.

        Of "in front of" and "behind" it reads that the two are near each other.
        """
        one = self.find(colour=statement.one.colour, kind=statement.one.kind)
        other = self.find(colour=statement.other.colour, kind=statement.other.kind)
        if one is None or other is None:
            return False
        right, down = other[0] - one[0], other[1] - one[1]
        if statement.relation in ("in front of", "behind"):
            return np.hypot(right, down) < NEAR
        if statement.relation == "beside":
            return abs(right) >= abs(down)
        return (down > 0) == (statement.relation == "above")


def score_drawing(seen: ReadScene, looks: Sequence[Look], statements: Sequence[Statement]) -> list[float]:
    """Return the share of what was asked for that an image shows, for each of `SUBJECTS`; without statements
    for all but the last."""
    shapes = [seen.find(kind=look.kind) is not None for look in looks]
    colours = [seen.find(colour=look.colour) is not None for look in looks]
    both = [seen.find(colour=look.colour, kind=look.kind) is not None for look in looks]
    shares = [shapes, colours, both, [seen.shows(statement) for statement in statements]]
    return [float(np.mean(share)) for share in shares if share]


def cell_labels(scene: Scene) -> np.ndarray:
    """Label each cell of the grid: (4, g, g) int64 in the order of `VALUES`, -1 where nothing is learned.

    Cells around the middle of an object have its values, and cells farther than its radius from any have the
    shape "nothing".
    """
    labels = np.full((len(VALUES), GRID, GRID), -1)
    centres = (np.arange(GRID) + 0.5) / GRID
    near = np.zeros((GRID, GRID), dtype=bool)
    for thing in sorted(scene.things, key=lambda thing: thing.layer):
        distance = np.hypot(centres - thing.x, centres[:, None] - thing.y)
        near |= distance < thing.radius
        middle = distance < max(0.6 * thing.radius, 0.75 / GRID)
        for number, (name, values) in enumerate(VALUES.items()):
            labels[number, middle] = values.index(getattr(thing.look, name))
    labels[-1, ~near & (labels[-1] < 0)] = VALUES["kind"].index("nothing")
    return labels


def open_reader(path: Path) -> SceneReader:
    """Load the reader at `path`; train it first, in a minute or two, where there is none."""
    reader = SceneReader()
    if not path.is_file():
        train_reader(reader)
        with atomic_write(path) as temporary:
            save_file(reader.state_dict(), temporary)
    reader.load_state_dict(load_file(path))
    return reader.eval().requires_grad_(False)


def train_reader(reader: SceneReader, steps: int = TRAINING_STEPS, num_scenes: int = TRAINING_SCENES) -> None:
    """Train on scenes of the training split, sharp and blurred, as decoded images are."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    reader.apply(_reset)
    scenes = [make_scene("train", index) for index in range(num_scenes)]
    images = torch.stack([to_tensor(draw(scene), SIZE_PX) for scene in scenes])
    labels = torch.from_numpy(np.stack([cell_labels(scene) for scene in scenes]))
    optimizer = torch.optim.AdamW(reader.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)

    for _ in Progress(range(steps), desc="training the reader", unit="step"):
        batch = torch.randint(num_scenes, (BATCH,), generator=rng)
        small = int(torch.randint(SIZE_PX * 2 // 3, SIZE_PX + 1, (1,), generator=rng))
        shown = F.interpolate(images[batch], (small, small), mode="area")
        shown = F.interpolate(shown, (SIZE_PX, SIZE_PX), mode="bilinear")
        logits = reader(shown)
        losses = [
            F.cross_entropy(values, labels[batch, number], ignore_index=-1)
            for number, values in enumerate(logits.values())
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        module.reset_parameters()
