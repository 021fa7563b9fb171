"""What the three evaluations share: their flags, the evaluated images, and which networks may measure.

Shapes: n images, H W image size in px.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tavq.base.arguments import print_json
from tavq.base.cache import cache_directory
from tavq.base.device import choose_device
from tavq.base.progress import Progress
from tavq.base.weights import CONFIG_FILE, local_directory
from tavq.captioner.config import DecodingConfig
from tavq.data.dataset import ImageTextDataset, readable_images
from tavq.data.images import to_pil, to_pixels
from tavq.data.layouts import open_dataset
from tavq.eval.config import EvaluationRun
from tavq.eval.results import format_comparison
from tavq.eval.work import HERE, Here
from tavq.metrics.features import (
    REFERENCE_SIZE_PX,
    FeatureNetwork,
    ImageSet,
    compute_features,
    load_network,
    refuse_training_network,
)
from tavq.pipeline import Pipeline
from tavq.tokenizer.provenance import migrate_provenance

CAPTIONED_AT_ONCE = 20
RESIZE = f"squashed to {REFERENCE_SIZE_PX} x {REFERENCE_SIZE_PX}, antialiased bicubic (Pillow)"


def open_evaluation(run: EvaluationRun, needs: tuple[str, ...]) -> tuple[Pipeline, ImageTextDataset]:
    """Open the checkpoint and the evaluated images.

    Args:
        run: the flags.
        needs: parts that the checkpoint must have, such as ("tokenizer", "captioner").
    """
    directory = local_directory(run.checkpoint)
    libraries = Path(sysconfig.get_path("purelib"))
    if run.publish and (not Path(run.checkpoint).is_dir() or directory.is_relative_to(libraries)):
        raise ValueError(f"results cannot lie beside the weights of {run.checkpoint}; leave out --publish")

    absent = [part for part in needs if not (directory / part / CONFIG_FILE).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{directory} has no {absent[0]}/{CONFIG_FILE}; expected a directory that holds "
            f"{', '.join(f'{part}/' for part in needs)}"
        )

    dataset = open_dataset(run.data, run.split).take(run.limit)
    return Pipeline(directory, choose_device(run.device)), dataset


def other_split(run: EvaluationRun, n: int) -> ImageTextDataset:
    """Return the first `n` examples of a split that is not evaluated."""
    return open_dataset(run.data, "train" if run.split != "train" else "val").take(n)


def protocol_fields(run: EvaluationRun, pipeline: Pipeline, dataset: ImageTextDataset) -> dict[str, Any]:
    """Return the fields of the protocol that every evaluation records."""
    return {
        "label": run.name,
        "data": dataset.name,
        "split": run.split,
        "limit": run.limit,
        "checkpoints": pipeline.hashes,
    }


def squashed_images(dataset: ImageTextDataset, size_px: int) -> tuple[Tensor, list[int]]:
    """Return the readable images, squashed to the square: (n, 3, size, size) uint8, and their indices."""
    pixels: list[Tensor] = []
    indices: list[int] = []
    for index, image in readable_images(dataset):
        pixels.append(to_pixels(image, size_px))
        indices.append(index)
    return torch.stack(pixels), indices


def at_reference_size(images: Tensor) -> Tensor:
    """Resize (n, 3, H, W) uint8 to (n, 3, 224, 224) uint8, the size at which all images are measured."""
    return resized(images, REFERENCE_SIZE_PX)


def resized(images: Tensor, size_px: int) -> Tensor:
    """Resize (n, 3, H, W) uint8 to (n, 3, size_px, size_px) uint8, antialiased bicubic (Pillow)."""
    # One at a time: as float32 all images of a split would take four times the memory.
    return torch.stack([to_pixels(uint8_to_pil(image[None])[0], size_px) for image in images])


def uint8_to_pil(images: Tensor) -> list[Image.Image]:
    """Turn (n, 3, H, W) uint8 into n RGB images."""
    return to_pil(images.float() / 127.5 - 1)


def open_network(features: Path | None, directory: Path) -> FeatureNetwork:
    """Load the feature network.

    Raises:
        ValueError: it took part in training the checkpoint in `directory`, so its distances would flatter it.
    """
    network = load_network(features)
    refuse_training_network(network, training_networks(directory))
    return network


def training_networks(directory: Path) -> dict[str, str]:
    """Return the networks that took part in training a checkpoint: what for -> hash."""
    networks: dict[str, str] = {}
    for path in sorted(directory.glob(f"*/{CONFIG_FILE}")):
        provenance = migrate_provenance(json.loads(path.read_text()).get("provenance", {}))
        for number, network in enumerate(provenance.get("taught_by", ())):
            networks[f"{path.parent.name}.taught_by[{number}]"] = network
    return networks


def kid_options(n: int) -> dict[str, int]:
    """Return the options of KID over n images: 100 subsets of 250 images, or of all if there are fewer."""
    return {"kid_subsets": 100, "kid_subset_size": min(250, n)}


def image_metric_options(n: int, device: str = "cpu", work: Here = HERE) -> dict[str, Any]:
    """Return the options of `image_metrics` over n images; features of the reference are cached."""

    def compute(images: ImageSet, network: FeatureNetwork, device: str, batch_size: int) -> dict[str, Tensor]:
        pixels = torch.stack(images.images)
        features = work(network_features, network, pixels, device, batch_size, batch=batch_size)
        return {layer: torch.from_numpy(rows) for layer, rows in features.items()}

    return {
        "cache_dir": cache_directory("image_features"),
        "device": device,
        "compute": None if work is HERE else compute,
        **kid_options(n),
    }


def network_features(
    network: FeatureNetwork, images: Tensor, device: str, batch_size: int
) -> dict[str, np.ndarray]:
    """Return the features of images (n, 3, H, W) uint8 by layer, (n, D)."""
    features = compute_features(ImageSet(images), network, device, batch_size)
    return {layer: rows.numpy() for layer, rows in features.items()}


def network_fields(network: FeatureNetwork, n: int) -> dict[str, Any]:
    """Return the fields of the protocol that describe image metrics over n images."""
    return {
        "feature_network": {"name": network.name, "sha256": network.sha256},
        "resize": RESIZE,
        **kid_options(n),
    }


def reference_set(dataset: ImageTextDataset) -> tuple[ImageSet, list[int]]:
    """Return the readable images at the size at which all images are measured, and their indices."""
    images, indices = squashed_images(dataset, REFERENCE_SIZE_PX)
    return ImageSet(images), indices


def best_captions(pipeline: Pipeline, images: Tensor, decoding: DecodingConfig) -> dict[str, np.ndarray]:
    """Return as "captions" the best caption of each image (n, 3, S, S) uint8."""
    captions: list[str] = []
    for batch in Progress(images.split(CAPTIONED_AT_ONCE), desc="captioning"):
        captions += [candidates[0].text for candidates in pipeline.caption(uint8_to_pil(batch), decoding)]
    return {"captions": np.array(captions)}


def print_report(
    run: EvaluationRun, path: Path, metrics: Mapping[str, Mapping[str, Any]], protocol: Mapping[str, Any]
) -> None:
    """Print what was measured, the reference points, and how it compares with an earlier result file.

    With --json it is one line of JSON instead.
    """
    if run.json:
        print_json({"path": str(path), "metrics": metrics, "protocol": protocol})
        return
    print_metrics(metrics, path)
    for name, value in protocol["floors"].items():
        print(f"reference point: {name} {value:.4g}")
    if run.compare is not None:
        print(format_comparison(run.compare, path))


def print_metrics(metrics: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Print one line per metric, then the path of the result file."""
    for name, entry in metrics.items():
        interval = f"  [{entry['low']:.4f}, {entry['high']:.4f}]" if "low" in entry else ""
        print(f"{name:<24}{entry['value']:>10.4f}{interval}  n={entry['n']}")
    print(path)
