"""Settings of the generator: its size, how it samples, how it is trained.

Nothing here imports torch: help and mistakes on the command line are answered without it.

Shapes: T text tokens, D model width.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal, get_args

from tavq.base.bounds import check_bounds
from tavq.training.config import TrainingConfig

Attention = Literal["auto", "sdpa", "xformers"]

Precision = Literal["float32", "bfloat16", "int8"]

MAX_MICRO_BATCH = 1024  # memory and time grow with it: padded places are computed, too
RENAMED_FIELDS = {"guidance": "guidance_scale"}
"""Field of `SamplingConfig` in recipes of earlier versions -> its name today."""
EARLIER_VALUES = {"guidance_schedule": "constant", "guidance_start": 0.0}
"""Fields that earlier recipes lack -> what they meant."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How ids are sampled."""

    guidance_scale: float = 7.0
    """Scale of classifier-free guidance: logits = null + scale * (text - null). 1 turns it off."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How guidance rises from the first token to the last, where it has its full scale."""
    guidance_start: float = 1 / 3
    """Part of the guidance that the first token has, 0 (none) to 1, where the schedule is not constant."""
    temperature: float = 1.0
    """Temperature of the softmax. 0 takes the likeliest code each time."""
    top_k: int = 100
    """Sample among this many likeliest codes. 0 means all."""
    top_p: float = 1.0
    """Sample among the fewest likeliest codes that hold this much probability (nucleus sampling)."""
    precision: Precision = "float32"
    """Precision of the weights while decoding. int8 (for CPUs; it also rounds the inputs of each layer) and
    bfloat16 (for CUDA) are faster and change a few tokens."""
    micro_batch: int = 1
    """Images decoded together. Smaller batches are padded to it, so that every image is computed alike."""
    draft_tokens: int = 8
    """Tokens drafted and verified in one forward pass (speculative decoding). 1 drafts none. The tokens stay
    the same. 8 with micro_batch 1 is fast for one image, 1 with micro_batch 4 for many."""
    compile: bool = False
    """Compile the forward pass with torch.compile. Compiling takes half a minute and pays on CUDA; on the CPU
    the engine's own layouts are faster (docs/experiments.md)."""

    def __post_init__(self) -> None:
        limits = {
            "guidance_scale": (0 <= self.guidance_scale < math.inf, "0 or more"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "guidance_start": (0 <= self.guidance_start <= 1, "0 to 1"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "micro_batch": (1 <= self.micro_batch <= MAX_MICRO_BATCH, f"1 to {MAX_MICRO_BATCH}"),
            "draft_tokens": (1 <= self.draft_tokens <= 2**14, f"1 (no drafts) to {2**14}"),
        }
        for name, (holds, expected) in limits.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}; change it")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is {self.precision!r}; choose {', '.join(get_args(Precision))}")
        if self.guidance_schedule not in ("constant", "linear", "cosine"):
            raise ValueError(
                f"guidance_schedule is {self.guidance_schedule!r}; choose constant, linear or cosine"
            )

    def guidance_scale_at(self, position: int, num_tokens: int) -> float:
        """Return the guidance scale of the token at `position`."""
        progress = position / max(1, num_tokens - 1)
        if self.guidance_schedule == "constant":
            return self.guidance_scale
        rise = progress if self.guidance_schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        part = self.guidance_start + (1 - self.guidance_start) * rise
        return 1 + (self.guidance_scale - 1) * part


def check_negative_prompt(text: str | None, config: SamplingConfig) -> None:
    """Raise ValueError for a negative prompt that guidance cannot lead away from."""
    if text is not None and text.strip() and config.guidance_scale == 1:
        raise ValueError("a negative prompt needs guidance, but guidance_scale is 1; raise it, such as to 7")


