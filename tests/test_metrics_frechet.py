"""The FID family: formula, agreement with torch-fidelity, cache by content, errors that say what to do."""

from __future__ import annotations

import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from tavq.metrics import features
from tavq.metrics.features import ImageSet, extract_features, load_network, refuse_training_network
from tavq.metrics.frechet import (
    frechet_distance,
    image_metrics,
    inception_score,
    kid_score,
    precision_recall,
)

from .conftest import save_network, trusted


class Projection(torch.nn.Module):
    """A feature network: 4 x 4 mean colours through a fixed random projection to 12 numbers."""

    def __init__(self, seed: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(48, 12, generator=torch.Generator().manual_seed(seed)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1) @ self.weight


def save_projection(path: Path, seed: int = 0) -> Path:
    return save_network(Projection(seed), path)


def save_images(folder: Path, n: int, seed: int, shift: int = 0) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(seed)
    for i in range(n):
        colour = draw.integers(0, 200, size=(4, 4, 3)).repeat(4, 0).repeat(4, 1) + shift
        Image.fromarray(colour.astype(np.uint8)).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("frechet")
    return (
        save_images(root / "g", 60, 1, 20),
        save_images(root / "r", 70, 2),
        save_projection(root / "tiny_features.pt"),
    )


def gaussian(n: int, mean: torch.Tensor, scale: torch.Tensor, seed: int) -> torch.Tensor:
    """n float64 samples whose mean and covariance are exactly `mean` and diag(scale^2)."""
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T * scale + mean


def test_two_gaussians_give_the_formula():
    mean_a, mean_b = torch.zeros(6).double(), torch.arange(6).double()
    scale_a, scale_b = torch.arange(1, 7).double(), torch.full((6,), 2.0).double()
    distance = frechet_distance(gaussian(50, mean_a, scale_a, 0), gaussian(80, mean_b, scale_b, 1))
    expected = (mean_a - mean_b).square().sum() + (scale_a - scale_b).square().sum()
    assert distance == pytest.approx(expected.item(), abs=1e-6)


def test_a_set_against_itself():
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert kid_score(x, x, subsets=20, subset_size=100)[0] == pytest.approx(0, abs=0.05)


def test_far_sets_share_nothing():
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    assert precision_recall(x, x + 100) == (0.0, 0.0)


def test_inception_score_by_hand():
    """Certain about ten equally frequent classes: 10. Certain about one: 1."""
    one_hot = torch.eye(10).repeat(10, 1) * 60
    assert inception_score(one_hot, splits=1)[0] == pytest.approx(10)
    assert inception_score(one_hot[:1].repeat(20, 1), splits=2) == (pytest.approx(1), pytest.approx(0))


def test_equal_to_torch_fidelity(folders):
    generated, reference, path = folders
    network = load_network(path)
    with warnings.catch_warnings(
        action="error", category=UserWarning
    ):  # 60 images are enough for 12 features
        scores = image_metrics(generated, reference, network, kid_subsets=10, kid_subset_size=30)
    import torch_fidelity

    theirs = torch_fidelity.calculate_metrics(
        input1=str(generated),
        input2=str(reference),
        feature_extractor=network.extractor,
        **{"fid": True, "kid": True, "prc": True, "kid_subsets": 10, "kid_subset_size": 30},
        **{"cuda": False, "verbose": False, "cache": False, "save_cpu_ram": True},
    )
    assert scores.values["FD-tiny"] == pytest.approx(theirs["frechet_inception_distance"], abs=1e-6)
    assert scores.values["KID"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert scores.deviations["KID"] == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-6)
    assert scores.values["precision"] == theirs["precision"]
    assert scores.values["recall"] == theirs["recall"]
    assert (scores.n_generated, scores.n_reference) == (60, 70)
    assert "IS" not in scores.values and "FID" not in scores.values


def test_arrays_equal_folders(folders):
    generated, reference, path = folders
    network = load_network(path)
    options = {"kid_subsets": 5, "kid_subset_size": 20}
    arrays = [torch.stack(list(ImageSet(folder))) for folder in (generated, reference)]
    from_arrays = image_metrics(*arrays, network, **options)
    assert from_arrays == image_metrics(generated, reference, network, **options)
    assert image_metrics(list(arrays[0].numpy()), arrays[1].numpy(), network, **options) == from_arrays


def test_small_sets_are_warned_about(folders):
    generated, _, path = folders
    few = torch.stack(list(ImageSet(generated)))[:30]
    with pytest.warns(UserWarning, match="30 images for 12 features: FD-tiny is strongly biased"):
        image_metrics(few, few, load_network(path), kid_subsets=2, kid_subset_size=10)


def test_cache_goes_by_content(folders, tmp_path, monkeypatch):
    _, reference, path = folders
    network, calls, extract = load_network(path), [], features.compute_features
    monkeypatch.setattr(features, "compute_features", lambda *args: calls.append(1) or extract(*args))
    images = torch.stack(list(ImageSet(reference)))
    first = extract_features(ImageSet(images), network, cache_dir=tmp_path)["features"]
    again = extract_features(ImageSet(images.clone()), network, cache_dir=tmp_path)["features"]
    assert torch.equal(first, again) and len(calls) == 1
    images[0, 0, 0, 0] += 1
    assert not torch.equal(extract_features(ImageSet(images), network, cache_dir=tmp_path)["features"], first)
    other = load_network(save_projection(tmp_path / "tiny_features.pt", seed=1))
    assert not torch.equal(extract_features(ImageSet(images), other, cache_dir=tmp_path)["features"], first)
    assert len(calls) == 3
    assert list(tmp_path.glob("*.tmp*")) == []


def test_name_carries_the_weights(tmp_path):
    a, b = (load_network(save_projection(tmp_path / f"{i}_features.pt", seed=i)) for i in (0, 1))
    assert (a.frechet_name, a.extractor) == ("FD-0", f"0-{a.sha256[:12]}")
    assert a.sha256 != b.sha256
    with pytest.raises(ValueError, match=r"shaped training \(as perceptual\)"):
        refuse_training_network(a, {"perceptual": a.sha256})
    refuse_training_network(a, {"perceptual": b.sha256})


def test_inception_without_network(tmp_path, monkeypatch):
    """Offline the error names the file and the place; a damaged file is recognised."""

    def offline(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match=r"fetch https://\S+6726825d.pth and put it at .*--features"):
        load_network()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        load_network()


def test_refused_input(folders, tmp_path):
    generated, reference, path = folders
    network = load_network(path)
    with pytest.raises(FileNotFoundError, match="no network"):
        load_network(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(PermissionError, match="is a program"):
        load_network(tmp_path / "bad.pt")
    trusted(tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="not a TorchScript file"):
        load_network(tmp_path / "bad.pt")
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImageSet(tmp_path / "none")
    with pytest.raises(ValueError, match="no png or jpg"):
        ImageSet(tmp_path)
    with pytest.raises(ValueError, match="expected uint8"):
        ImageSet(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="at least 250"):
        image_metrics(generated, reference, network)
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(torch.full((5, 2), torch.nan), torch.zeros(5, 2))
    mixed = save_images(tmp_path / "mixed", 2, 0)
    Image.new("RGB", (9, 7)).save(mixed / "z.png")
    with pytest.raises(ValueError, match=r"z\.png is \(9, 7\), the first image \(16, 16\).*--image-size-px"):
        extract_features(ImageSet(mixed), network)
    assert extract_features(ImageSet(mixed, 16), network)["features"].shape == (3, 12)
    (mixed / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        extract_features(ImageSet(mixed, 16), network)
