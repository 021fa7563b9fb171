"""What is asked of decoded images: pixels, features, local texture, a discriminator; and how losses are
balanced.

Shapes: B batch, C channels, H W image size in px.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.base.processes import common_generator, num_processes, sum_of_all
from tavq.base.torchscript import load_torchscript
from tavq.training.task import StepOutput

from .config import ReconstructionLossConfig
from .discriminator import ProjectedDiscriminator, augment

CROPPED_SHARE = 8  # one part in so many of a side is cut off at random before the network sees an image
MIN_CROPPED_PX = 64
DISCRIMINATOR_LEAD = 0.02  # fraction of the steps in which the discriminator trains before it is obeyed
TEXTURE_WINDOWS = 4  # windows a side in which the texture loss compares means and deviations


class FrozenNetwork:
    """A TorchScript network that teaches and is not trained; no nn.Module, so it is not saved.

    Args:
        path: a TorchScript file; float images (B, 3, H, W) in [-1, 1] -> a feature map, a vector, or a list
            of maps.
    """

    def __init__(self, path: str | Path):
        self.network, sha256 = load_torchscript(Path(path))
        self.hash = sha256[:16]
        for parameter in self.network.parameters():
            parameter.requires_grad = False
        self.device = torch.device("cpu")

    def __call__(self, images: Tensor) -> list[Tensor]:
        if images.device != self.device:
            self.network = self.network.to(images.device)
            self.device = images.device
        features = self.network(images)
        return list(features) if isinstance(features, list | tuple) else [features]


class PerceptualNetwork(FrozenNetwork):
    """A frozen network whose feature maps compare images.

    Johnson et al. 2016, arXiv:1603.08155, with the normalisation of LPIPS but no learned weights. Not LPIPS.
    """

    def distance(self, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Squared distance between maps of unit length over their channels, a mean over maps: in [0, 4]."""
        distances = [
            (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean()
            for a, b in zip(got, wanted, strict=True)
        ]
        return torch.stack(distances).mean()


class LPIPSNetwork:
    """LPIPS of Zhang et al. 2018, arXiv:1801.03924, from the `lpips` package (VGG; downloads its
    backbone)."""

    hash = "lpips-vgg"

    def __init__(self) -> None:
        try:
            import lpips
        except ImportError as error:
            raise ValueError(
                "--perceptual lpips needs the package: pip install lpips; or give a .pt file"
            ) from error
        self.lpips = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> list[Tensor]:
        lpips = self.lpips.to(images.device)
        return list(lpips.net(lpips.scaling_layer(images)))

    def distance(self, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """LPIPS from the five maps of each image: a scalar, at least 0."""
        total = got[0].new_zeros(())
        for lin, a, b in zip(self.lpips.lins[-len(got) :], got, wanted, strict=True):
            difference = (F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)).square()
            total = total + lin(difference).mean()
        return total


def open_perceptual(name: str) -> PerceptualNetwork | LPIPSNetwork:
    """`lpips`, or the path of a TorchScript network that gives feature maps."""
    return LPIPSNetwork() if name == "lpips" else PerceptualNetwork(name)


def random_crop_alike(*images: Tensor) -> tuple[Tensor, ...]:
    """Cut an eighth off height and width, at the same random place in each batch (B, C, H, W).

    A frozen network has strides. Without this they lie on the same pixels in every step, and their grid
    shows in the reconstructions. Small images stay whole.
    """
    height, width = images[0].shape[-2:]
    if min(height, width) < MIN_CROPPED_PX:
        return images
    cut_rows = height // CROPPED_SHARE
    cut_columns = width // CROPPED_SHARE
    rng = common_generator()  # one place for the batch, in all processes
    top = int(torch.randint(cut_rows + 1, (), generator=rng))
    left = int(torch.randint(cut_columns + 1, (), generator=rng))
    rows = slice(top, top + height - cut_rows)
    columns = slice(left, left + width - cut_columns)
    return tuple(image[..., rows, columns] for image in images)


def pooled_l1(got: Tensor, wanted: Tensor, size_px: int) -> Tensor:
    """Mean absolute difference of images (B, C, H, W) averaged down to about `size_px`; 0 compares every
    pixel."""
    factor = max(1, wanted.shape[-1] // size_px) if size_px else 1
    return F.l1_loss(F.avg_pool2d(got, factor), F.avg_pool2d(wanted, factor))


def texture_distance(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Squared distance between local means and deviations of feature maps, a mean over maps: at least 0.

    The Wasserstein distortion of Qiu et al. 2023, arXiv:2310.03629, for Gaussians fitted in square windows:
    grass in another place is still grass. Each channel is measured in units of its deviation over the
    wanted batch.
    """
    distances = []
    for a, b in zip(got, wanted, strict=True):
        scale = _deviation_of_channels(b) + 1e-3
        window = max(2, min(b.shape[-2:]) // TEXTURE_WINDOWS)
        mean_a, std_a = _local_moments(a / scale, window)
        mean_b, std_b = _local_moments(b / scale, window)
        distances.append((mean_a - mean_b).square().mean() + (std_a - std_b).square().mean())
    return torch.stack(distances).mean()


def _deviation_of_channels(maps: Tensor) -> Tensor:
    """The deviation of each channel over the images of all processes: (B, C, h, w) -> (1, C, 1, 1)."""
    dims = (0, 2, 3)
    if num_processes() == 1:
        return maps.std(dims, keepdim=True)
    count = maps[:, 0].numel() * num_processes()
    mean = sum_of_all(maps.sum(dims, keepdim=True)) / count
    squares = sum_of_all((maps - mean).square().sum(dims, keepdim=True))
    return (squares / (count - 1)).sqrt()


def _local_moments(maps: Tensor, window: int) -> tuple[Tensor, Tensor]:
    stride = max(1, window // 2)
    mean = F.avg_pool2d(maps, window, stride)
    variance = F.avg_pool2d(maps.square(), window, stride) - mean.square()
    return mean, (variance.clamp_min(0) + 1e-4).sqrt()  # 1e-4: the root's slope is infinite at 0


class DiscriminatorStep(nn.Module):
    """The discriminator as the training loop's second player; idle before its start."""

    def __init__(self, discriminator: ProjectedDiscriminator, first_step: int):
        super().__init__()
        self.discriminator = discriminator
        self.first_step = first_step

    def forward(self, features: tuple[list[Tensor], list[Tensor]], step: int) -> StepOutput:
        """Maps of original and decoded images, detached -> the hinge loss."""
        real, fake = features
        loss = self.discriminator.hinge_loss(real, fake)
        if step < self.first_step:
            return StepOutput(loss * 0.0, {})
        return StepOutput(loss, {"discriminator/loss": loss})


class GradientBalance(nn.Module):
    """Weights that give each auxiliary loss a stated share of the reconstruction's gradient norm.

    The adaptive weight of VQGAN (Esser et al. 2020, arXiv:2012.09841, eq. 7), for several losses, measured
    every `every` steps instead of in each, and smoothed. The weights are buffers, hence part of a checkpoint.

    Args:
        shares: name of a loss -> its gradient norm relative to the reconstruction's.
        every: steps between two measurements.
    """

    def __init__(self, shares: dict[str, float], every: int = 16):
        super().__init__()
        self.shares, self.every = shares, every
        for name in shares:
            self.register_buffer(f"weight_{name}", torch.tensor(float("nan")))

    def weigh(
        self, name: str, loss: Tensor, reference: Tensor | None, on: tuple[Tensor, ...], step: int
    ) -> Tensor:
        """`loss` times its weight.

        Args:
            reference: the reconstruction loss; None in a step without one, which measures nothing.
            on: the tensors at which the gradients are compared.
            step: of the run; decides whether to measure.
        """
        weight = getattr(self, f"weight_{name}")
        due = torch.is_grad_enabled() and loss.requires_grad and (step % self.every == 0 or weight.isnan())
        if due and reference is not None:
            ratio = self.shares[name] * _norm(reference, on) / _norm(loss, on).clamp_min(1e-8)
            ratio = ratio.to(weight.dtype)  # under autocast the norms are halves
            smoothed = torch.where(weight.isnan(), ratio, weight.lerp(ratio, 0.2))
            weight.copy_(smoothed.clamp(1e-4, 1e4))
        return weight.nan_to_num(1.0) * loss

    def report(self) -> dict[str, Tensor]:
        return {f"weight/{name}": getattr(self, f"weight_{name}") for name in self.shares}


@dataclasses.dataclass(frozen=True)
class ReconstructionResult:
    """What `ReconstructionLoss` found."""

    reconstruction: Tensor
    """Scalar: pixels, features and texture; what other losses are balanced against."""
    adversarial: Tensor | float
    """Scalar, weighed; 0 before its start."""
    features: tuple[list[Tensor], list[Tensor]] | None
    """Detached maps of originals and decoded images, for the discriminator's own step."""


class ReconstructionLoss(nn.Module):
    """Compare decoded images with their originals.

    One pass of the frozen network over both serves the perceptual, the texture and the adversarial loss.

    Args:
        config: the weights.
        perceptual: as `open_perceptual` takes it, or None: then only pixels are compared.
        steps: of the run.
        shares: further losses that a trainer weighs by `self.balance`, with their gradient's share.
    """

    def __init__(
        self,
        config: ReconstructionLossConfig,
        perceptual: str | None,
        steps: int,
        shares: dict[str, float] | None = None,
    ):
        super().__init__()
        self.config = config
        self.network = open_perceptual(perceptual) if perceptual else None
        self.balance = GradientBalance({**(shares or {}), "adversarial": config.adversarial})
        self.adversarial_step = round(config.adversarial_start * steps)
        self.discriminator_step = max(0, round((config.adversarial_start - DISCRIMINATOR_LEAD) * steps))

    @property
    def network_hash(self) -> str | None:
        """Names the network that taught; None without one."""
        return None if self.network is None else self.network.hash

    def make_discriminator(self, images: Tensor) -> DiscriminatorStep | None:
        """A discriminator that fits the network; None where the loss has none.

        Args:
            images: (B, 3, H, W) originals in [-1, 1], as large as those that training compares.
        """
        if self.network is None or not self.config.adversarial:
            return None
        with torch.no_grad():
            maps = self.network(random_crop_alike(images)[0])
        discriminator = ProjectedDiscriminator(maps, self.config.discriminator_maps)
        return DiscriminatorStep(discriminator, self.discriminator_step)

    def forward(
        self,
        got: Tensor,
        wanted: Tensor,
        report: dict[str, Any],
        step: int,
        discriminator: ProjectedDiscriminator | None = None,
    ) -> ReconstructionResult:
        """Losses of decoded images `got` against `wanted`, (B, 3, H, W) both; their parts go into
        `report`."""
        config = self.config
        report["l1"] = pooled_l1(got, wanted, config.l1_size_px)
        loss = config.l1 * report["l1"]
        if self.network is None:
            return ReconstructionResult(loss, 0.0, None)

        got_crop, wanted_crop = random_crop_alike(got, wanted)
        fake_images, real_images = augment(got_crop, wanted_crop, config.augmentation)
        with torch.no_grad():
            real = self.network(real_images)
        fake = self.network(fake_images)
        report["perceptual"] = self.network.distance(fake[config.first_map :], real[config.first_map :])
        loss = loss + config.perceptual * report["perceptual"]
        if config.texture:
            report["texture"] = texture_distance(fake[config.first_map :], real[config.first_map :])
            loss = loss + config.texture * report["texture"]

        adversarial: Tensor | float = 0.0
        if discriminator is not None and step >= self.adversarial_step:
            # Its parameters rest: this step moves the decoder, the discriminator's own step follows.
            discriminator.requires_grad_(False)
            report["adversarial"] = discriminator.generator_loss(fake)
            discriminator.requires_grad_(True)
            adversarial = self.balance.weigh("adversarial", report["adversarial"], loss, (got,), step)
        detached = ([m.detach() for m in real], [m.detach() for m in fake])
        return ReconstructionResult(loss, adversarial, detached if discriminator is not None else None)

    @torch.no_grad()
    def distances(self, got: Tensor, wanted: Tensor) -> dict[str, float]:
        """The sums over a batch of what `forward` reports as means, whole images and no chance, for an
        evaluation."""
        values = {
            "l1": pooled_l1(got, wanted, 0),
            "l1_pooled": pooled_l1(got, wanted, self.config.l1_size_px),
        }
        if self.network is not None:
            first = self.config.first_map
            values["perceptual"] = self.network.distance(
                self.network(got)[first:], self.network(wanted)[first:]
            )
        return {name: float(value) * len(wanted) for name, value in values.items()}


def _norm(loss: Tensor, on: tuple[Tensor, ...]) -> Tensor:
    gradients = torch.autograd.grad(loss, on, retain_graph=True, allow_unused=True)
    present = [g.detach().flatten() for g in gradients if g is not None]
    norm = torch.cat(present).norm() if present else loss.new_zeros(())
    return norm if num_processes() == 1 else sum_of_all(norm.square()).sqrt()
