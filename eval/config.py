"""Flags of the three evaluations, of `tavq blind` and of `tavq score faithfulness`.

Nothing here imports torch: help and mistakes on the command line are answered without it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from tavq.base.device import Device
from tavq.base.engine import EngineConfig
from tavq.base.files import check_file
from tavq.base.weights import CHECKPOINT
from tavq.captioner.config import DecodingConfig
from tavq.data.config import VisionLanguageConfig, default_data
from tavq.generator.config import SamplingConfig
from tavq.metrics.captions import Backend

RESULTS = "results"


@dataclasses.dataclass(frozen=True)
class EvaluationRun:
    """Flags of every evaluation."""

    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/, generator/ and captioner/."""
    data: str = dataclasses.field(default_factory=default_data)
    """Dataset: a directory in any known layout, hf:OWNER/NAME, `shapes` or `scenes`. By default that of
    TAVQ_DATA."""
    split: str = "test"
    """Split to measure. Choices are made on val; test is run once, on the frozen recipe."""
    limit: int | None = None
    """Number of images, from the first of the split on; all by default. The result file records it."""
    out: Path | None = None
    """Result file to write. By default results/LABEL/NAME.json in the current folder."""
    publish: bool = False
    """Write beside the weights, to CHECKPOINT/results/NAME.json, and replace what is published there."""
    label: str | None = None
    """Name of this result in tables. By default the name of the checkpoint."""
    device: Device = "auto"
    """Device to run on."""
    json: bool = False
    """Print metrics, protocol and path as one line of JSON, instead of text."""
    compare: Path | None = None
    """Another result file to compare with: prints both with the difference and its interval. Results of
    different protocols are refused."""

    def __post_init__(self) -> None:
        if self.compare is not None and not self.compare.is_file():
            raise FileNotFoundError(f"no result file {self.compare} to compare with; check --compare")
        if self.publish and self.out is not None:
            raise ValueError("--publish writes beside the weights and --out elsewhere; give one of them")
        if self.out is not None:
            check_file(self.out, ".json")

    @property
    def name(self) -> str:
        """Name of the result: the label, or the name of the checkpoint."""
        return self.label or Path(self.checkpoint).name

    def result_path(self, task: str) -> Path:
        """Return the result file of an evaluation: tokenizer, t2i or caption."""
        if self.out is not None:
            return self.out
        folder = Path(self.checkpoint) / RESULTS if self.publish else Path(RESULTS) / self.name
        return folder / f"{task}.json"


@dataclasses.dataclass(frozen=True)
class SpreadEvaluation(EvaluationRun):
    """An evaluation whose work on images can be spread over machines."""

    engine: OmitArgPrefixes[EngineConfig] = EngineConfig()


@dataclasses.dataclass(frozen=True)
class TokenizerEvaluation(SpreadEvaluation):
    """Measure a tokenizer: reconstruction, use of the codebook, retrieval through the codes.

    Example: tavq eval tokenizer --features mobilenet_v2_features.pt --out results/tokenizer.json
    """

    features: Path | None = None
    """TorchScript feature network (uint8 B,3,H,W -> B,D), which names the metric. By default Inception v3.
    A program: it runs only if networks.lock or TAVQ_TRUST holds its SHA-256."""
    frechet: bool = True
    """Measure rFID or rFD. Without it no feature network is needed."""
    judge: str | None = None
    """Checkpoint whose encoder measures a second Frechet distance. It must have another codebook."""
    retrieval: bool = True
    """Measure text-to-image and image-to-text recall, where the tokenizer is aligned with text."""
    classes: str | None = None
    """Measure how pure codes are in semantic classes: a TorchScript vision network (.pt), whose maps of these
    images are clustered, or a directory or hf:OWNER/NAME of a transformers segmentation model."""
    num_classes: int = 64
    """Number of clusters, or at least that of the segmentation model's classes."""


