"""Flags of the commands around a finished tokenizer: train decoder, align,
tokenize, codebook, check-data, describe.

Nothing here imports torch: help and mistakes on the command line are answered without it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from tavq.alignment.config import NUM_LEVELS, AlignmentConfig, Method
from tavq.base.bounds import check_bounds
from tavq.base.device import Device
from tavq.base.engine import EngineConfig
from tavq.base.weights import shipped_checkpoint
from tavq.data.config import VisionLanguageConfig
from tavq.training.config import TrainingConfig

from .config import ReconstructionLossConfig


@dataclasses.dataclass(frozen=True)
class DecoderRun:
    """Train the decoder of a finished tokenizer further; its ids stay as they are.

    Example: tavq train decoder --tokenizer runs/mine/tokenizer --data flickr8k/ --out runs/mine/decoder
    """

    tokenizer: Path = Path("runs/tokenizer")
    """Checkpoint to start from; it is not changed."""
    data: str = "shapes"
    """Dataset: a directory in any known layout; shards, also by URL; hf:OWNER/NAME, a dataset of the hub,
    with options behind a ? (docs/training.md); `shapes` or `scenes` (generated)."""
    images: tuple[Path, ...] = ()
    """Folders of more images, which need no captions."""
    out: Path = Path("runs/decoder")
    """Directory of the run; holds the whole tokenizer, ready to take the place of the first."""
    preset: str = "flickr8k"
    """flickr8k, or tiny (seconds on a CPU)."""
    config: Path | None = None
    """YAML file of these fields, instead of a preset."""
    dry_run: bool = False
    """Show shapes, parameters, memory and time of this training, measured in a few steps; write nothing."""
    perceptual: str | None = None
    """`lpips`, or the path of a TorchScript network that gives feature maps. Without it only pixels are
    compared and there is no discriminator. A TorchScript file is a program: it runs only if networks.lock or
    TAVQ_TRUST holds its SHA-256."""
    upsample_channels: tuple[int, ...] = (64, 32, 16)
    """Width of each stage at the decoder's end; each doubles the resolution. Stages that the tokenizer
    lacks start untrained."""
    decode_size_px: int | None = None
    """Side of the decoded images, a multiple of 2 to the number of those stages: 224, say. By default what
    the stages make of the map that the tokenizer has before them."""
    views: int = 8
    """Views of each image: 2 are the image and its mirror image; more add as many crops, which are enlarged
    and so less sharp. The tokens of each view are kept in memory."""
    decoder_blocks: int = 3
    """Attention blocks of the decoder on the token grid; those that the tokenizer lacks start untrained."""
    decoder_noise: bool = False
    """Add noise to the map of each stage of `upsample_channels`; noise that the tokenizer has stays."""
    generator: Path | None = None
    """Generator of these ids, whose mistakes the decoder shall learn to bear: some tokens are replaced by
    what it samples in their place, while the target stays the photo."""
    generated_batches: float = 0.5
    """Fraction of the batches in which tokens are replaced."""
    generated_tokens: float = 0.25
    """Fraction of the tokens that are replaced in them."""
    losses: ReconstructionLossConfig = ReconstructionLossConfig()
    training: TrainingConfig = TrainingConfig(
        steps=5000,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=50,
        betas=(0.5, 0.99),
        ema_decay=0.999,
        evaluate_every=1000,
    )

    def __post_init__(self) -> None:
        check_bounds(self, generated_batches=(0, 1), generated_tokens=(0, 1), views=(1, 2**16))


TINY = TrainingConfig(steps=20, batch_size=8, warmup_steps=5, ema_decay=0.9, evaluate_every=20)

DECODER_PRESETS: dict[str, DecoderRun] = {
    "flickr8k": DecoderRun(),
    "tiny": DecoderRun(preset="tiny", upsample_channels=(24, 16, 16), decoder_blocks=1, training=TINY),
}


@dataclasses.dataclass(frozen=True)
class AlignLosses:
    """Weights of the losses; that of `align` is a share of the reconstruction's gradient norm."""

    l1: float = 1.0
    perceptual: float = 1.0
    quantizer: float = 1.0
    """Weight of the base model's own codebook and commitment losses."""
    align: float = 0.5
    """0 trains the model plainly, as a baseline of equal budget."""


