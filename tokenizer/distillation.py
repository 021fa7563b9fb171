"""Semantic distillation: latents follow the feature maps of a frozen vision network.

A small dataset gives an encoder trained from scratch little meaning. The teacher sees the photos at full
size once, before training; the student learns to predict its maps from the latents through a head that
inference never uses.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from tavq.base.arrays import ArrayWriter, DiskArray, build_once, open_arrays, transform_rows
from tavq.base.cache import cache_directory
from tavq.data.dataset import ImageTextDataset
from tavq.data.images import UnreadableImageError, to_tensor

from .losses import FrozenNetwork

TEACHER_SIZE_PX = 224
TEACHER_BATCH = 32


def teacher_maps(teacher: FrozenNetwork, dataset: ImageTextDataset, grid: tuple[int, int]) -> DiskArray:
    """The teacher's last map of every image, averaged to the token grid and standardised a channel.

    Kept in the cache directory under a hash of network, grid, ids and file sizes. They are computed before
    training and not in each batch: the teacher would run once a draw instead of once an image, and the
    standardisation needs the maps of all images.

    Args:
        teacher: gives maps (B, C, h', w') or vectors (B, C), which are spread over the grid.
        dataset: the training split.

    Returns:
        (n, C, h, w) float16 in a file, in the order of the dataset; zero for an image that cannot be read.
    """
    digest = hashlib.sha256(f"{teacher.hash} {grid} {dataset.name} [".encode())
    for number, example in enumerate(dataset.examples):
        size = example.image.stat().st_size if isinstance(example.image, Path) else 0
        digest.update(f"{', ' if number else ''}{(example.id, size)}".encode())
    digest.update(b"]")
    path = build_once(
        cache_directory("teacher_maps") / f"{digest.hexdigest()[:24]}.safetensors",
        lambda path: _write_maps(path, teacher, dataset, grid),
    )
    return open_arrays(path)["maps"]


def _write_maps(path: Path, teacher: FrozenNetwork, dataset: ImageTextDataset, grid: tuple[int, int]) -> None:
    """Write the maps as they are, then standardise them where they lie."""
    count = 0
    total: Any = 0.0
    squares: Any = 0.0
    with path.open("wb") as file:
        writer = ArrayWriter(file, "maps")
        for start in tqdm(range(0, len(dataset), TEACHER_BATCH), desc="teacher's maps", disable=None):
            indices = range(start, min(start + TEACHER_BATCH, len(dataset)))
            maps = _maps(teacher, torch.stack([_image_or_grey(dataset, i) for i in indices]), grid).numpy()
            writer.append(maps)
            # Sums of squares lose digits, of which float64 has enough for what float16 holds.
            values = maps.astype(np.float64)
            count += values[:, 0].size
            total = total + values.sum(axis=(0, 2, 3))
            squares = squares + (values**2).sum(axis=(0, 2, 3))
        writer.finish()

    mean = total / count
    deviation = np.sqrt(np.maximum(squares - count * mean**2, 0) / (count - 1))
    shift, scale = (part.astype(np.float32)[:, None, None] for part in (mean, np.maximum(deviation, 1e-6)))
    transform_rows(path, "maps", lambda rows: (rows.astype(np.float32) - shift) / scale, TEACHER_BATCH)


@torch.inference_mode()
def _maps(teacher: FrozenNetwork, images: Tensor, grid: tuple[int, int]) -> Tensor:
    last = teacher(images)[-1]
    if last.ndim == 2:
        return last[:, :, None, None].expand(-1, -1, *grid).half()
    return F.adaptive_avg_pool2d(last, grid).half()


def _image_or_grey(dataset: ImageTextDataset, index: int) -> Tensor:
    try:
        return to_tensor(dataset.load_image(index), TEACHER_SIZE_PX)
    except UnreadableImageError:  # training skips and names it
        return torch.zeros(3, TEACHER_SIZE_PX, TEACHER_SIZE_PX)


def map_of_view(
    map_: Tensor, box: tuple[float, float, float, float], *, flipped: bool, mode: str = "bilinear"
) -> Tensor:
    """What a teacher's map of a whole photo says of a part of it, on the same grid: (C, h, w) -> (C, h, w).

    Args:
        map_: of the whole photo.
        box: the part: left, top, right, bottom in [0, 1].
        flipped: whether the part is seen mirrored.
        mode: of the interpolation; "nearest" for classes, which have no mean.
    """
    if box != (0.0, 0.0, 1.0, 1.0):
        left, top, right, bottom = box
        place = torch.tensor([[right - left, 0.0, left + right - 1], [0.0, bottom - top, top + bottom - 1]])
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
