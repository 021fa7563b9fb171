"""The TA-VQ tokenizer: image <-> grid of ids, from a hierarchical encoder whose last level alone is decoded.

Shapes: B batch, H W image size in px, h w token grid, N = h*w, C channels, D trunk width, E code width, K
    codes.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.alignment.config import NUM_LEVELS
from tavq.alignment.projections import TextProjections
from tavq.base.bounds import check_bounds
from tavq.base.precision import full_precision
from tavq.training.checkpoint import Checkpointed, tensor_hash

from .blocks import AttentionBlock, ResidualBlock, UpsampleBlock, group_norm, to_map, to_sequence
from .config import TokenizerShape
from .provenance import TokenizerProvenance, migrate_provenance
from .quantizer import QUANTIZERS

PIXEL_CHANNELS = 16  # of the decoder's last convolutions, at full resolution


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(TokenizerShape):
    """Everything that a tokenizer is built from: its size, and what training decided."""

    text_dim: int = 384
    """Width of the text encoder that the levels are projected to."""
    transport_temperature: float = 0.55
    """Temperature of the softmin over positions that scores an image against a text; epsilon + relaxation
    of the alignment."""
    provenance: TokenizerProvenance = TokenizerProvenance()
    """What shaped these weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, text_dim=(1, 2**16), transport_temperature=(1e-6, 1e6))

    @classmethod
    def of(cls, shape: TokenizerShape, **decided: Any) -> TokenizerConfig:
        """A configuration of this shape; `decided` are the other fields."""
        fields = {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)}
        return cls(**fields | decided)

    @property
    def shape(self) -> TokenizerShape:
        """The size alone."""
        names = [field.name for field in dataclasses.fields(TokenizerShape)]
        return TokenizerShape(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class Window:
    """A square part of the map where the decoder's stages of `upsample_channels` begin, in its cells."""

    top: int
    left: int
    side: int

    def of(self, maps: Tensor) -> Tensor:
        """The window of maps (B, C, h', w')."""
        return maps[..., self.top : self.top + self.side, self.left : self.left + self.side]

    def of_pixels(self, images: Tensor, pixels_per_cell: int) -> Tensor:
        """The same part of images (B, 3, H', W')."""
        scaled = Window(self.top * pixels_per_cell, self.left * pixels_per_cell, self.side * pixels_per_cell)
        return scaled.of(images)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Everything training needs of one pass through encoder, quantiser and decoder."""

    latents: tuple[Tensor, ...]
    """Three (B, E, h, w), before quantisation, shallow first."""
    ids: Tensor
    """(B, h, w) int64, of the last level."""
    images: Tensor | None
    """(B, 3, H, W), decoded from the last level alone; None where nothing was to be decoded."""
    quantizer_loss: Tensor


class Encoder(nn.Module):
    """Image -> three latent maps of the token grid. (B, 3, H, W) in [-1, 1] -> 3 x (B, E, h, w).

    Convolutions reach the token grid; attention blocks follow, since a shallow map of a convolutional encoder
    sees some ten pixels and cannot mean "dog". The levels are taken behind the last three attention blocks.
    """

    def __init__(self, config: TokenizerShape):
        super().__init__()
        channels = config.channels
        patch = config.patch_px
        stages: list[nn.Module] = [
            nn.PixelUnshuffle(patch),
            nn.Conv2d(3 * patch**2, channels[0], 3, padding=1),
        ]
        for previous, width in itertools.pairwise(channels):
            stages += [ResidualBlock(previous) for _ in range(config.blocks_per_stage)]
            stages += [nn.Conv2d(previous, width, 3, stride=2, padding=1)]
        self.stages = nn.Sequential(*stages)
        h, w = config.grid_size
        self.positions = nn.Parameter(torch.randn(1, h * w, channels[-1]) * 0.02)
        self.trunk = nn.ModuleList(
            AttentionBlock(channels[-1], config.num_heads) for _ in range(config.trunk_blocks)
        )
        code_dim = config.code_dim
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(channels[-1]), nn.Linear(channels[-1], code_dim))
            for _ in range(NUM_LEVELS)
        )
        self.fusion: nn.Linear | None = None
        if config.fuse_levels:
            self.fusion = nn.Linear((NUM_LEVELS - 1) * channels[-1], channels[-1], bias=False)
            nn.init.zeros_(self.fusion.weight)
        self.grid = config.grid_size

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        levels = self.trunk_features(images)
        return tuple(to_map(head(x), self.grid) for head, x in zip(self.heads, levels, strict=True))

    def trunk_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the heads of the three levels read: (B, 3, H, W) in [-1, 1] -> 3 x (B, N, D)."""
        x = to_sequence(self.stages(images)) + self.positions
        levels = []
        for block in self.trunk:
            x = block(x)
            levels.append(x)
        *shallow, last = levels[-NUM_LEVELS:]
        if self.fusion is not None:
            last = last + self.fusion(torch.cat(shallow, dim=-1))
        return *shallow, last


class Decoder(nn.Module):
    """Latent codes -> image. (B, E, h, w) -> (B, 3, H', W'); [-1, 1] but for over-shoot.

    With `upsample_channels` each further stage doubles the resolution and convolves. Without, one pixel
    shuffle gives all pixels of a patch at once: weights of before 0.2 do so, and their images show its
    grid.
    """

    def __init__(self, config: TokenizerShape):
        super().__init__()
        channels = config.channels[::-1]
        h, w = config.grid_size
        code_dim = config.code_dim
        self.proj_in = nn.Linear(code_dim, channels[0])
        self.positions = nn.Parameter(torch.randn(1, h * w, channels[0]) * 0.02)
        self.attention = nn.Sequential(
            *(AttentionBlock(channels[0], config.num_heads) for _ in range(config.decoder_blocks))
        )

        stages: list[nn.Module] = [ResidualBlock(channels[0])]
        for previous, width in itertools.pairwise(channels):
            stages += [nn.Upsample(scale_factor=2), nn.Conv2d(previous, width, 3, padding=1)]
            stages += [ResidualBlock(width) for _ in range(config.blocks_per_stage + 1)]
        self.stages = nn.Sequential(*stages)

        self.grid = config.grid_size
        self.scale = code_dim**0.5
        self.map_size = config.map_size
        self.pixels_per_cell = config.decode_size_px // config.map_size
        if config.upsample_channels:
            widths = itertools.pairwise((channels[-1], *config.upsample_channels))
            size = config.map_size
            stages = []
            for previous, width in widths:
                size *= 2
                stages.append(UpsampleBlock(previous, width, size if config.decoder_noise else 0))
            self.upsample = nn.Sequential(*stages)
            last = config.upsample_channels[-1]
            self.to_rgb = nn.Sequential(group_norm(last), nn.SiLU(), nn.Conv2d(last, 3, 3, padding=1))
        else:
            self.pixels = _pixel_shuffle(channels[-1], config.patch_px)
            self.last = nn.Conv2d(PIXEL_CHANNELS, 3, 3, padding=1)

    def forward(self, codes: Tensor, window: Window | None = None) -> Tensor:
        """Decode the whole image, or the part of it that `window` names (with `upsample_channels` alone)."""
        x = self.proj_in(to_sequence(codes) * self.scale) + self.positions
        x = self.stages(to_map(self.attention(x), self.grid))
        if not hasattr(self, "upsample"):
            return self.last(self.pixels(x))
        if x.shape[-1] != self.map_size:
            # Not nearest neighbours: from 24 to 28 they would show every sixth cell twice.
            x = F.interpolate(x, size=(self.map_size, self.map_size), mode="bilinear", align_corners=False)
        if window is not None:
            x = window.of(x)
        return self.to_rgb(self.upsample(x))


def _pixel_shuffle(channels: int, patch_px: int) -> nn.Sequential:
    to_pixels = nn.Conv2d(channels, PIXEL_CHANNELS * patch_px**2, 1)
    with torch.no_grad():  # all pixels of a patch start alike (ICNR, Aitken et al. 2017, arXiv:1707.02937)
        to_pixels.weight.copy_(to_pixels.weight[:: patch_px**2].repeat_interleave(patch_px**2, dim=0))
    return nn.Sequential(
        group_norm(channels),
        nn.SiLU(),
        to_pixels,
        nn.PixelShuffle(patch_px),
        nn.Conv2d(PIXEL_CHANNELS, PIXEL_CHANNELS, 3, padding=1),
        nn.SiLU(),
    )


class TAVQTokenizer(Checkpointed):
    """Image <-> grid of ids, with a codebook that is aligned with text.

    `encode`, `decode`, `num_codes`, `grid_size` and `codebook` are all that generator and captioner know of
    it. `project` takes codes to the space of the text encoder (the g_l of docs/method.md).
    """

    config_class = TokenizerConfig
    kind = "ta-vq-tokenizer"
    renamed_weights: ClassVar = {
        "decoder.trunk.": "decoder.attention.0.",
        "decoder.enter.": "decoder.proj_in.",
        "projections.marks": "projections.per_code_embedding",
        "projections.enter.": "projections.proj_in.",
        "projections.leave.": "projections.proj_out.",
    }
    float32_weights = ("quantizer.weight", "quantizer.basis", "quantizer.transform.weight")

    def __init__(self, config: TokenizerShape):
        super().__init__()
        config = config if isinstance(config, TokenizerConfig) else TokenizerConfig.of(config)
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = QUANTIZERS[config.quantizer.name](config.quantizer)
        self.projections = TextProjections(
            config.quantizer.num_codes, config.code_dim, config.projection_width, config.text_dim
        )

    @classmethod
    def migrate_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        return config | {"provenance": migrate_provenance(config.get("provenance", {}))}

    @property
    def aligned_levels(self) -> dict[int, int]:
        """Words (1), phrases (2) and sentences (3) -> the level whose codes can be compared with them.

        Those that alignment or a probe trained; none of a plain tokenizer.
        """
        levels = self.config.provenance.aligned_levels
        return {kind: level for kind, level in enumerate(levels, 1) if level}

    @property
    def num_codes(self) -> int:
        return self.config.quantizer.num_codes

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.config.grid_size

    @property
    def image_size_px(self) -> int:
        return self.config.image_size_px

    @property
    def decode_size_px(self) -> int:
        """Side of the images that `decode` gives."""
        return self.config.decode_size_px

    @property
    def codebook(self) -> Tensor:
        """(K, E)."""
        return self.quantizer.codebook.detach()

    @property
    def codebook_hash(self) -> str:
        """Names this codebook; generator and captioner record it and refuse another."""
        return tensor_hash(self.codebook)

    def forward(
        self,
        images: Tensor,
        *,
        decode: bool = True,
        window: Window | None = None,
        classes: Tensor | None = None,
    ) -> Encoded:
        """Encode, quantise the last level, decode: one training pass.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            decode: whether to decode.
            window: limits what is decoded to a part of the image, at a part of the cost.
            classes: (B, h, w) int64, semantic classes, for a quantiser that learns from them.
        """
        latents = self.encoder(self._checked(images))
        classes = None if classes is None else classes.flatten()
        with full_precision(images):
            quantized = self.quantizer(to_sequence(latents[-1]).flatten(0, 1).float(), classes)
        codes = to_map(quantized.codes.unflatten(0, (len(images), -1)), self.grid_size)
        ids = quantized.ids.view(len(images), *self.grid_size)
        return Encoded(latents, ids, self.decoder(codes, window) if decode else None, quantized.loss)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> ids (B, h, w) int64 in [0, K)."""
        return self._ids(self.encoder(self._checked(images))[-1])

    @torch.inference_mode()
    def encode_levels(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> ids of all three levels (B, 3, h, w); only the last is
        decoded."""
        return torch.stack([self._ids(latents) for latents in self.encoder(self._checked(images))], dim=1)

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """ids (B, h, w) or (B, N) int64 in [0, K) -> images (B, 3, H', W') in [-1, 1], `decode_size_px` a
        side."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_codes:
            raise ValueError(f"ids lie in [{ids.min()}, {ids.max()}], expected [0, {self.num_codes})")
        codes = self.quantizer.lookup(ids.reshape(len(ids), -1))
        return self.decoder(to_map(codes, self.grid_size)).clamp(-1, 1)

    def project(self, ids: Tensor, level: int = NUM_LEVELS) -> Tensor:
        """ids (...) of `level` (1, 2 or 3) -> vectors (..., text_dim) of unit length in the text encoder's
        space."""
        projected = self.projections(
            self.quantizer.lookup(ids), self.projections.per_code_embedding[ids], level
        )
        return F.normalize(projected, dim=-1)

    def _ids(self, latents: Tensor) -> Tensor:
        with full_precision(latents):
            ids = self.quantizer.nearest(to_sequence(latents).flatten(0, 1))
        return ids.view(latents.shape[0], *self.grid_size)  # `len` would fix the batch in torch.export

    def _checked(self, images: Tensor) -> Tensor:
        size = self.config.image_size_px
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected (B, 3, {size}, {size}); resize them first"
            )
        return images
