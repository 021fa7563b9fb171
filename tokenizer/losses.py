"""Reconstruction losses: perceptual distance, patch discriminator, and the balance between losses by gradient
norm."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.base.files import file_hash
from tavq.training.task import StepOutput

from .blocks import group_norm

MAX_SHIFT_PX = 8  # of the random crops under perceptual loss and discriminator
CRITIC_LEAD = 0.1  # share of the steps in which the discriminator trains before it is heard


@dataclasses.dataclass(frozen=True)
class PictureLossConfig:
    """Weights of the losses that compare a decoded picture with its photo."""

    l1: float = 1.0
    perceptual: float = 1.5
    adversarial: float = 0.2
    """No factor, but a share of the reconstruction's gradient norm (see GradientBalance)."""
    adversarial_from: float = 0.75
    """Share of the steps after which the discriminator is heard; an early one ruins the reconstruction, as
    does one that has not learnt yet: it trains alone for the tenth of the steps before."""


class FrozenNetwork:
    """A TorchScript network that teaches and is not trained; no nn.Module, so it is neither saved nor
    averaged.

    Args:
        path: a TorchScript file; float images (B, 3, H, W) in [-1, 1] -> a feature map, a vector, or a list
            of maps.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no network {path}; give the path of a TorchScript file (.pt)")
        self.hash = file_hash(path)
        self.network = torch.jit.load(str(path), map_location="cpu").eval()
        for parameter in self.network.parameters():
            parameter.requires_grad = False
        self.device = torch.device("cpu")

    def __call__(self, images: Tensor) -> list[Tensor]:
        if images.device != self.device:
            self.network, self.device = self.network.to(images.device), images.device
        features = self.network(images)
        return list(features) if isinstance(features, list | tuple) else [features]

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenNetwork:
        return self  # the averaged copy of a model shares its teachers


class LearnedPerceptual:
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
        self.network = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)

    def distance(self, images: Tensor, targets: Tensor) -> Tensor:
        return self.network.to(images.device)(images, targets).mean()

    def __deepcopy__(self, memo: dict[int, Any]) -> LearnedPerceptual:
        return self


class FeaturePerceptual(FrozenNetwork):
    """Squared distance between unit-normalised feature maps of a frozen network, averaged over its maps.

    Johnson et al. 2016, arXiv:1603.08155, with the normalisation of LPIPS but no learned weights. Not LPIPS.
    In training both images (of 64 px and more) are cropped alike, from a random corner, and so are those that
    the discriminator sees: otherwise a network's strides always lie on the same pixels, and their grid shows
    in the reconstructions.
    """

    def distance(self, images: Tensor, targets: Tensor) -> Tensor:
        """(B, 3, H, W) twice, in [-1, 1] -> scalar in [0, 4]."""
        if torch.is_grad_enabled():
            images, targets = randomly_cropped(images, targets)
        with torch.no_grad():
            wanted = self(targets)
        pairs = zip(self(images), wanted, strict=True)
        return torch.stack([_normalised_distance(got, want) for got, want in pairs]).mean()


def randomly_cropped(*images: Tensor) -> tuple[Tensor, ...]:
    """Images (B, C, H, W) without `MAX_SHIFT_PX` of their rows and columns, from the same random corner;
    whole where they are small."""
    if min(images[0].shape[-2:]) < 8 * MAX_SHIFT_PX:
        return images
    height, width = (side - MAX_SHIFT_PX for side in images[0].shape[-2:])
    top, left = torch.randint(MAX_SHIFT_PX + 1, (2,)).tolist()
    return tuple(image[..., top : top + height, left : left + width] for image in images)


def _normalised_distance(got: Tensor, want: Tensor) -> Tensor:
    return (F.normalize(got, dim=1) - F.normalize(want, dim=1)).square().sum(dim=1).mean()


def open_perceptual(name: str) -> FeaturePerceptual | LearnedPerceptual:
    """`lpips`, or the path of a TorchScript network that gives feature maps."""
    return LearnedPerceptual() if name == "lpips" else FeaturePerceptual(name)


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches (Isola et al. 2016, arXiv:1611.07004). (B, 3, H, W) -> logits (B, 1, H/8,
    W/8)."""

    def __init__(self, width: int = 48):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for step in (1, 2):
            layers += [nn.Conv2d(width * step, width * step * 2, 4, stride=2, padding=1)]
            layers += [group_norm(width * step * 2), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width * 4, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Discriminator's hinge loss (Lim and Ye 2017, arXiv:1705.02894)."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


class Critic(nn.Module):
    """The patch discriminator as the loop's second player; idle before its start."""

    def __init__(self, first_step: int):
        super().__init__()
        self.discriminator, self.first_step = PatchDiscriminator(), first_step

    def forward(self, images: tuple[Tensor, Tensor], step: int) -> StepOutput:
        real, fake = images
        if step < self.first_step:
            return StepOutput(sum(p.sum() for p in self.parameters()) * 0.0, {})
        both = torch.cat(randomly_cropped(real, fake))
        real_logits, fake_logits = self.discriminator(both).chunk(2)
        loss = hinge_loss(real_logits, fake_logits)
        return StepOutput(loss, {"critic/loss": loss, "critic/real": real_logits.mean()})


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
        measurable = reference is not None and torch.is_grad_enabled() and loss.requires_grad
        if measurable and (step % self.every == 0 or weight.isnan()):
            ratio = self.shares[name] * _norm(reference, on) / _norm(loss, on).clamp_min(1e-8)
            weight.copy_(torch.where(weight.isnan(), ratio, weight.lerp(ratio, 0.2)).clamp(1e-4, 1e4))
        return weight.nan_to_num(1.0) * loss

    def report(self) -> dict[str, Tensor]:
        return {f"weight/{name}": getattr(self, f"weight_{name}") for name in self.shares}


class PictureLosses(nn.Module):
    """What is asked of decoded pictures; the base of whatever trains a decoder.

    Args:
        losses: the weights.
        perceptual: as `open_perceptual` takes it, or None.
        steps: of the run.
        shares: of further losses that a subclass weighs by `self.balance`.
    """

    def __init__(
        self,
        losses: PictureLossConfig,
        perceptual: str | None,
        steps: int,
        shares: dict[str, float] | None = None,
    ):
        super().__init__()
        self.losses = losses
        self.perceptual = open_perceptual(perceptual) if perceptual else None
        self.balance = GradientBalance({**(shares or {}), "adversarial": losses.adversarial})
        self.adversarial_from = round(losses.adversarial_from * steps)
        first = max(0, round((losses.adversarial_from - CRITIC_LEAD) * steps))
        # in a tuple: it is no part of this module
        self.critic = (Critic(first),) if losses.adversarial else ()

    def reconstruction(self, got: Tensor, images: Tensor, report: dict[str, Any]) -> Tensor:
        """L1 and perceptual distance of two batches (B, 3, H, W); the parts go into `report`."""
        report["l1"] = F.l1_loss(got, images)
        loss = self.losses.l1 * report["l1"]
        if self.perceptual is not None:
            report["perceptual"] = self.perceptual.distance(got, images)
            loss = loss + self.losses.perceptual * report["perceptual"]
        return loss

    def adversarial(
        self, got: Tensor, reconstruction: Tensor, on: Tensor, report: dict[str, Any], step: int
    ) -> Tensor | float:
        """The weighed hinge loss of the decoder, 0 before its start; the critic takes no gradient.

        Args:
            on: the decoder's last weights, where its gradient is compared with that of `reconstruction`.
        """
        if not self.critic or step < self.adversarial_from:
            return 0.0
        critic = self.critic[0].requires_grad_(False)
        report["adversarial"] = -critic.discriminator(*randomly_cropped(got)).mean()
        critic.requires_grad_(True)
        return self.balance.weigh("adversarial", report["adversarial"], reconstruction, (on,), step)

    def distances(self, got: Tensor, images: Tensor) -> dict[str, float]:
        """The sums over a batch of what `reconstruction` reports as means, for an evaluation."""
        report: dict[str, Tensor] = {}
        self.reconstruction(got, images, report)
        return {name: float(value) * len(images) for name, value in report.items()}


def _norm(loss: Tensor, on: tuple[Tensor, ...]) -> Tensor:
    gradients = torch.autograd.grad(loss, on, retain_graph=True, allow_unused=True)
    present = [g.detach().flatten() for g in gradients if g is not None]
    return torch.cat(present).norm() if present else loss.new_zeros(())
