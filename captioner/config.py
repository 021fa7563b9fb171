"""Settings of the captioner: its size, how it decodes, how it is trained.

Nothing here imports torch: help and mistakes on the command line are answered without it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from tavq.base.bounds import check_bounds
from tavq.training.config import TrainingConfig

OUTPUT_SUFFIXES = (".jsonl", ".json", ".csv", "")
"""Of files that captions are written to; "" is a directory of text files."""
Style = Literal["short", "long"]

Baseline = Literal["greedy", "samples"]


@dataclasses.dataclass(frozen=True)
class CaptionerShape:
    """Size of the captioner."""

    decoder: str | None = None
    """Pretrained causal language model of transformers, a directory or hf:OWNER/NAME. None trains a small
    GPT-2 from scratch."""
    width: int = 192
    """Width of the image encoder, and of the decoder that is trained from scratch."""
    num_heads: int = 6
    """Attention heads of both."""
    encoder_layers: int = 2
    """Bidirectional blocks of the image encoder."""
    decoder_layers: int = 3
    """Blocks of the decoder that is trained from scratch."""
    max_words: int = 20
    """Maximum length of a caption, in words (in sub-words with a pretrained decoder)."""
    long_words: int = 0
    """Maximum length of a long description, a second style for data with dense text. 0 trains captions
    only."""
    quality_buckets: int = 0
    """Number of quality tokens: a training caption starts with the token of its alignment score's quantile;
    captions are decoded with the best one. 0 turns this off."""
    dropout: float = 0.1
    """Dropout in the encoder and in the decoder that is trained from scratch."""
    token_dropout: float = 0.1
    """Fraction of the image tokens that are replaced by a mask token in training."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            width=(1, 2**16),
            num_heads=(1, 1024),
            encoder_layers=(0, 1000),
            decoder_layers=(1, 1000),
            max_words=(1, 2**14),
            long_words=(0, 2**14),
            quality_buckets=(0, 1000),
            dropout=(0, 1),
            token_dropout=(0, 1),
        )
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}; take a divisor")


PRESETS: dict[str, CaptionerShape] = {
    "flickr8k": CaptionerShape(),
    "tiny": CaptionerShape(width=32, num_heads=2, encoder_layers=1, decoder_layers=1, max_words=16),
    "base": CaptionerShape(width=768, num_heads=12, encoder_layers=4, decoder_layers=12, max_words=40),
}


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """Options for decoding captions."""

    beam: int = 5
    """Number of beams; 1 is greedy decoding."""
    n_best: int = 1
    """Number of captions per image, best first. With a temperature above 0, so many captions are sampled."""
    length_penalty: float = 1.0
    """Exponent of the length that divides a beam's log-probability; above 1 it favours longer captions."""
    no_repeat_ngram: int = 3
    """No n-gram of this length occurs twice in a caption; 0 allows all repetitions."""
    max_words: int | None = None
    """Maximum length of a caption; by default the one that the captioner was trained for."""
    style: Style = "short"
    """short gives captions, long gives descriptions (if the captioner was trained on dense text)."""
    temperature: float = 0.0
    """Temperature of the softmax. 0 searches for the likeliest caption, a value above 0 samples."""
    seed: int = 0
    """Seed of the samples."""
    top_p: float = 1.0
    """Nucleus sampling: samples come from the likeliest words that hold this much probability."""
    alignment: float = 0.0
    """Weight of the alignment score of codes and sentence, which is added to the mean log-probability when
    beams or samples are ranked. 0 turns it off; 4 was best on Flickr8k."""

    @property
    def num_candidates(self) -> int:
        """Number of captions per image that are decoded, before the ranking takes `n_best` of them."""
        # Alignment ranks the beams, so it needs all of them. Samples are ranked as they are.
        ranks_beams = bool(self.alignment) and self.temperature == 0
        return self.beam if ranks_beams else self.n_best

    def __post_init__(self) -> None:
        for name in ("beam", "n_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature is {self.temperature} and top_p {self.top_p}, "
                "expected temperature >= 0 and 0 < top_p <= 1"
            )
        if self.temperature == 0 and self.n_best > self.beam:
            raise ValueError(
                f"n_best is {self.n_best} and beam {self.beam}; widen the beam, or sample with a temperature"
            )
        if self.alignment < 0 or (self.alignment and self.num_candidates == 1):
            raise ValueError(
                f"alignment is {self.alignment} with {self.num_candidates} candidates an image, "
                "expected 0 or more, and several candidates to rank: widen the beam, or sample several"
            )