@dataclasses.dataclass(frozen=True)
class GeneratorShape:
    """Size of the generator, and the text that it reads."""

    width: int = 256
    """Width of the residual stream (D)."""
    num_layers: int = 5
    num_heads: int = 4
    hidden_width: int = 704
    """Width of the gated feed-forward layer."""
    max_text_tokens: int = 32
    """Slots for text tokens (T). Every text takes all of them, so that the length of other prompts never
    matters."""
    dropout: float = 0.1
    attention: Attention = "auto"
    """Attention kernel: auto, sdpa, or xformers (CUDA only)."""
    text_encoder: str = "minilm"
    """Text encoder: minilm, or a directory or hf:OWNER/NAME of a transformers text model."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            width=(1, 2**16),
            num_layers=(1, 1000),
            num_heads=(1, 1024),
            hidden_width=(1, 2**18),
            max_text_tokens=(1, 2**14),
        )
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"width is {self.width} with {self.num_heads} heads; expected a multiple of "
                f"{4 * self.num_heads}, as rope rotates pairs of numbers in each head by row and by column"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected 0 <= dropout < 1")


PRESETS: dict[str, GeneratorShape] = {
    "flickr8k": GeneratorShape(),
    "tiny": GeneratorShape(width=32, num_layers=2, num_heads=2, hidden_width=64),
    "base": GeneratorShape(width=768, num_layers=14, num_heads=12, hidden_width=2048, max_text_tokens=64),
}


@dataclasses.dataclass(frozen=True)
class GeneratorRun:
    """Train the generator (text -> ids).

    Example: tavq train generator --tokens runs/tokens --tokenizer runs/tokenizer --out runs/generator
    """

    tokens: Path = Path("runs/tokens")
    """Token set that `tavq tokenize` made."""
    out: Path = Path("runs/generator")
    """Directory of the run. It holds the checkpoint, the log and the state to resume from."""
    preset: str = "flickr8k"
    """Preset: flickr8k or flickr8k-preference, tiny or tiny-preference (seconds on a CPU), or base (about
    100 M weights, 256 tokens)."""
    config: Path | None = None
    """YAML file of these fields, instead of a preset."""
    dry_run: bool = False
    """Show shapes, parameters, memory and time of this training, measured in a few steps; write nothing."""
    start: Path | None = None
    """Generator to train further, such as one whose tokenizer has been trained further since. It decides the
    shape of the model."""
    tokenizer: Path | None = None
    """Tokenizer whose codebook initialises the token embeddings and which decodes the sample images."""
    label_smoothing: float = 0.05
    """Fraction of the target that is spread over all codes."""
    cache: Literal["disk", "none"] = "disk"
    """Whether the states of the captions' tokens are kept on disk, encoded once, or not: `none` encodes the
    captions of each batch, for token sets whose states would fill the disk (12 KB a caption), and takes about
    a quarter more time (docs/scale.md)."""
    long_text: bool = False
    """Also train on the long texts of the dataset, each as one more caption of its image. They are cut to
    --model.max-text-tokens."""
    null_text_rate: float = 0.1
    """Fraction of captions that are replaced by the learned null text, for classifier-free guidance."""
    stage: Literal["cross-entropy", "preference"] = "cross-entropy"
    """Training loss. preference (DPO) needs --preferences, and a generator in --start."""
    preferences: Path | None = None
    """File of `tavq preferences`: better and worse images of the same prompts."""
    preference_beta: float = 0.1
    """How far preferences may lead away from what the generator was: small values lead further."""
    real_weight: float = 1.0
    """Weight of the real images of the prompts beside the preferences."""
    more_tokens: Path | None = None
    """Another token set of the same tokenizer, such as one of photos that `tavq caption` described
    (pseudo-captions, as in ITIT and RECAP). All its splits join the training."""
    more_share: float = 0.25
    """Fraction of the examples that come from it."""
    random_order_until: float = 0.0
    """Part of training, 0 to 1, in which each image's tokens are predicted in a random order (RAR).
    Afterwards ever more images are predicted in raster order, in which images are sampled."""
    raster_order_from: float = 0.0
    """Part of training from which all images are predicted in raster order."""
    sampling: SamplingConfig = SamplingConfig()
    """How the sample images are sampled."""
    model: GeneratorShape = PRESETS["flickr8k"]
    training: TrainingConfig = TrainingConfig(
        steps=1280,
        batch_size=16,
        learning_rate=2e-3,
        warmup_steps=120,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        optimizer="muon",
        ema_decay=0.995,
        evaluate_every=320,
        patience=6,
    )

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "null_text_rate", "more_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 <= {name} < 1")
        if not 0 <= self.random_order_until <= self.raster_order_from <= 1:
            raise ValueError(
                f"random_order_until is {self.random_order_until} and raster_order_from "
                f"{self.raster_order_from}, expected 0 <= random_order_until <= raster_order_from <= 1"
            )
        if self.preference_beta <= 0 or self.real_weight < 0:
            raise ValueError("preference_beta shall be above 0, and real_weight 0 or more")
        if self.preferences is not None and self.stage != "preference":
            raise ValueError("--preferences needs --stage preference, which --preset flickr8k-preference has")


RUN_PRESETS: dict[str, GeneratorRun] = {
    "flickr8k": GeneratorRun(),
    "flickr8k-preference": GeneratorRun(
        preset="flickr8k-preference",
        stage="preference",
        training=TrainingConfig(
            steps=200,
            learning_rate=1e-4,
            warmup_steps=20,
            weight_decay=0.0,
            betas=(0.9, 0.95),
            ema_decay=0.98,
            evaluate_every=50,
        ),
    ),
    "tiny-preference": GeneratorRun(
        preset="tiny-preference",
        stage="preference",
        model=PRESETS["tiny"],
        training=TrainingConfig(
            steps=20, batch_size=8, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9, evaluate_every=10
        ),
    ),
    "tiny": GeneratorRun(
        preset="tiny",
        model=PRESETS["tiny"],
        training=TrainingConfig(
            steps=60, batch_size=8, learning_rate=3e-3, warmup_steps=10, ema_decay=0.9, evaluate_every=30
        ),
    ),
    "base": GeneratorRun(
        preset="base",
        model=PRESETS["base"],
        training=TrainingConfig(
            steps=100_000,
            batch_size=64,
            learning_rate=3e-4,
            warmup_steps=2000,
            evaluate_every=2000,
            patience=10,
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class LexiconShape:
    """Size of the lexicon, which writes an image as words in the generator's text slots."""

    num_words: int = 16
    """Words of an image, at most (W)."""
    width: int = 192
    """Width of its transformer (D)."""
    num_layers: int = 2
    """Layers over the image's tokens, before they are pooled."""
    num_heads: int = 4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_bounds(self, num_words=(1, 1024), width=(1, 2**16), num_layers=(0, 1000), num_heads=(1, 1024))
        if self.width % self.num_heads:
            raise ValueError(f"width is {self.width}, expected a multiple of num_heads, {self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected 0 <= dropout < 1")


