"""Settings of the tokenizer: its size, its quantiser, its losses, how it is trained.

Nothing here imports torch: help and mistakes on the command line are answered without it.

Shapes: h w token grid, K codes, E code width.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from tavq.alignment.config import NUM_LEVELS, AlignmentConfig, LGVQConfig
from tavq.base.bounds import check_bounds
from tavq.training.config import TrainingConfig


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """How latents become ids."""

    name: Literal["nearest", "cvq", "sgc", "simvq", "ibq", "fsq"] = "nearest"
    num_codes: int = 1024
    code_dim: int = 16
    gradient: Literal["straight-through", "rotation"] = "straight-through"
    """How the reconstruction's gradient passes the quantiser (all but ibq and fsq)."""
    commitment: float = 0.05
    """Weight of the commitment loss, beside 1 for the codebook loss. Too strong, codes and latents
    collapse."""
    usage_decay: float = 0.95
    """Decay of the running usage of each code (for nearest, cvq and sgc)."""
    restart_below: float = 0.1
    """A code used less often than this fraction of the mean is restarted from the batch (for nearest and
    sgc)."""
    entropy_weight: float = 0.05
    """Weight of the entropy penalty (for ibq)."""
    temperature: float = 0.1
    """Temperature of the softmax over codes (for ibq and cvq)."""
    num_classes: int = 64
    """Semantic classes (for sgc): clusters, or at least the segmentation model's classes."""
    semantic_weight: float = 0.5
    """Weight of the distance in meaning beside that in features (for sgc)."""
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)

    def __post_init__(self) -> None:
        check_bounds(
            self,
            num_codes=(2, 2**24),
            code_dim=(1, 2**14),
            commitment=(0, 1e6),
            usage_decay=(0, 1),
            restart_below=(0, 1),
            entropy_weight=(0, 1e6),
            temperature=(1e-6, 1e6),
            num_classes=(2, 2048),
            semantic_weight=(0, 1e6),
            fsq_levels=(2, 2**16),
        )
        product = math.prod(self.fsq_levels)
        if self.name == "fsq" and self.num_codes != product:
            raise ValueError(
                f"fsq_levels {self.fsq_levels} make {product} codes, num_codes is {self.num_codes}; "
                f"set it to {product}"
            )


@dataclasses.dataclass(frozen=True)
class TokenizerShape:
    """Size of the tokenizer."""

    image_size_px: int = 96
    """Side of the images that are read."""
    channels: tuple[int, ...] = (96, 192)
    """Width of each stage; every stage but the first halves the resolution."""
    patch_px: int = 4
    """Side of the squares of pixels that become channels before the first stage (space to depth)."""
    blocks_per_stage: int = 1
    """Residual blocks of a stage in the encoder; the decoder has one more."""
    trunk_blocks: int = 4
    """Attention blocks on the token grid in the encoder; the last three give the levels."""
    num_heads: int = 6
    """Heads of each attention block."""
    fuse_levels: bool = False
    """Add what the first two levels see to the codes that are decoded (the pyramid of SGC-VQGAN)."""
    projection_width: int = 192
    """Hidden width of the projections from codes to text."""
    decoder_blocks: int = 1
    """Attention blocks on the token grid in the decoder."""
    upsample_channels: tuple[int, ...] = ()
    """Width of each decoder stage behind those that mirror the encoder; each doubles the resolution. Empty:
    one pixel shuffle back to `image_size_px`, as weights of before 0.2 have it."""
    upsample_from: int = 0
    """Side that the decoder's map is resampled to before those stages, for sizes that doubling alone does not
    reach: 28 and three stages give 224 px. 0 leaves the map as it is."""
    decoder_noise: bool = False
    """Add noise to the map of each of these stages, from which fine texture can be made."""
    quantizer: QuantizerConfig = QuantizerConfig()

    def __post_init__(self) -> None:
        check_bounds(
            self,
            image_size_px=(1, 8192),
            channels=(1, 2**14),
            patch_px=(1, 256),
            blocks_per_stage=(0, 1000),
            trunk_blocks=(1, 1000),
            num_heads=(1, 1024),
            projection_width=(1, 2**16),
            decoder_blocks=(1, 1000),
        )
        if self.upsample_channels:
            check_bounds(
                self, upsample_channels=(1, 2**14), upsample_from=(0, 4096), decode_size_px=(1, 16384)
            )
        elif self.upsample_from:
            raise ValueError("upsample_from needs upsample_channels; give the width of each stage")
        if self.image_size_px % self.downsampling:
            raise ValueError(
                f"image_size_px is {self.image_size_px}, expected a multiple of the downsampling, "
                f"{self.downsampling}; choose another size"
            )
        if self.trunk_blocks <= NUM_LEVELS:
            raise ValueError(f"trunk_blocks is {self.trunk_blocks}, expected at least {NUM_LEVELS + 1}")
        if self.channels[-1] % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide the trunk width {self.channels[-1]}"
            )

    @property
    def code_dim(self) -> int:
        """Width of a code (E)."""
        quantizer = self.quantizer
        return len(quantizer.fsq_levels) if quantizer.name == "fsq" else quantizer.code_dim

    @property
    def downsampling(self) -> int:
        """Pixels a token side."""
        return self.patch_px * 2 ** (len(self.channels) - 1)

    @property
    def grid_size(self) -> tuple[int, int]:
        """(h, w)."""
        side = self.image_size_px // self.downsampling
        return side, side

    @property
    def stage_size(self) -> int:
        """Side of the decoder's map where its mirrored stages end."""
        return self.image_size_px // self.patch_px

    @property
    def map_size(self) -> int:
        """Side of the decoder's map where the stages of `upsample_channels` begin."""
        return self.upsample_from or self.stage_size

    @property
    def decode_size_px(self) -> int:
        """Side of decoded images; `image_size_px` is that of the images that are read."""
        if not self.upsample_channels:
            return self.image_size_px
        return self.map_size * 2 ** len(self.upsample_channels)


