"""Semantic classes of the positions of images: what the quantiser `sgc` learns from, and how pure codes are.

Classes are those of a segmentation model, or clusters of a vision network's maps, which need no names.

Shapes: n images, h w token grid, K codes, C classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tavq.base.arrays import DiskArray
from tavq.base.cache import cache_directory, cached_tensors
from tavq.base.files import file_hash
from tavq.base.hub import DATA_ONLY, TRANSFORMERS_FILES, directory_of
from tavq.base.progress import Progress
from tavq.data.dataset import ImageTextDataset, readable_images

from .distillation import map_of_view, teacher_maps
from .losses import FrozenNetwork

CLUSTERED_POSITIONS = 100_000  # from which the clusters are made
IMAGES_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class SemanticClasses:
    """The class of every position of a dataset's images."""

    ids: Tensor
    """(n, h, w) int16 in [0, C)."""
    source_hash: str
    """Names what the classes come from."""

    def of_view(self, index: int, box: tuple[float, float, float, float], *, flipped: bool) -> Tensor:
        """Classes of a part of image `index`, (h, w) int64 (see `map_of_view`)."""
        return map_of_view(self.ids[index][None], box, flipped=flipped, mode="nearest")[0].long()


def open_classes(
    source: str, dataset: ImageTextDataset, grid: tuple[int, int], num_classes: int
) -> SemanticClasses:
    """Find the class of every position. Kept in the cache directory, like a teacher's maps.

    Args:
        source: a TorchScript vision network (`.pt`), whose last maps are clustered; or a directory or
            `hf:OWNER/NAME` of a semantic-segmentation model of transformers.
        dataset: its images; those that cannot be read get class 0.
        grid: (h, w).
        num_classes: number of clusters, or of classes that the segmentation model may have at most.

    Raises:
        ValueError: the segmentation model has more classes, or is none.
    """
    if source.endswith(".pt"):
        network = FrozenNetwork(source)
        source_hash = f"{network.hash} in {num_classes} clusters"

        def find() -> dict[str, Tensor]:
            return {"ids": cluster(teacher_maps(network, dataset, grid), num_classes)}
    else:
        directory = directory_of(source, TRANSFORMERS_FILES)
        source_hash = file_hash(directory / "model.safetensors")

        def find() -> dict[str, Tensor]:
            return {"ids": segment(directory, dataset, grid, num_classes)}

    key = f"{source_hash} {num_classes} {grid} {dataset.fingerprint()}"
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    return SemanticClasses(cached_tensors(cache_directory("classes"), name, find)["ids"], source_hash)


def cluster(maps: Tensor | DiskArray, num_classes: int) -> Tensor:
    """Cluster positions by k-means, with a fixed seed.

    Args:
        maps: (n, D, h, w) features.
        num_classes: number of clusters.

    Returns:
        (n, h, w) int16 in [0, num_classes).
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise ValueError("clusters need scikit-learn: pip install scikit-learn") from error

    rows_per_image = maps.shape[2] * maps.shape[3]
    random = np.random.default_rng(0)
    chosen = random.permutation(len(maps))[: max(1, CLUSTERED_POSITIONS // rows_per_image)]
    examples = _positions(torch.as_tensor(maps[np.sort(chosen)]))
    if len(examples) < num_classes:
        raise ValueError(f"{len(examples)} positions cannot make {num_classes} clusters; give more images")
    clusters = MiniBatchKMeans(num_classes, batch_size=4096, n_init=3, random_state=0).fit(examples)
    ids = [clusters.predict(_positions(torch.as_tensor(maps[i : i + 64]))) for i in range(0, len(maps), 64)]
    return torch.from_numpy(np.concatenate(ids).astype(np.int16)).view(len(maps), *maps.shape[2:])


def _positions(maps: Tensor) -> np.ndarray:
    """(n, D, h, w) -> (n h w, D) of unit length, as clusters of directions."""
    return F.normalize(maps.float().movedim(1, -1).flatten(0, 2), dim=1).numpy()


@torch.inference_mode()
def segment(directory: Path, dataset: ImageTextDataset, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Classes that a segmentation model of transformers gives, (n, h, w) int16 in [0, num_classes)."""
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    try:
        processor = AutoImageProcessor.from_pretrained(directory, **DATA_ONLY)
        model = AutoModelForSemanticSegmentation.from_pretrained(directory, **DATA_ONLY).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{directory} is no semantic-segmentation model of transformers ({str(error).splitlines()[0]})"
        ) from error
    if model.config.num_labels > num_classes:
        raise ValueError(
            f"{directory} knows {model.config.num_labels} classes; give --model.quantizer.num-classes "
            f"{model.config.num_labels}"
        )

    ids = torch.zeros(len(dataset), *grid, dtype=torch.int16)
    for indices, images in _batches(dataset):
        logits = model(**processor(images=images, return_tensors="pt")).logits
        ids[indices] = F.adaptive_avg_pool2d(logits.softmax(dim=1), grid).argmax(dim=1).short()
    return ids


def _batches(dataset: ImageTextDataset) -> Iterator[tuple[list[int], list]]:
    indices, images = [], []
    with Progress(total=len(dataset), desc="semantic classes", unit="image") as bar:
        for index, image in readable_images(dataset):
            indices.append(index)
            images.append(image)
            bar.update(1)
            if len(indices) == IMAGES_AT_ONCE:
                yield indices, images
                indices, images = [], []
        if indices:
            yield indices, images


@dataclasses.dataclass(frozen=True)
class CodeMeaning:
    """How codes and semantic classes go together."""

    purity: float
    """Share of positions whose class is the commonest of their code's, in (0, 1]."""
    chance: float
    """The same for codes that are dealt to positions at random, as often as they are used."""
    evenness: float
    """In (0, 1]: codes are counted by their commonest class, and as many classes with equally many codes have
    the same entropy. 1 where every class has as many codes."""


def code_meaning(ids: Tensor, classes: Tensor, num_classes: int) -> CodeMeaning:
    """Compare the codes and the classes of the same positions, (...) int64 each."""
    ids, classes = ids.flatten(), classes.flatten().long()
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    owned = _counts(ids, classes, num_classes).argmax(dim=1).bincount(minlength=num_classes).double()
    share = owned / owned.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return CodeMeaning(
        _purity(ids, classes, num_classes),
        _purity(shuffled, classes, num_classes),
        float(entropy.exp() / num_classes),
    )


def _counts(ids: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """(codes in use, C): how often each of them has each class."""
    used, rows = ids.unique(return_inverse=True)
    flat = torch.bincount(rows * num_classes + classes, minlength=len(used) * num_classes)
    return flat.view(len(used), num_classes)


def _purity(ids: Tensor, classes: Tensor, num_classes: int) -> float:
    return float(_counts(ids, classes, num_classes).amax(dim=1).sum() / len(ids))
