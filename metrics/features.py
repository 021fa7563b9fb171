"""Feature networks, and the features of image sets for the FID family.

Features are cached by the content they depend on: the network's weights and the images. The cache of
torch-fidelity goes by names and returns stale numbers.

Shapes: n images, each (3, H, W) uint8 RGB; D feature width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tavq.base.cache import cached_tensors
from tavq.base.files import file_sha256
from tavq.base.torchscript import load_torchscript

EXTENSIONS = (".png", ".jpg", ".jpeg")
BATCH_SIZE = 64
METRIC_LAYERS = ("fid", "kid", "prc", "isc")


@dataclass(frozen=True)
class FeatureNetwork:
    """A feature network that is registered with torch-fidelity."""

    name: str
    """"inception", or the stem of the TorchScript file without "_features"."""
    extractor: str
    """Name under which torch-fidelity knows the network; it holds the hash of the weights."""
    weights: Path
    """File of the weights."""
    sha256: str
    """Hash of that file."""
    layers: Mapping[str, str]
    """Metric ("fid", "kid", "prc" and, if the network classifies, "isc") -> torch-fidelity's layer name."""

    @property
    def frechet_name(self) -> str:
        """Name of the Frechet distance in these features. Only with Inception it is called FID."""
        return "FID" if self.name == "inception" else f"FD-{self.name}"


REFERENCE_SIZE_PX = 224
"""Side to which all images are squashed before they are measured."""


def load_network(path: str | Path | None = None) -> FeatureNetwork:
    """Load a feature network.

    Args:
        path: TorchScript file of a network that maps (B, 3, H, W) uint8 to (B, D); None loads Inception v3
            with the weights of the published FID.

    Raises:
        FileNotFoundError: the file is absent, or Inception's weights are and cannot be downloaded.
        PermissionError: it is a TorchScript network whose hash is not trusted.
        ValueError: the file is no TorchScript network.
    """
    return _inception() if path is None else _torchscript(Path(path))


def refuse_training_network(network: FeatureNetwork, training_networks: Mapping[str, str]) -> None:
    """Refuse a network that shaped a checkpoint to measure it.

    Args:
        network: that shall measure.
        training_networks: use in training -> sha256 of the network, at least its first 16 digits.

    Raises:
        ValueError: `network` is one of them.
    """
    for name, sha256 in training_networks.items():
        # Fewer digits could match by chance, or be no hash at all.
        if len(sha256) >= 16 and network.sha256.startswith(sha256):
            raise ValueError(
                f"the feature network {network.weights.name} shaped training (as {name}); a network that "
                "shaped training never measures: choose another with --features"
            )