PRESETS: dict[str, TokenizerShape] = {
    "flickr8k": TokenizerShape(decoder_blocks=3, upsample_channels=(64, 32, 16)),
    "tiny": TokenizerShape(
        image_size_px=32,
        channels=(32, 48),
        num_heads=3,
        projection_width=64,
        upsample_channels=(24, 16, 16),
        quantizer=QuantizerConfig(num_codes=64, code_dim=16),
    ),
    "vqgan256": TokenizerShape(
        image_size_px=256,
        channels=(64, 128, 256, 512),
        patch_px=2,
        blocks_per_stage=2,
        trunk_blocks=6,
        num_heads=8,
        projection_width=512,
        decoder_blocks=2,
        upsample_channels=(64,),
        quantizer=QuantizerConfig(num_codes=1024, code_dim=256),
    ),
}


@dataclasses.dataclass(frozen=True)
class ReconstructionLossConfig:
    """Weights of the losses that compare a decoded image with its original."""

    l1: float = 1.0
    """Weight of the pixel loss."""
    l1_size_px: int = 48
    """Both images are averaged down to about this size before pixels are compared, since detail finer than
    a token is invented and pixel losses only punish it. 0 compares every pixel."""
    perceptual: float = 1.5
    """Weight of the distance between feature maps."""
    first_map: int = 1
    """First map of the network that the perceptual and texture losses compare; 0 is the finest."""
    texture: float = 0.0
    """Weight of the distance between local means and deviations of the maps."""
    adversarial: float = 0.8
    """Gradient norm of the adversarial loss relative to that of the losses above; needs --perceptual. 0
    leaves it out."""
    adversarial_start: float = 0.03
    """Fraction of training after which the adversarial loss starts."""
    discriminator_maps: tuple[int, ...] = ()
    """Maps of the network that the discriminator sees; empty takes all."""
    discriminator_rate: float = 2e-4
    """Peak learning rate of the discriminator."""
    augmentation: float = 0.0
    """Probability with which an image and its reconstruction are augmented alike before the network sees
    them."""
    window_px: int = 128
    """Side of the part of each image that is decoded and compared in a training step. 0 takes whole
    images."""

    def __post_init__(self) -> None:
        for name in ("adversarial_start", "augmentation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")