@dataclasses.dataclass(frozen=True)
class T2IEvaluation(SpreadEvaluation):
    """Generate an image from the first caption of each image, and compare them with the real ones.

    Example: tavq eval t2i --features mobilenet_v2_features.pt --out results/t2i.json
    """

    features: Path | None = None
    """TorchScript feature network (uint8 B,3,H,W -> B,D), which names the metric. By default Inception v3.
    A program: it runs only if networks.lock or TAVQ_TRUST holds its SHA-256."""
    seeds: int = 3
    """Number of generation seeds 0, 1, ...: the Frechet distance is their mean, with its range."""
    image_words: int = 0
    """Words of each real image that the generator is given, too (see tavq train lexicon); 0 gives none."""
    text: bool = True
    """Give the generator the caption. Without it, only the words of the image."""
    floors: bool = True
    """Also measure reference points: real images of another split, shrunk ones, reconstructions, noise, a
    constant image."""
    judge: str | None = None
    """Checkpoint that judges the images (cycle CIDEr, rank of the prompt, a second Frechet distance). It must
    not be the one that generated them."""
    neighbours: int = 0
    """Number of images whose nearest training image in token space is shown, in NAME.neighbours.png. It shows
    images of the dataset, so do not publish it."""
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}, expected 1 or more")
        if self.image_words < 0:
            raise ValueError(f"image_words is {self.image_words}, expected 0 or more")
        if self.image_words and self.engine.engine == "ray":
            raise ValueError("--image-words are read in this process; leave out --engine ray")
        if not (self.text or self.image_words):
            raise ValueError(
                "the generator would be given nothing; leave out --no-text, or give --image-words"
            )


@dataclasses.dataclass(frozen=True)
class CaptionEvaluation(SpreadEvaluation):
    """Caption the images of a split and score the captions against the human ones.

    Example: tavq eval caption --checkpoint runs/mine --split val --beam 5 --out results/caption.json
    """

    backend: Backend = "auto"
    """PTB tokenizer: java, python (the tokens are the same), or auto. METEOR and SPICE need Java."""
    decoding: OmitArgPrefixes[DecodingConfig] = DecodingConfig()


@dataclasses.dataclass(frozen=True)
class SceneEvaluation(EvaluationRun):
    """Measure a checkpoint on generated scenes, whose truth is known: maps, false twins of texts, captions,
    generated images. Parts that the checkpoint lacks are left out.

    Example: tavq eval scenes --checkpoint runs/mine --split val --out results/scenes.json
    """

    data: str = "scenes"
    """Dataset; no other one has a known truth."""
    reader: Path = Path("runs/scene_reader.safetensors")
    """Weights of the classifier that reads generated images. It is trained on scenes, in a few minutes, and
    written there where the file is absent."""
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_file(self.reader, ".safetensors")


@dataclasses.dataclass(frozen=True)
class BlindRun:
    """Compare two tokenizers blind: images beside two reconstructions in random order, and the key apart.

    Write down for each row what you see before you open key.json. The sheets show images of the dataset,
    which may not be yours to publish: do not commit them.

    Example: tavq blind checkpoints/flickr8k/tokenizer runs/mine/decoder --data flickr8k/ --out blind/
    """

    tokenizers: Positional[tuple[str, str]]
    """Two tokenizers: directories or hf:OWNER/NAME."""
    data: str = dataclasses.field(default_factory=default_data)
    """Dataset: a directory in any known layout, hf:OWNER/NAME, `shapes` or `scenes`. By default that of
    TAVQ_DATA."""
    split: str = "val"
    """Split of the dataset: train, val or test."""
    images: int = 40
    """Number of images, chosen at random."""
    seed: int = 0
    """Seed for choosing the images. The order of the two sides has none: nobody shall know it before."""
    out: Path = Path("blind")
    """Directory for sheet1.png, ..., and key.json, which says which side is whose."""
    device: Device = "auto"
    """Device to run on."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images is {self.images}, expected 1 or more")


@dataclasses.dataclass(frozen=True)
class ScoreFaithfulness:
    """Measure whether generated images show what their prompts ask for.

    Without --model, the captioner of another checkpoint describes the images. With it, a vision-language
    model is asked about every phrase and word of the prompt. The same command resumes.

    Example: tavq score faithfulness out/ --model hf:OWNER/NAME --out faithfulness.json
    """

    generated: Positional[Path]
    """Folder that tavq generate wrote, with result.jsonl."""
    out: Path
    """Result file to write. The answers lie beside it, in NAME.answers.jsonl."""
    vlm: OmitArgPrefixes[VisionLanguageConfig] = VisionLanguageConfig(max_tokens=8)
    judge: str = CHECKPOINT
    """Checkpoint whose captioner judges where no --model is named: a directory or hf:OWNER/NAME. It must have
    another codebook than the images."""
    device: Device = "auto"
    """Device to run on."""
    label: str | None = None
    """Name of this result in tables. By default the name of the folder."""
    compare: Path | None = None
    """Another result file to compare with: prints both with the difference and its interval."""
    json: bool = False
    """Print one line of JSON instead of text."""