GREEDY = DecodingConfig(beam=1, no_repeat_ngram=0)


@dataclasses.dataclass(frozen=True)
class CaptionerRun:
    """Train the captioner (ids -> text).

    Example: tavq train captioner --tokens runs/a/tokens --tokenizer runs/a/tokenizer --out runs/a/captioner
    """

    tokens: Path = Path("runs/tokens")
    """Token set that `tavq tokenize` wrote."""
    out: Path = Path("runs/captioner")
    """Directory of the run, for the checkpoint, the log and the state to resume from."""
    preset: str = "flickr8k"
    """flickr8k or flickr8k-self-critical, tiny or tiny-self-critical (seconds on a CPU), base."""
    config: Path | None = None
    """YAML file of these fields, instead of a preset."""
    dry_run: bool = False
    """Show shapes, parameters, memory and time of this training, measured in a few steps; write nothing."""
    stage: Literal["cross-entropy", "self-critical"] = "cross-entropy"
    """Training loss. self-critical needs a captioner in --start."""
    start: Path | None = None
    """Captioner to start from; its size and vocabulary stay. The tokens must come from its codebook, unless
    --tokenizer names a tokenizer that was trained further."""
    tokenizer: Path | None = None
    """Tokenizer that made the tokens. Its codebook initialises the code embeddings (they are random without),
    and --model.quality-buckets needs its alignment scores."""
    captions_per_image: int = 5
    """Captions per image and step; they share one pass over the image."""
    min_word_count: int = 5
    """Words that occur less often in the training captions become the unknown word."""
    label_smoothing: float = 0.1
    """Label smoothing of the cross-entropy."""
    samples_per_image: int = 5
    """Captions that self-critical training samples per image."""
    sample_temperature: float = 0.3
    """Temperature of these samples. At 1 they score far below the greedy caption, and training makes captions
    alike."""
    baseline: Baseline = "samples"
    """Reward baseline of a sample: the greedy caption (Rennie et al.), or the mean of the other samples
    (Luo)."""
    model: CaptionerShape = PRESETS["flickr8k"]
    training: TrainingConfig = TrainingConfig(
        steps=1280,
        batch_size=16,
        learning_rate=2e-3,
        warmup_steps=120,
        weight_decay=0.05,
        optimizer="muon",
        ema_decay=0.995,
        evaluate_every=320,
        patience=4,
    )

    def __post_init__(self) -> None:
        if self.samples_per_image < 2:
            raise ValueError(f"samples_per_image is {self.samples_per_image}, expected 2 or more")
        if self.sample_temperature <= 0:
            raise ValueError(f"sample_temperature is {self.sample_temperature}, expected above 0")
        if self.model.quality_buckets and self.stage == "cross-entropy" and self.tokenizer is None:
            raise ValueError(
                f"model.quality_buckets is {self.model.quality_buckets}, which needs the alignment score "
                "of image and caption; name the --tokenizer that gives it"
            )


_TINY = CaptionerRun(
    preset="tiny",
    model=PRESETS["tiny"],
    min_word_count=1,
    training=TrainingConfig(
        steps=60, batch_size=8, learning_rate=3e-3, warmup_steps=5, ema_decay=0.9, evaluate_every=60
    ),
)

RUN_PRESETS: dict[str, CaptionerRun] = {
    "flickr8k": CaptionerRun(),
    "flickr8k-self-critical": CaptionerRun(
        preset="flickr8k-self-critical",
        stage="self-critical",
        training=TrainingConfig(
            steps=100,
            learning_rate=3e-5,
            warmup_steps=10,
            weight_decay=0.0,
            ema_decay=0.98,
            evaluate_every=20,
            patience=5,
        ),
    ),
    "tiny": _TINY,
    "tiny-self-critical": dataclasses.replace(
        _TINY,
        preset="tiny-self-critical",
        stage="self-critical",
        training=TrainingConfig(
            steps=10, batch_size=8, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9, evaluate_every=10
        ),
    ),
    "base": CaptionerRun(
        preset="base",
        model=PRESETS["base"],
        training=TrainingConfig(
            steps=100_000,
            batch_size=64,
            learning_rate=2e-4,
            warmup_steps=2000,
            evaluate_every=2000,
            patience=5,
        ),
    ),
}
