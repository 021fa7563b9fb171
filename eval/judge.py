"""An independent judge: a checkpoint with a codebook of its own, whose encoder and captioner measure images.

Frechet distances in its features stand beside those of an ImageNet network, since a discriminator on ImageNet
features lowers the latter more than it improves images (Kynkaanniemi et al. 2022, arXiv:2203.06026).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tavq.base.progress import Progress
from tavq.data.dataset import ImageTextDataset
from tavq.data.images import from_pixels
from tavq.eval.evaluation import resized, squashed_images, training_networks
from tavq.eval.work import HERE, Here
from tavq.metrics.frechet import frechet_distance
from tavq.pipeline import Pipeline

JUDGE_DISTANCE = "FD-judge"
IMAGES_AT_ONCE = 20


def open_judge(source: str, pipeline: Pipeline) -> Pipeline:
    """Load the judge. Raises ValueError when it shares its codebook with the `pipeline` that it judges."""
    judge = Pipeline.from_pretrained(source, str(pipeline.device))
    if judge.tokenizer.codebook_hash == pipeline.tokenizer.codebook_hash:
        raise ValueError(
            f"{source} shares its codebook with what it judges; name a checkpoint trained by itself"
        )
    return judge


def shared_networks(judge: Pipeline, pipeline: Pipeline) -> list[str]:
    """Networks that shaped both the judge's tokenizer and the judged checkpoint, by hash.

    Distilled from the network whose features a decoder was trained on, a judge is less independent of it
    than its codebook is.
    """
    taught_by = set(judge.tokenizer.config.provenance.taught_by)
    return sorted(taught_by & set(training_networks(pipeline.directory).values()))


def judge_fields(judge: Pipeline, pipeline: Pipeline, parts: Sequence[str]) -> dict[str, Any]:
    """The protocol's fields of a judge: the hashes of the `parts` that measured, and what it has in common
    with the judged checkpoint."""
    return {
        "judge": {part: judge.hashes[part] for part in parts},
        "judge_shares_networks": shared_networks(judge, pipeline),
    }


def judge_features(judge: Pipeline, images: Tensor, work: Here = HERE) -> Tensor:
    """The judge's trunk features of the last level, averaged over positions.

    Args:
        judge: see `open_judge`.
        images: (n, 3, H, W) uint8; squashed to the size that the judge reads.
        work: where they are computed.

    Returns:
        (n, D) float32.
    """
    small = resized(images, judge.tokenizer.image_size_px)
    return torch.from_numpy(work(trunk_features, judge, small, batch=IMAGES_AT_ONCE)["features"])


@torch.inference_mode()
def trunk_features(judge: Pipeline, images: Tensor) -> dict[str, np.ndarray]:
    """Return the "features" of images (n, 3, S, S) uint8 of the size that the judge reads."""
    features = []
    for batch in Progress(images.split(IMAGES_AT_ONCE), desc="features of the judge"):
        trunk = judge.tokenizer.encoder.trunk_features(from_pixels(batch).to(judge.device))[-1]
        features.append(trunk.mean(dim=1).float().cpu())
    return {"features": torch.cat(features).numpy()}


class JudgeDistance:
    """The Frechet distance of images from the photos of a dataset, in the features of a judge.

    Args:
        judge: see `open_judge`.
        dataset: the evaluated photos.
        work: where features are computed.
    """

    def __init__(self, judge: Pipeline, dataset: ImageTextDataset, work: Here = HERE):
        self.judge = judge
        self.work = work
        self.reference = self._photo_features(dataset)

    def __call__(self, images: Tensor) -> float:
        """The distance of images (n, 3, H, W) uint8, of any size."""
        return frechet_distance(judge_features(self.judge, images, self.work), self.reference)

    def floors(self, shrunk: Tensor, other_split: ImageTextDataset) -> dict[str, float]:
        """What real photos get: the evaluated ones at the decoded size, and as many of another split.

        Args:
            shrunk: (n, 3, H', W') uint8, the evaluated photos at the size that is decoded; left out where
                the judge reads that size.
            other_split: left out where it has fewer photos, since the distance grows as n falls.
        """
        values: dict[str, float] = {}
        size = shrunk.shape[-1]
        if size != self.judge.tokenizer.image_size_px:  # else they are the reference itself, and it is 0
            values[f"{JUDGE_DISTANCE} of photos at {size} px"] = self(shrunk)
        features = self._photo_features(other_split)
        if len(features) == len(self.reference):
            name = f"{JUDGE_DISTANCE} of photos of another split"
            values[name] = frechet_distance(features, self.reference)
        return values

    def _photo_features(self, dataset: ImageTextDataset) -> Tensor:
        images, _ = squashed_images(dataset, self.judge.tokenizer.image_size_px)
        return judge_features(self.judge, images, self.work)
