"""python recipes/networks.py [--out networks/]

Write the two networks that the recipes need, from torchvision's ImageNet weights (downloaded once, 19 MB):
squeezenet_layers.pt for --perceptual and --distill, and mobilenet_v2_features.pt for --features. Commands
on this machine trust the two from then on. Any TorchScript file with the same inputs and outputs can be used
instead; TAVQ_TRUST=SHA256 before a command lets it load one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.base.arguments import parse, run_main
from tavq.base.files import atomic_write
from tavq.base.torchscript import trust

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in [0, 1]
PARTS = ((0, 2), (2, 5), (5, 8), (8, 10), (10, 11), (11, 12), (12, 13))
"""Layers of SqueezeNet between the feature maps that LPIPS compares."""


class _OnImageNet(nn.Module):
    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1))


class TeacherMaps(_OnImageNet):
    """Images (B, 3, H, W) in [-1, 1] -> seven feature maps, differentiable."""

    def forward(self, images: Tensor) -> list[Tensor]:
        x = ((images + 1) / 2 - self.mean) / self.deviation
        maps = []
        for part in self.layers:
            x = part(x)
            maps.append(x)
        return maps


class Features(_OnImageNet):
    """Images (B, 3, H, W) in 0..255 -> (B, 1280)."""

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float() / 255, (224, 224), mode="bilinear", antialias=True)
        return self.layers((x - self.mean) / self.deviation).mean(dim=(2, 3))


@dataclasses.dataclass(frozen=True)
class NetworksRun:
    """Write the teacher and the feature network.

    Example: python recipes/networks.py --out networks/
    """

    out: Path = Path("networks")
    """Directory for the two files."""
    pretrained: bool = True
    """Download ImageNet weights. Without them the weights are random, which is enough to try the recipes."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(NetworksRun, argv, prog="python recipes/networks.py")
    from torchvision.models import mobilenet_v2, squeezenet1_1

    weights = "DEFAULT" if run.pretrained else None
    layers = squeezenet1_1(weights=weights).features
    teacher = TeacherMaps(nn.ModuleList(layers[start:end] for start, end in PARTS))
    features = Features(mobilenet_v2(weights=weights).features)
    for name, network in (("squeezenet_layers", teacher), ("mobilenet_v2_features", features)):
        path = run.out / f"{name}.pt"
        with atomic_write(path) as temporary:
            torch.jit.script(network.eval()).save(str(temporary))
        trust(path, "written by recipes/networks.py")
        print(path)


if __name__ == "__main__":
    main()