class ImageSet(torch.utils.data.Dataset):
    """Images of one size, from a folder (png, jpg, not recursive, by name) or from arrays.

    Args:
        source: a folder; or a tensor or array (n, 3, H, W), or an iterable of (3, H, W), all uint8 RGB.
        image_size_px: resize the images of a folder to this square (antialiased bicubic), ignoring the aspect
            ratio.
    """

    def __init__(self, source: str | Path | Iterable[Tensor | np.ndarray], image_size_px: int | None = None):
        self.image_size_px = image_size_px
        self.files: list[Path] = []
        self.images: list[Tensor] = []
        if isinstance(source, str | Path):
            self.files = image_files(Path(source))
        else:
            self.images = [_checked(image) for image in source]
        if len(self) == 0:
            raise ValueError("no images given; expected at least one (3, H, W) uint8 array")

    def __len__(self) -> int:
        return len(self.files) or len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self._read(self.files[index]) if self.files else self.images[index]

    def _read(self, path: Path) -> Tensor:
        try:
            image = Image.open(path).convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image ({error}); remove or replace it") from error
        if self.image_size_px is not None:
            size = (self.image_size_px, self.image_size_px)
            if image.size != size:
                image = image.resize(size, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    @property
    def sha256(self) -> str:
        """Hash of the content: the bytes of the files and their new size, or the arrays and their shapes."""
        digest = hashlib.sha256(f"{self.image_size_px if self.files else None}".encode())
        for file in self.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        for image in self.images:
            digest.update(str(tuple(image.shape)).encode() + image.numpy().tobytes())
        return digest.hexdigest()


def image_files(folder: Path) -> list[Path]:
    """List the png and jpg files of a folder by name, or say what is wrong with it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; expected one with png or jpg images")
    files = sorted(path.resolve() for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"{folder} holds no png or jpg image; put the images directly into it")
    return files


ComputeFeatures = Callable[[ImageSet, FeatureNetwork, str, int], dict[str, Tensor]]
"""Images, network, device and batch size -> the features of each layer."""


def extract_features(
    images: ImageSet,
    network: FeatureNetwork,
    *,
    device: str = "cpu",
    batch_size: int = BATCH_SIZE,
    cache_dir: str | Path | None = None,
    compute: ComputeFeatures | None = None,
) -> dict[str, Tensor]:
    """Extract the features of all images.

    Args:
        images: n images of one size.
        network: the feature network.
        device: that the network runs on.
        batch_size: images per forward pass.
        cache_dir: folder in which features are kept, and looked up, by content.
        compute: computes those that are not there; `compute_features` by default.

    Returns:
        layer name -> (n, D) float32.
    """
    compute = compute or compute_features
    if cache_dir is None:
        return compute(images, network, device, batch_size)
    key = f"{network.extractor}-{images.sha256[:32]}"
    return cached_tensors(Path(cache_dir), key, lambda: compute(images, network, device, batch_size))


def compute_features(
    images: ImageSet, network: FeatureNetwork, device: str, batch_size: int
) -> dict[str, Tensor]:
    """Compute what `extract_features` returns."""
    from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

    _check_one_size(images)
    cuda = torch.device(device).type == "cuda"
    options = {"cuda": cuda, "verbose": False, "feature_extractor_weights_path": str(network.weights)}
    extractor = create_feature_extractor(network.extractor, sorted(set(network.layers.values())), **options)
    return get_featuresdict_from_dataset(
        images, extractor, batch_size, cuda, save_cpu_ram=True, verbose=False
    )


def _check_one_size(images: ImageSet) -> None:
    """Raise ValueError unless all images have one size, which batches need."""
    # Files that are resized on reading have one size.
    if images.image_size_px is not None and images.files:
        return

    first = None
    for name, size in _sizes(images):
        first = first or size
        if size != first:
            raise ValueError(f"{name} is {size}, the first image {first}; give one size, or --image-size-px")


def _sizes(images: ImageSet) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name and (width, height) of each image; of a file only the header is read."""
    for file in images.files:
        with Image.open(file) as image:
            yield file.name, image.size
    for index, tensor in enumerate(images.images):
        _, height, width = tensor.shape
        yield f"image {index}", (width, height)


def _checked(image: Tensor | np.ndarray) -> Tensor:
    image = torch.as_tensor(image)
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"an image of {image.dtype} {tuple(image.shape)}; expected uint8 (3, H, W), RGB")
    return image.cpu()


def _torchscript(path: Path) -> FeatureNetwork:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

    loaded, sha256 = load_torchscript(path)
    name = path.stem.removesuffix("_features")
    extractor = f"{name}-{sha256[:12]}"
    if extractor not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(extractor, _torchscript_extractor(path.name, loaded))
    return FeatureNetwork(
        name, extractor, path.resolve(), sha256, dict.fromkeys(("fid", "kid", "prc"), "features")
    )


def _torchscript_extractor(file_name: str, network: nn.Module) -> type:
    """Make the class that torch-fidelity registers, around one loaded network."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class TorchScriptExtractor(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **options: object):
            super().__init__(name, features_list)
            self.network = network

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "features"

        def forward(self, images: Tensor) -> tuple[Tensor]:
            features = self.network(images)
            if not isinstance(features, Tensor) or features.ndim != 2:
                shape = tuple(getattr(features, "shape", ())) or type(features).__name__
                raise ValueError(f"{file_name} gives {shape}; a feature network gives a tensor (B, D)")
            return (features.float(),)

    return TorchScriptExtractor


def _inception() -> FeatureNetwork:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    weights = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if not weights.is_file():
        weights.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(weights), progress=False)
        except (URLError, OSError) as error:
            raise FileNotFoundError(
                f"no Inception weights and no way to download them ({error}); fetch {URL_INCEPTION_V3} "
                f"and put it at {weights}, or measure in other features with --features NETWORK.pt"
            ) from error

    # The name of the file ends in the first digits of its hash, as torch.hub has it.
    sha256 = file_sha256(weights)
    if not sha256.startswith(weights.stem.rsplit("-", 1)[-1]):
        raise ValueError(
            f"{weights} is damaged (sha256 {sha256[:12]}); delete it and fetch {URL_INCEPTION_V3}"
        )

    layers = {m: FeatureExtractorInceptionV3.get_default_feature_layer_for_metric(m) for m in METRIC_LAYERS}
    return FeatureNetwork("inception", "inception-v3-compat", weights, sha256, layers)
