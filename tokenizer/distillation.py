"""Semantic distillation: latents follow the feature maps of a frozen vision network.

A small dataset gives an encoder trained from scratch little meaning. The teacher sees the photos at full
size; the student learns to predict its maps from the latents through a head that inference never uses.
The maps are computed once and kept on disk, or anew in each batch.

Shapes: B batch, C channels of the teacher, h w token grid.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from tavq.base.arrays import ArrayWriter, DiskArray, build_once, open_arrays, transform_rows
from tavq.base.cache import cache_directory, cached_tensors
from tavq.data.dataset import ImageTextDataset
from tavq.data.images import UnreadableImageError, from_pixels, to_pixels

from .losses import FrozenNetwork

TEACHER_SIZE_PX = 224
TEACHER_BATCH = 32
MEASURED_IMAGES = 2048  # by which maps that are computed in each batch are standardised

Box = tuple[float, float, float, float]
"""A part of an image: left, top, right, bottom in [0, 1]."""


def teacher_maps(teacher: FrozenNetwork, dataset: ImageTextDataset, grid: tuple[int, int]) -> DiskArray:
    """The teacher's last map of every image, averaged to the token grid and standardised a channel.

    Kept in the cache directory under a hash of network, grid, ids and file sizes. So the teacher runs once
    an image instead of once a draw; where the disk is too small for that, see `BatchTeacher`.

    Args:
        teacher: gives maps (B, C, h', w') or vectors (B, C), which are spread over the grid.
        dataset: the training split.

    Returns:
        (n, C, h, w) float16 in a file, in the order of the dataset; that of a grey image for one that cannot
        be read.
    """
    path = build_once(
        cache_directory("teacher_maps") / f"{_key(teacher, dataset, grid)}.safetensors",
        lambda path: _write_maps(path, teacher, dataset, grid),
    )
    return open_arrays(path)["maps"]


def _key(teacher: FrozenNetwork, dataset: ImageTextDataset, grid: tuple[int, int]) -> str:
    digest = hashlib.sha256(f"{teacher.hash} {grid} {dataset.name} [".encode())
    for number, example in enumerate(dataset.examples):
        size = example.image.stat().st_size if isinstance(example.image, Path) else 0
        digest.update(f"{', ' if number else ''}{(example.id, size)}".encode())
    digest.update(b"]")
    return digest.hexdigest()[:24]


class _Moments:
    """Mean and deviation of each channel over the maps that it is given."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0.0
        self.squares: Any = 0.0

    def add(self, maps: np.ndarray) -> None:
        """Count further maps, (n, C, h, w)."""
        # Sums of squares lose digits, of which float64 has enough for what float16 holds.
        values = maps.astype(np.float64)
        self.count += values[:, 0].size
        self.total = self.total + values.sum(axis=(0, 2, 3))
        self.squares = self.squares + (values**2).sum(axis=(0, 2, 3))

    def shift_and_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and deviation, (C, 1, 1) float32 each; a deviation is above 0."""
        mean = self.total / self.count
        deviation = np.sqrt(np.maximum(self.squares - self.count * mean**2, 0) / (self.count - 1))
        shift, scale = (
            part.astype(np.float32)[:, None, None] for part in (mean, np.maximum(deviation, 1e-6))
        )
        return shift, scale


def _write_maps(path: Path, teacher: FrozenNetwork, dataset: ImageTextDataset, grid: tuple[int, int]) -> None:
    """Write the maps as they are, then standardise them where they lie."""
    moments = _Moments()
    with path.open("wb") as file:
        writer = ArrayWriter(file, "maps")
        for start in tqdm(range(0, len(dataset), TEACHER_BATCH), desc="teacher's maps", disable=None):
            indices = range(start, min(start + TEACHER_BATCH, len(dataset)))
            maps = _maps(teacher, from_pixels(teacher_pixels(dataset, indices)), grid).numpy()
            writer.append(maps)
            moments.add(maps)
        writer.finish()

    shift, scale = moments.shift_and_scale()
    transform_rows(path, "maps", lambda rows: (rows.astype(np.float32) - shift) / scale, TEACHER_BATCH)


@dataclasses.dataclass(frozen=True)
class BatchTeacher:
    """Computes the maps of `teacher_maps` in each batch, on the device where its images lie.

    Attributes:
        network: the teacher.
        grid: (h, w).
        shift: (C, 1, 1), the mean of each channel.
        scale: (C, 1, 1), its deviation.
    """

    network: FrozenNetwork
    grid: tuple[int, int]
    shift: Tensor
    scale: Tensor

    @classmethod
    def measured(
        cls, network: FrozenNetwork, dataset: ImageTextDataset, grid: tuple[int, int]
    ) -> BatchTeacher:
        """Measure how to standardise the maps, on a fixed sample of `MEASURED_IMAGES` images.

        Means and deviations alone are kept in the cache directory.
        """

        def measure() -> dict[str, Tensor]:
            chosen = np.random.default_rng(0).permutation(len(dataset))[:MEASURED_IMAGES]
            chosen.sort()
            moments = _Moments()
            for start in tqdm(range(0, len(chosen), TEACHER_BATCH), desc="teacher's scale", disable=None):
                pixels = teacher_pixels(dataset, chosen[start : start + TEACHER_BATCH].tolist())
                moments.add(_maps(network, from_pixels(pixels), grid).numpy())
            shift, scale = moments.shift_and_scale()
            return {"shift": torch.from_numpy(shift), "scale": torch.from_numpy(scale)}

        key = f"{_key(network, dataset, grid)}-{MEASURED_IMAGES}"
        return cls(network, grid, **cached_tensors(cache_directory("teacher_maps"), key, measure))

    @property
    def dim(self) -> int:
        """Channels of a map (C)."""
        return len(self.shift)

    @torch.no_grad()
    def maps_of_views(self, pixels: Tensor, boxes: Sequence[Box], flipped: Sequence[bool]) -> Tensor:
        """Compute what the teacher says of parts of images.

        Args:
            pixels: (B, 3, 224, 224) uint8, as `teacher_pixels` gives them.
            boxes: which part of each.
            flipped: whether each is seen mirrored.

        Returns:
            (B, C, h, w) float16.
        """
        # In float32 under autocast, too: these maps are those that would lie on disk.
        with torch.autocast(pixels.device.type, enabled=False):
            maps = _maps(self.network, from_pixels(pixels), self.grid).float()
        maps = ((maps - self.shift.to(maps.device)) / self.scale.to(maps.device)).half()
        views = zip(maps, boxes, flipped, strict=True)
        return torch.stack([map_of_view(map_, box, flipped=mirrored) for map_, box, mirrored in views])


@torch.no_grad()
def _maps(teacher: FrozenNetwork, images: Tensor, grid: tuple[int, int]) -> Tensor:
    last = teacher(images)[-1]
    if last.ndim == 2:
        return last[:, :, None, None].expand(-1, -1, *grid).half()
    return F.adaptive_avg_pool2d(last, grid).half()


def teacher_pixels(dataset: ImageTextDataset, indices: Sequence[int]) -> Tensor:
    """Read images as a teacher sees them, (n, 3, 224, 224) uint8; one that cannot be read is grey."""
    return torch.stack([_pixels_or_grey(dataset, index) for index in indices])


def _pixels_or_grey(dataset: ImageTextDataset, index: int) -> Tensor:
    try:
        return to_pixels(dataset.load_image(index), TEACHER_SIZE_PX)
    except UnreadableImageError:  # training skips and names it
        return torch.full((3, TEACHER_SIZE_PX, TEACHER_SIZE_PX), 128, dtype=torch.uint8)


def map_of_view(map_: Tensor, box: Box, *, flipped: bool, mode: str = "bilinear") -> Tensor:
    """What a teacher's map of a whole photo says of a part of it, on the same grid: (C, h, w) -> (C, h, w).

    Args:
        map_: of the whole photo.
        box: the part: left, top, right, bottom in [0, 1].
        flipped: whether the part is seen mirrored.
        mode: of the interpolation; "nearest" for classes, which have no mean.
    """
    if box != (0.0, 0.0, 1.0, 1.0):
        left, top, right, bottom = box
        place = torch.tensor(
            [[right - left, 0.0, left + right - 1], [0.0, bottom - top, top + bottom - 1]], device=map_.device
        )
        grid = F.affine_grid(place[None], [1, 1, *map_.shape[1:]], align_corners=False)
        read = F.grid_sample(map_[None].float(), grid, mode, padding_mode="border", align_corners=False)
        map_ = read[0].to(map_.dtype)
    return map_.flip(-1) if flipped else map_


class DistillationHead(nn.Module):
    """Predicts the teacher's maps from latents; used in training alone."""

    def __init__(self, code_dim: int, teacher_dim: int, width: int = 256):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(code_dim, width, 1), nn.GELU(), nn.Conv2d(width, teacher_dim, 1)
        )

    def forward(self, latents: Tensor, maps: Tensor) -> Tensor:
        """Mean of 1 - cosine between prediction and teacher: (B, E, h, w), (B, C, h, w) -> scalar in [0,
        2]."""
        return (1 - F.cosine_similarity(self.layers(latents), maps.float(), dim=1)).mean()
