"""FID, KID, precision, recall and IS from features, computed by torch-fidelity.

Frechet distance: Heusel et al. 2017 (arXiv:1706.08500); KID: Binkowski et al. 2018 (arXiv:1801.01401);
precision and recall: Kynkaanniemi et al. 2019 (arXiv:1904.06991); IS: Salimans et al. 2016
(arXiv:1606.03498).

Shapes: n images, D feature width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .features import BATCH_SIZE, ComputeFeatures, FeatureNetwork, ImageSet, extract_features

KID_SUBSETS = 100
KID_SUBSET_SIZE = 250
ISC_SPLITS = 10
# Below 5 D images the covariance is poorly estimated, and the Frechet distance is mostly bias.
SMALL_FACTOR = 5

Images = str | Path | Tensor | np.ndarray | Iterable | ImageSet


@dataclass(frozen=True)
class ImageScores:
    """Distances between two sets of images in the features of one network."""

    values: dict[str, float]
    """"FID" or "FD-<network>", "KID", "precision", "recall" and, if the network classifies, "IS"."""
    deviations: dict[str, float]
    """Standard deviation of "KID" over its subsets and of "IS" over its splits."""
    n_generated: int
    n_reference: int


def image_metrics(
    generated: Images,
    reference: Images,
    network: FeatureNetwork,
    *,
    kid_subsets: int = KID_SUBSETS,
    kid_subset_size: int = KID_SUBSET_SIZE,
    seed: int = 2020,
    device: str = "cpu",
    batch_size: int = BATCH_SIZE,
    cache_dir: str | Path | None = None,
    image_size_px: int | None = None,
    compute: ComputeFeatures | None = None,
) -> ImageScores:
    """Compare generated images with reference images, as `torch_fidelity.calculate_metrics` does.

    Args:
        generated: a folder, or uint8 RGB images (n, 3, H, W); see `ImageSet`.
        reference: likewise.
        network: see `features.load_network`.
        kid_subsets: number of random subsets that KID averages over.
        kid_subset_size: images per subset; both sets must hold at least as many.
        seed: of the subsets, and of the shuffle of IS.
        device: that the network runs on.
        batch_size: images per forward pass.
        cache_dir: keeps the features of `reference` by content, for the next call. Those of `generated` are
            not kept, since they rarely come twice.
        image_size_px: resize the images of folders to this square first.
        compute: as `extract_features` takes it.
    """
    generated_set = _as_set(generated, image_size_px)
    reference_set = _as_set(reference, image_size_px)
    options: dict[str, Any] = {"device": device, "batch_size": batch_size, "compute": compute}
    features = extract_features(generated_set, network, **options)
    reference_features = extract_features(reference_set, network, cache_dir=cache_dir, **options)
    return score_features(
        features,
        reference_features,
        network,
        kid_subsets=kid_subsets,
        kid_subset_size=kid_subset_size,
        seed=seed,
    )


def score_features(
    features: dict[str, Tensor],
    reference_features: dict[str, Tensor],
    network: FeatureNetwork,
    *,
    kid_subsets: int = KID_SUBSETS,
    kid_subset_size: int = KID_SUBSET_SIZE,
    seed: int = 2020,
) -> ImageScores:
    """Compute what `image_metrics` returns, from features that `extract_features` gave."""
    pairs = {m: (features[layer], reference_features[layer]) for m, layer in network.layers.items()}
    n_generated, width = pairs["fid"][0].shape
    n_reference = len(pairs["fid"][1])
    _warn_if_small(min(n_generated, n_reference), width, network.frechet_name)

    kid, kid_deviation = kid_score(*pairs["kid"], subsets=kid_subsets, subset_size=kid_subset_size, seed=seed)
    precision, recall = precision_recall(*pairs["prc"])
    values = {
        network.frechet_name: frechet_distance(*pairs["fid"]),
        "KID": kid,
        "precision": precision,
        "recall": recall,
    }
    deviations = {"KID": kid_deviation}
    if "isc" in pairs:
        values["IS"], deviations["IS"] = inception_score(pairs["isc"][0], seed=seed)
    return ImageScores(values, deviations, n_generated, n_reference)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Compute the Frechet distance of two Gaussians, |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^1/2).

    Args:
        features: (n, D).
        reference: likewise, of another n.
    """
    _check(features, reference, at_least=2)
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    # torch-fidelity takes the covariances in float64: the trace is a small difference of large sums.
    statistics = (fid_features_to_statistics(values.cpu()) for values in (features, reference))
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def kid_score(
    features: Tensor,
    reference: Tensor,
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 2020,
) -> tuple[float, float]:
    """Compute the kernel distance: the unbiased squared MMD with a cubic polynomial kernel.

    Args:
        features: (n, D).
        reference: likewise, of another n.
        subsets: number of random subsets.
        subset_size: images per subset.
        seed: of the subsets.

    Returns:
        Mean and standard deviation over the subsets.
    """
    _check(features, reference, at_least=subset_size, hint="add images, or take a smaller KID subset")
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    options = {"kid_subsets": subsets, "kid_subset_size": subset_size, "rng_seed": seed, "verbose": False}
    result = kid_features_to_metric(features, reference, **options)
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def precision_recall(features: Tensor, reference: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Compute precision and recall: the share of each set that lies on the manifold of the other.

    Args:
        features: (n, D); precision is the share of these on the manifold of `reference`.
        reference: likewise, of another n; recall is the share of these on the manifold of `features`.
        neighbours: a set's manifold is the union of balls that reach to the k-th nearest neighbour.
    """
    _check(features, reference, at_least=neighbours + 1)
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    result = prc_features_to_metric(features, reference, prc_neighborhood=neighbours, verbose=False)
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def inception_score(logits: Tensor, *, splits: int = ISC_SPLITS, seed: int = 2020) -> tuple[float, float]:
    """Compute the inception score, exp(E KL(p(y|x) || p(y))).

    Args:
        logits: (n, classes).
        splits: number of parts of the shuffled images.
        seed: of the shuffle.

    Returns:
        Mean and standard deviation over the splits.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images for {splits} splits of IS; add images")
    result = isc_features_to_metric(logits, splits=splits, rng_seed=seed)
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]


def _as_set(images: Images, image_size_px: int | None) -> ImageSet:
    return images if isinstance(images, ImageSet) else ImageSet(images, image_size_px)


def _check(features: Tensor, reference: Tensor, *, at_least: int, hint: str = "add images") -> None:
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        shapes = f"{tuple(features.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"features of {shapes}; expected (n, D) twice, from one network")
    fewest = min(len(features), len(reference))
    if fewest < at_least:
        raise ValueError(f"{fewest} images where at least {at_least} are needed; {hint}")
    if not (torch.isfinite(features).all() and torch.isfinite(reference).all()):
        raise ValueError("features hold NaN or infinity; expected finite numbers, check the feature network")


def _warn_if_small(n: int, width: int, name: str) -> None:
    if n < SMALL_FACTOR * width:
        warnings.warn(
            f"{n} images for {width} features: {name} is strongly biased at this n; compare it at equal "
            "n only, beside the distance of real from real images, and with KID",
            stacklevel=3,
        )
