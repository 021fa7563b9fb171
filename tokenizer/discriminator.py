"""A projected discriminator: small heads on the maps of a frozen network, and the augmentation before it.

Sauer et al. 2021, arXiv:2111.01007: a discriminator that sees fixed random projections of pretrained features
learns from few images what one on pixels does not learn from many. The heads are those of StyleGAN-T (Sauer
et al. 2023, arXiv:2301.09515, sec. 3.2), without its conditioning.

Shapes: B batch, C channels of a map, H W image size in px, h' w' size of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tavq.base.processes import drawn_for_rows

PROJECTED_CHANNELS = 64
NORM_GROUPS = 8  # of the activations inside a head; an image by itself, so that batches do not matter
MIN_STRIDED_SIDE = 10  # a head halves maps at least this large once, to see more of them
MAX_SHIFT = 1 / 8  # of a side, by which augmentation moves an image
CUTOUT = 1 / 3  # of a side, the square that augmentation greys out


class DiscriminatorHead(nn.Module):
    """Logits for the places of one feature map. (B, C, h', w') -> (B, n)."""

    projection: Tensor

    def __init__(self, channels: int, side: int):
        super().__init__()
        # Frozen and random: a learned projection would let the head look at a few telling channels alone
        # (Sauer et al. 2021, sec. 3.2).
        self.register_buffer("projection", torch.randn(PROJECTED_CHANNELS, channels, 1, 1) * channels**-0.5)

        width = PROJECTED_CHANNELS
        strided = side >= MIN_STRIDED_SIDE
        first = nn.Conv2d(width, width, 4, 2, 1) if strided else nn.Conv2d(width, width, 3, 1, 1)
        self.first = spectral_norm(first)
        self.second = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
        self.last = spectral_norm(nn.Conv2d(width, 1, 3, padding=1))
        # Spectral norm alone leaves a head of few layers too weak to reach the hinge's margin: against a good
        # decoder its logits stay near 0. Normalised activations let it learn twice as fast.
        self.norm1 = nn.GroupNorm(NORM_GROUPS, width)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, width)

    def forward(self, features: Tensor) -> Tensor:
        x = F.conv2d(features, self.projection)
        x = F.leaky_relu(self.norm1(self.first(x)), 0.2)
        x = (x + F.leaky_relu(self.norm2(self.second(x)), 0.2)) * 2**-0.5
        return self.last(x).flatten(1)


class ProjectedDiscriminator(nn.Module):
    """One head for each chosen map of a frozen network.

    Args:
        examples: maps (B, C, h', w') of real images; give the shapes, and the statistics by which each map is
            standardised, so that no map drowns the others.
        maps: which of them; empty takes all.
    """

    def __init__(self, examples: Sequence[Tensor], maps: tuple[int, ...] = ()):
        super().__init__()
        self.maps = maps or tuple(range(len(examples)))
        self.heads = nn.ModuleList()
        for number, index in enumerate(self.maps):
            features = examples[index]
            if features.ndim != 4:
                raise ValueError("a projected discriminator needs feature maps, this network gives vectors")
            self.heads.append(DiscriminatorHead(features.shape[1], features.shape[-1]))
            self.register_buffer(f"mean_{number}", features.mean((0, 2, 3), keepdim=True))
            self.register_buffer(f"std_{number}", features.std((0, 2, 3), keepdim=True) + 1e-3)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of B images, all that the network gives -> logits (B, n), one tensor a head."""
        logits = []
        for number, (head, index) in enumerate(zip(self.heads, self.maps, strict=True)):
            mean = getattr(self, f"mean_{number}")
            std = getattr(self, f"std_{number}")
            logits.append(head((features[index] - mean) / std))
        return logits

    def generator_loss(self, fake: Sequence[Tensor]) -> Tensor:
        """Minus the mean logit of decoded images, a mean over the heads: a scalar that the decoder lowers."""
        return -torch.stack([logits.mean() for logits in self(fake)]).mean()

    def hinge_loss(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
        """The discriminator's own loss (Lim and Ye 2017, arXiv:1705.02894), a mean over the heads."""
        losses = [
            (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
            for real_logits, fake_logits in zip(self(real), self(fake), strict=True)
        ]
        return torch.stack(losses).mean()


def augment(images: Tensor, others: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Change colours, move, and grey out a square: differentiable, and alike in both batches.

    Zhao et al. 2020, arXiv:2006.10738. A discriminator that sees few images learns them by heart;
    augmented, it cannot. Image i and its counterpart in `others` get the same draw, so that losses between
    the two stay losses between the same places.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        others: of the same shape.
        probability: with which an image is augmented at all, 0 to 1.

    Returns:
        Both batches, augmented; values may leave [-1, 1] a little.
    """
    if probability == 0:
        return images, others
    batch, _, height, width = images.shape
    device = images.device
    chosen = (drawn_for_rows(torch.rand, batch, 1, 1, 1, device=device) < probability).to(images.dtype)

    brightness = (drawn_for_rows(torch.rand, batch, 1, 1, 1, device=device) - 0.5) * chosen
    saturation = 1 + (drawn_for_rows(torch.rand, batch, 1, 1, 1, device=device) * 2 - 1) * chosen * 0.5
    contrast = 1 + (drawn_for_rows(torch.rand, batch, 1, 1, 1, device=device) - 0.5) * chosen * 0.5
    place = _shifts(chosen, (height, width))
    visible = _cutout_mask(chosen, (height, width))

    augmented = []
    for batch_images in (images, others):
        grey = batch_images.mean(1, keepdim=True)
        coloured = (batch_images - grey) * saturation + grey
        mean = coloured.mean((1, 2, 3), keepdim=True)
        coloured = (coloured - mean) * contrast + mean + brightness
        moved = F.grid_sample(coloured, place, mode="nearest", padding_mode="reflection", align_corners=False)
        augmented.append(moved * visible)
    return augmented[0], augmented[1]


def _shifts(chosen: Tensor, size: tuple[int, int]) -> Tensor:
    """Sampling places (B, H, W, 2) of images moved by whole pixels, by up to `MAX_SHIFT` of a side."""
    height, width = size
    limits = torch.tensor([width, height], device=chosen.device) * MAX_SHIFT
    pixels = ((drawn_for_rows(torch.rand, len(chosen), 2, device=chosen.device) * 2 - 1) * limits).round()
    shift = 2 * pixels / torch.tensor([width, height], device=chosen.device) * chosen.view(-1, 1)

    identity = torch.eye(2, 3, device=chosen.device).expand(len(chosen), -1, -1).clone()
    identity[:, :, 2] = shift
    return F.affine_grid(identity, [len(chosen), 1, height, width], align_corners=False)


def _cutout_mask(chosen: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 1, H, W): 0 in a square at a random place of each chosen image, 1 elsewhere."""
    height, width = size
    centre = drawn_for_rows(torch.rand, len(chosen), 2, 1, 1, device=chosen.device)
    rows = (torch.arange(height, device=chosen.device).view(1, -1, 1) + 0.5) / height
    columns = (torch.arange(width, device=chosen.device).view(1, 1, -1) + 0.5) / width
    inside = ((rows - centre[:, 0]).abs() < CUTOUT / 2) & ((columns - centre[:, 1]).abs() < CUTOUT / 2)
    return 1 - inside.unsqueeze(1).to(chosen.dtype) * chosen
