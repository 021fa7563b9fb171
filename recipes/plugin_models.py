"""Small VQ models of other libraries for recipes/plugin.py: 64 px, 8 x 8 tokens of 512 codes.

PLUGIN_SEED seeds new weights; PLUGIN_WEIGHTS names the file or directory that `tavq align` saved.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

SIZE_PX = 64
CODES, CODE_DIM, LATENT = 512, 32, 64
WIDTHS = (16, 32, 64, 64)
WEIGHTS = os.environ.get("PLUGIN_WEIGHTS")


def diffusers() -> nn.Module:
    """`diffusers.VQModel`."""
    from diffusers import VQModel

    if WEIGHTS:
        return VQModel.from_pretrained(WEIGHTS, local_files_only=True, use_safetensors=True)
    torch.manual_seed(int(os.environ["PLUGIN_SEED"]))
    stages = len(WIDTHS)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=WIDTHS,
        latent_channels=LATENT,
        num_vq_embeddings=CODES,
        vq_embed_dim=CODE_DIM,
        norm_num_groups=8,
        sample_size=SIZE_PX,
    )


def taming() -> nn.Module:
    """VQModel of taming-transformers: pip install taming-transformers-rom1504 "pytorch-lightning<1.9"."""
    from taming.models.vqgan import VQModel

    shape = {"resolution": SIZE_PX, "in_channels": 3, "out_ch": 3, "z_channels": LATENT, "double_z": False}
    shape |= {"ch": WIDTHS[0], "ch_mult": tuple(width // WIDTHS[0] for width in WIDTHS)}
    shape |= {"num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    loss = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    return _loaded(lambda: VQModel(shape, loss, n_embed=CODES, embed_dim=CODE_DIM), "state_dict")


def vector_quantize_pytorch() -> nn.Module:
    """A plain convolutional autoencoder around `vector_quantize_pytorch.VectorQuantize`."""
    return _loaded(Autoencoder, None)


class Autoencoder(nn.Module):
    """(B, 3, H, W) -> reconstruction (B, 3, H, W), ids (B, H/8, W/8), loss."""

    def __init__(self) -> None:
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        down: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 3, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(CODE_DIM, WIDTHS[-1], 3, padding=1)]
        for i in range(len(WIDTHS) - 1):
            down += [nn.SiLU(), nn.Conv2d(WIDTHS[i], WIDTHS[i + 1], 4, stride=2, padding=1)]
            up += [
                nn.SiLU(),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(WIDTHS[-1 - i], WIDTHS[-2 - i], 3, padding=1),
            ]
        self.down = nn.Sequential(*down, nn.SiLU(), nn.Conv2d(WIDTHS[-1], CODE_DIM, 3, padding=1))
        self.up = nn.Sequential(*up, nn.SiLU(), nn.Conv2d(WIDTHS[0], 3, 3, padding=1))
        self.quantize = VectorQuantize(
            CODE_DIM, CODES, accept_image_fmap=True, learnable_codebook=True, ema_update=False
        )

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes, ids, loss = self.quantize(self.down(images))
        return self.up(codes), ids, loss


def _loaded(build: Any, key: str | None) -> nn.Module:
    if WEIGHTS is None:
        torch.manual_seed(int(os.environ["PLUGIN_SEED"]))
        return build()
    model = build()
    state = torch.load(WEIGHTS, map_location="cpu", weights_only=True)
    model.load_state_dict(state if key is None else state[key])
    return model