@dataclasses.dataclass(frozen=True)
class LossConfig(ReconstructionLossConfig):
    """Weights of the losses; those of `align` and `distill`, too, are shares of the reconstruction's gradient
    norm."""

    adversarial_start: float = 0.5
    quantizer: float = 1.0
    align: float = 1.0
    distill: float = 0.5
    decode_every: int = 1
    """In one of so many steps the decoder is run and the reconstruction felt; the others teach the encoder
    alone, at a third of the cost."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decode_every < 1:
            raise ValueError(f"decode_every is {self.decode_every}, expected 1 or more")


@dataclasses.dataclass(frozen=True)
class TokenizerRun:
    """Train the TA-VQ tokenizer (image <-> ids, aligned with text).

    Example: tavq train tokenizer --data flickr8k/ --out runs/mine/tokenizer --perceptual squeezenet_layers.pt
    """

    data: str = "shapes"
    """Dataset: a directory in any known layout; shards, also by URL; hf:OWNER/NAME, a dataset of the hub,
    with options behind a ? (docs/training.md); `shapes` or `scenes` (generated)."""
    keep: Path | None = None
    """File of the images and captions to train on, as tavq check-data writes it; all by default."""
    images: tuple[Path, ...] = ()
    """Folders of more images, which need no captions; reconstruction and distillation see them."""
    out: Path = Path("runs/tokenizer")
    """Directory of the run; holds the checkpoint, its log and the state to resume from."""
    preset: str = "flickr8k"
    """flickr8k, tiny (seconds on a CPU) or vqgan256 (256 px, f16, the setting of LG-VQ)."""
    config: Path | None = None
    """YAML file of these fields, instead of a preset."""
    dry_run: bool = False
    """Show shapes, parameters, memory and time of this training, measured in a few steps; write nothing."""
    start: Path | None = None
    """Tokenizer to go on from; its shape stands."""
    align: Literal["ot", "gaussian", "filip", "lgvq", "none"] = "ot"
    """How codes are aligned with text; `lgvq` and `none` (plain VQ) are the baselines."""
    perceptual: str | None = None
    """`lpips`, or the path of a TorchScript network that gives feature maps; without it L1 alone.
    A TorchScript file is a program: it runs only if networks.lock or TAVQ_TRUST holds its SHA-256."""
    distill: Path | None = None
    """TorchScript vision network whose last map the latents learn to predict. A program, trusted as that of
    --perceptual is."""
    cache: Literal["disk", "none"] = "disk"
    """Whether the maps of --distill are kept on disk, computed once, or not: `none` computes them in each
    batch, for datasets whose maps would fill the disk (with SqueezeNet 147 KB an image, at 12 x 12), and
    takes about a tenth more time (docs/scale.md)."""
    classes: str | None = None
    """Where semantic classes come from, for --model.quantizer.name sgc: a TorchScript vision network (.pt),
    whose maps are clustered (a program, trusted as that of --perceptual is), or a directory or hf:OWNER/NAME
    of a transformers segmentation model."""
    text_encoder: str = "minilm"
    """minilm, or a directory or hf:OWNER/NAME of a transformers text model."""
    min_usage: float = 0.0
    """Share of codes in use on the validation split below which training ends with an error; 0 only warns."""
    model: TokenizerShape = PRESETS["flickr8k"]
    alignment: AlignmentConfig = AlignmentConfig()
    """Options for --align ot, gaussian and filip."""
    fit_steps: int = 500
    """After the last step, fit the way from codes to text once more in so many steps; 0 does not."""
    lgvq: LGVQConfig = LGVQConfig()
    losses: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig(
        steps=2000,
        batch_size=16,
        learning_rate=1.5e-3,
        warmup_steps=100,
        betas=(0.9, 0.95),
        optimizer="muon",
        ema_decay=0.998,
        evaluate_every=700,
    )

    def __post_init__(self) -> None:
        if self.align != "none" and self.model.quantizer.name == "fsq":
            raise ValueError(
                "fsq has no learned codebook to align; add --align none, or choose another quantizer"
            )
        if (self.model.quantizer.name == "sgc") != (self.classes is not None):
            raise ValueError("--classes and --model.quantizer.name sgc go together; give both or neither")
        if self.images and self.align == "lgvq":
            raise ValueError(
                "LG-VQ reads a caption of every image; leave out --images, or choose another --align"
            )


RUN_PRESETS: dict[str, TokenizerRun] = {
    "flickr8k": TokenizerRun(),
    "tiny": TokenizerRun(
        preset="tiny",
        model=PRESETS["tiny"],
        alignment=AlignmentConfig(samples=16, bank_size=32),
        fit_steps=20,
        training=TrainingConfig(
            steps=60, batch_size=8, learning_rate=2e-3, warmup_steps=10, ema_decay=0.9, evaluate_every=60
        ),
    ),
    "vqgan256": TokenizerRun(
        preset="vqgan256",
        model=PRESETS["vqgan256"],
        training=TrainingConfig(
            steps=100_000, batch_size=16, learning_rate=1e-4, warmup_steps=2000, evaluate_every=5000
        ),
    ),
}