@dataclasses.dataclass(frozen=True)
class AlignRun:
    """Align the codes of anybody's VQ model with text.

    Example: tavq align --base diffusers:vqgan/ --data flickr8k/ --out runs/aligned --image-size-px 256
    """

    base: str
    """The model: diffusers:PATH (a saved VQModel), call:MODULE:FUNCTION (a function that returns a taming,
    LlamaGen or vector_quantize_pytorch model with its weights), or tavq:PATH (a tokenizer of this project,
    with --probe-only)."""
    data: str
    """Dataset: a directory in any known layout; shards, also by URL; hf:OWNER/NAME, a dataset of the hub,
    with options behind a ? (docs/training.md); `shapes` or `scenes` (generated)."""
    out: Path
    """Directory for the aligned model, in the format of its own library, and for report.json."""
    dry_run: bool = False
    """Show shapes, parameters, memory and time of this training, measured in a few steps; write nothing."""
    image_size_px: int | None = None
    """Side that images are squashed to. By default 128, or that of a tokenizer of this project."""
    stages: tuple[str, str] | None = None
    """Submodules of the base whose outputs are levels 1 and 2. By default those behind its global
    attention."""
    text_encoder: str = "minilm"
    """minilm, or a directory or hf:OWNER/NAME of a transformers text model."""
    perceptual: str | None = None
    """`lpips`, or the path of a TorchScript network that returns feature maps. Without it L1 alone.
    A TorchScript file is a program: it runs only if networks.lock or TAVQ_TRUST holds its SHA-256."""
    features: Path | None = None
    """TorchScript network that measures rFD, before and after; not the one of --perceptual. Without it rFD
    is left out."""
    probe_steps: int = 500
    """Steps in which the projections are fitted to the frozen base."""
    probe_only: bool = False
    """Stop after the probe, which measures codes that never saw a text. With tavq:PATH the projections to
    text are fitted anew and saved with the tokenizer."""
    json: bool = False
    """Print one line of JSON instead of the table of scores."""
    method: Method = "ot"
    """How codes are aligned with text."""
    alignment: AlignmentConfig = AlignmentConfig()
    losses: AlignLosses = AlignLosses()
    training: TrainingConfig = TrainingConfig(
        steps=2000, batch_size=16, learning_rate=1e-4, warmup_steps=100, evaluate_every=500
    )


@dataclasses.dataclass(frozen=True)
class TokenizeRun:
    """Encode the images of a dataset once, for training generator and captioner. The same command resumes.

    Example: tavq tokenize --data flickr8k/ --out runs/mine/tokens --checkpoint runs/mine/tokenizer
    """

    data: str
    """Dataset: a directory in any known layout, hf:OWNER/NAME, `shapes` or `scenes`."""
    out: Path
    """Directory for the shards."""
    keep: Path | None = None
    """File of the images and captions to use, as tavq check-data writes it; all by default."""
    checkpoint: str = str(shipped_checkpoint() / "tokenizer")
    """Tokenizer: a directory or hf:OWNER/NAME. Or a VQ model of another library: a directory that
    diffusers.VQModel saved, or call:MODULE:FUNCTION, a function that returns a taming, LlamaGen or
    vector_quantize_pytorch model."""
    image_size_px: int | None = None
    """Side of the images that a model of another library reads. By default the `sample_size` that diffusers
    stores, and 128 for others."""
    crops: int = 2
    """Random crops of each training image, beside the image and its mirror image. Every second crop is
    mirrored."""
    device: Device = "auto"
    """Device to run on."""
    engine: OmitArgPrefixes[EngineConfig] = EngineConfig()

    def __post_init__(self) -> None:
        if self.crops < 0:
            raise ValueError(f"crops is {self.crops}, expected 0 or more")


@dataclasses.dataclass(frozen=True)
class CodebookRun:
    """Show a codebook: its use, and a sheet of codes with the patches that use them and the nearest words.

    The sheet shows images of the dataset, which may not be yours to publish: do not commit it.

    Example: tavq codebook runs/mine/tokenizer --data flickr8k/ --out codebook.png
    """

    checkpoint: Positional[str]
    """Tokenizer: a directory or hf:OWNER/NAME."""
    data: str
    """Dataset: a directory in any known layout, hf:OWNER/NAME, `shapes` or `scenes`."""
    out: Path = Path("codebook.png")
    """File for the sheet."""
    split: str = "val"
    """Split of the dataset: train, val or test."""
    level: int = NUM_LEVELS
    """Level of the codes: 3 for the tokens themselves, 1 and 2 for those aligned with words and phrases."""
    codes: int = 16
    """Number of most used codes to show."""
    random_codes: int = 16
    """Number of further codes, sampled with --seed among those in use."""
    patches: int = 12
    """Patches per code, from different images as far as there are."""
    words: int = 5
    """Words per code."""
    context: int = 2
    """Tokens shown around each patch; a frame marks the patch itself."""
    seed: int = 0
    """Seed for sampling codes and patches."""
    device: Device = "auto"
    """Device to run on."""
    json: bool = False
    """Print one line of JSON instead of text."""

    def __post_init__(self) -> None:
        if not 1 <= self.level <= NUM_LEVELS:
            raise ValueError(f"level is {self.level}, expected 1, 2 or 3")
        if self.codes + self.random_codes < 1 or self.patches < 1 or min(self.context, self.words) < 0:
            raise ValueError("expected at least one code and one patch, and no negative --words or --context")