@dataclasses.dataclass(frozen=True)
class LexiconRun:
    """Train the lexicon (image -> words that a frozen generator reads like a text; after ViLex).

    Example: tavq train lexicon --tokens runs/tokens --generator runs/generator --out runs/lexicon
    """

    tokens: Path = Path("runs/tokens")
    """Token set that `tavq tokenize` made, and that the generator was trained on."""
    generator: Path = Path("runs/generator")
    """Generator that the words are for; it stays as it is. Take the exported one where it is exported later,
    as rounded weights are others."""
    out: Path = Path("runs/lexicon")
    """Directory of the run. It holds the checkpoint, the log and the state to resume from."""
    preset: str = "flickr8k"
    """Preset: flickr8k, or tiny (seconds on a CPU)."""
    config: Path | None = None
    """YAML file of these fields, instead of a preset."""
    dry_run: bool = False
    """Show shapes, parameters, memory and time of this training, measured in a few steps; write nothing."""
    cache: Literal["disk", "none"] = "disk"
    """Whether the states of the captions' tokens are kept on disk, encoded once, or not: `none` encodes the
    captions of each batch."""
    text_rate: float = 0.3
    """Fraction of examples whose caption follows the words, so that they learn to share the slots."""
    model: LexiconShape = LexiconShape()
    training: TrainingConfig = TrainingConfig(
        steps=2000,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=100,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        optimizer="muon",
        ema_decay=0.995,
        evaluate_every=250,
        patience=4,
    )

    def __post_init__(self) -> None:
        check_bounds(self, text_rate=(0, 1))


LEXICON_PRESETS: dict[str, LexiconRun] = {
    "flickr8k": LexiconRun(),
    "tiny": LexiconRun(
        preset="tiny",
        model=LexiconShape(num_words=4, width=32, num_layers=1, num_heads=2),
        training=TrainingConfig(
            steps=60, batch_size=8, learning_rate=3e-3, warmup_steps=10, ema_decay=0.9, evaluate_every=30
        ),
    ),
}