@dataclasses.dataclass(frozen=True)
class CheckRun:
    """Find what is wrong with a dataset: a page to look at, and keep.txt, which training reads by --keep.

    Example: tavq check-data photos/ --out checked/
    """

    data: Positional[str]
    """Dataset: a directory in any known layout, hf:OWNER/NAME, `shapes` or `scenes`."""
    out: Path = Path("checked")
    """Directory for report.html, captions.tsv (all captions, the worst first) and keep.txt."""
    show: int = 60
    """Captions, pairs and images shown of each kind."""
    drop_worst: int = 0
    """Captions that fit worst and do not go into keep.txt. Look at the page before: a worst caption always
    exists."""
    min_side_px: int = 64
    """Shorter side below which an image counts as tiny."""
    duplicate_similarity: float = 0.8
    """Similarity of codes, position by position, from which two images count as copies."""
    language: str = "en"
    """Language that the text encoder reads (ISO 639-1); "" leaves languages alone."""
    tokenizer: str = str(shipped_checkpoint() / "tokenizer")
    """Tokenizer that is aligned with text: a directory or hf:OWNER/NAME."""
    device: Device = "auto"
    """Device to run on."""
    json: bool = False
    """Print one line of JSON instead of text."""

    def __post_init__(self) -> None:
        if min(self.show, self.drop_worst, self.min_side_px) < 0:
            raise ValueError("expected no negative --show, --drop-worst or --min-side-px")
        if not 0 <= self.duplicate_similarity <= 1:
            raise ValueError(f"duplicate_similarity is {self.duplicate_similarity}, expected 0 to 1")


@dataclasses.dataclass(frozen=True)
class DescribeRun:
    """Write a dense description of each image, as long text for the alignment. The same command resumes.

    Examples: tavq describe --data photos/ --model hf:OWNER/NAME --sample 12;  tavq describe --data photos/
    --endpoint http://127.0.0.1:8000/v1 --model NAME --fuse
    """

    data: str
    """Dataset: a directory in any known layout, hf:OWNER/NAME, `shapes` or `scenes`."""
    out: Path | None = None
    """File for the descriptions. By default DATA/long_text.jsonl, where training finds it. What the filter
    drops goes to NAME.rejected.jsonl beside it, with the reason."""
    split: str | None = None
    """Split to describe; all by default."""
    limit: int | None = None
    """Number of images, from the first on; all by default."""
    vlm: OmitArgPrefixes[VisionLanguageConfig] = VisionLanguageConfig()
    prompt: Path | None = None
    """Text file with the prompt. {captions} and {tags} in it stand for those of the image."""
    fuse: bool = False
    """Put the human captions into the prompt, so that the description keeps what people saw."""
    tags: Path | None = None
    """File of JSON lines {"id": ..., "tags": [...]} with what is known to be in an image; needs --fuse."""
    sample: int = 0
    """Describe this many images, spread over the dataset, into a page beside --out, and nothing else."""
    min_grounding: float = 0.0
    """Share of other images that the phrases of a description must fit less than its own image, on average,
    by the alignment of --tokenizer; other descriptions are dropped. 0 drops none. 0.5 drops 1.5 % of human
    texts of Flickr8k, and 43 % of texts that belong to another image."""
    tokenizer: str = str(shipped_checkpoint() / "tokenizer")
    """Aligned tokenizer for --min-grounding: a directory or hf:OWNER/NAME."""
    device: Device = "auto"
    """Device to run on."""
    json: bool = False
    """Print one line of JSON instead of text."""
    engine: OmitArgPrefixes[EngineConfig] = EngineConfig()

    @property
    def output(self) -> Path:
        """File of the descriptions."""
        return self.out or Path(self.data) / "long_text.jsonl"

    def __post_init__(self) -> None:
        if self.engine.engine == "ray" and self.vlm.endpoint:
            raise ValueError(
                "a server is asked many questions at once already (--requests), and --engine ray is for a "
                "local --model; leave out --engine or --endpoint"
            )
        if self.engine.engine == "ray" and self.sample:
            raise ValueError("a --sample is made in this process; leave out --engine ray")
        if self.tags is not None and not self.fuse:
            raise ValueError("--tags are a part of the fused prompt; add --fuse")
        if not 0 <= self.min_grounding <= 1:
            raise ValueError(f"min_grounding is {self.min_grounding}, expected 0 to 1")
        if self.out is None and not Path(self.data).is_dir():
            raise ValueError(f"{self.data} is no directory that could hold long_text.jsonl; name --out FILE")
