"""tavq train captioner --tokens DIR --out DIR [--preset tiny|flickr8k|base]
tavq train captioner --tokens DIR --out DIR --preset flickr8k-self-critical --start DIR

Train the captioner on image tokens: by cross-entropy, then self-critically with CIDEr-D as the reward. The
same command resumes a stopped run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.data.tokens import TokenSet, open_tokens
from tavq.training.card import continued
from tavq.training.loop import train
from tavq.training.task import StepOutput, Task, TrainingConfig

from .decoding import GREEDY, search
from .examples import Agreement, TokenCaptions, caption_targets, quality_buckets
from .model import PRESETS, Captioner, CaptionerConfig, CaptionerShape, start_captioner
from .reward import CiderD, DocumentFrequencies, ends_in_function_word, with_end
from .self_critical import Baseline, reinforce
from .vocabulary import WordVocabulary, metric_words

EVALUATION_BATCH = 100


@dataclasses.dataclass(frozen=True)
class CaptionerRun:
    """Train the captioner (ids -> text).

    Example: tavq train captioner --tokens runs/a/tokens --tokenizer runs/a/tokenizer --out runs/a/captioner
    """

    tokens: Path = Path("runs/tokens")
    """Token set, as `tavq tokenize` writes it."""
    out: Path = Path("runs/captioner")
    """Directory of the run; holds the checkpoint, its log and the state to resume from."""
    preset: str = "flickr8k"
    """flickr8k or flickr8k-self-critical, tiny or tiny-self-critical (seconds on a CPU), base."""
    config: Path | None = None
    """YAML file of these fields, instead of a preset."""
    stage: Literal["cross-entropy", "self-critical"] = "cross-entropy"
    """Self-critical training goes on from the captioner in `start`."""
    start: Path | None = None
    """Captioner to go on from; its shape and vocabulary stand. It reads the codebook that it read, or, where
    `tokenizer` is named, that one's: a tokenizer that was trained further."""
    tokenizer: Path | None = None
    """Tokenizer whose codebook gives the first embeddings (without it they are random) and, for
    model.quality-buckets, the alignment score of image and caption."""
    captions_per_image: int = 5
    """Captions of an image that share one pass."""
    min_word_count: int = 5
    """Words rarer than this in the training captions are unknown."""
    label_smoothing: float = 0.1
    samples_per_image: int = 5
    """Captions that self-critical training draws of an image."""
    sample_temperature: float = 0.3
    """Of those; at 1 they score far below the greedy caption, and training makes captions alike."""
    baseline: Baseline = "samples"
    """What a sample must beat: the greedy caption (Rennie et al.), or the mean of the other samples (Luo)."""
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


class CaptionerTrainee(nn.Module):
    """The captioner under one of the two losses."""

    def __init__(self, captioner: Captioner, run: CaptionerRun, reward: CiderD | None):
        super().__init__()
        self.captioner, self.run = captioner, run
        self.reward = reward

    def forward(self, batch: dict[str, Tensor], step: int) -> StepOutput:
        return self._cross_entropy(batch) if self.reward is None else self._self_critical(batch)

    def _cross_entropy(self, batch: dict[str, Tensor]) -> StepOutput:
        longest = max(1, int(batch["lengths"].max()))
        words, lengths = batch["words"][..., :longest], batch["lengths"]
        logits = self.captioner(batch["ids"], words, batch["starts"]).float()
        targets = caption_targets(words, lengths, self.captioner.text.end_id)
        loss = F.cross_entropy(
            logits.flatten(0, 2), targets.flatten(), ignore_index=-1, label_smoothing=self.run.label_smoothing
        )
        return StepOutput(loss, {"loss": loss.detach()})

    def _self_critical(self, batch: dict[str, Tensor]) -> StepOutput:
        self.captioner.eval()  # samples and gradient belong to one policy
        run, images = self.run, batch["index"].tolist()
        draw = (run.samples_per_image, run.baseline, run.sample_temperature)
        return reinforce(self.captioner, batch["ids"], images, self.reward, *draw)


class CaptionerTask(Task):
    """The captioner as the training loop sees it."""

    name = "captioner"
    watch = ("CIDEr", "max")
    hidden = frozenset({"blocks", "h", "layers"})  # of the image reader, of GPT-2, of Llama's likes

    def __init__(self, run: CaptionerRun, codebook: Tensor | None = None, agreement: Agreement | None = None):
        self.run = run
        tokens, self.val = open_tokens(run.tokens, "train"), open_tokens(run.tokens, "val")
        torch.manual_seed(run.training.seed)
        captioner = _captioner(run, tokens, codebook)
        self.earlier_card = captioner.card
        buckets, count = None, captioner.config.shape.quality_buckets
        if count and run.stage == "cross-entropy":
            if agreement is None:
                raise ValueError(
                    f"{count} quality buckets, but no alignment scores; add --model.quality-buckets {count} "
                    "and the --tokenizer that gives them"
                )
            buckets = quality_buckets(agreement, count)
        reward = None
        if run.stage == "self-critical":
            references = [[with_end(metric_words(text)) for text in texts] for texts in tokens.captions]
            reward = CiderD(references, DocumentFrequencies.of(references))
        self.dataset = TokenCaptions(tokens, captioner, run.captions_per_image, buckets)
        self.model = CaptionerTrainee(captioner, run, reward)
        self.val_reward = CiderD([[metric_words(text) for text in texts] for texts in self.val.captions])

    @torch.inference_mode()
    def evaluate(self, model: CaptionerTrainee, step: int) -> dict[str, float]:
        """CIDEr of greedy captions on the validation split, and how many break off behind a function word."""
        captioner = model.captioner
        device = captioner.starts.weight.device
        ids = self.val.ids[:, 0].flatten(1).long()
        captions = [
            captioner.text.words(found[0])
            for batch in ids.split(EVALUATION_BATCH)
            for found in search(captioner, batch.to(device), GREEDY)
        ]
        return {
            "CIDEr": float(self.val_reward.scores(captions, range(len(captions))).mean()),
            "function_word_end": float(np.mean([ends_in_function_word(words) for words in captions])),
            "words": float(np.mean([len(words) for words in captions])),
            "distinct": len(set(map(tuple, captions))) / len(captions),
        }

    def save(self, model: CaptionerTrainee, directory: Path, card: str) -> None:
        model.captioner.card = continued(card, self.earlier_card)
        model.captioner.save_pretrained(directory)


def _captioner(run: CaptionerRun, tokens: TokenSet, codebook: Tensor | None) -> Captioner:
    """The captioner that training starts from."""
    if run.start is not None:
        captioner = Captioner.from_pretrained(run.start)
        if codebook is None:
            captioner.check_codebook(tokens.meta.codebook_hash)
        config = captioner.config
        if (config.num_codes, config.grid_size) != (tokens.meta.num_codes, tokens.meta.grid_size):
            raise ValueError(
                f"{run.start} reads {config.grid_size} tokens of {config.num_codes} codes, {run.tokens} "
                f"holds {tokens.meta.grid_size} of {tokens.meta.num_codes}; train a captioner anew, without "
                "--start"
            )
        made = {"data": tokens.meta.data, "tokenizer": tokens.meta.tokenizer, "stage": run.stage}
        captioner.config = dataclasses.replace(
            config, codebook_hash=tokens.meta.codebook_hash, provenance=config.provenance | made
        )
        return captioner
    if run.stage == "self-critical":
        raise ValueError("self-critical training needs a captioner to go on from; add --start DIR")
    if (run.tokenizer is None) != (codebook is None):
        raise ValueError(f"no codebook of tokenizer {run.tokenizer} was handed in; run tavq train captioner")
    texts = [text for captions in tokens.captions for text in captions]
    if run.model.long_words:
        texts += [text for text in tokens.long_texts if text]
    own = run.model.decoder is None
    config = CaptionerConfig(
        shape=run.model,
        num_codes=tokens.meta.num_codes,
        code_dim=run.model.width if codebook is None else codebook.shape[1],
        grid_size=tokens.meta.grid_size,
        codebook_hash=tokens.meta.codebook_hash,
        words=WordVocabulary.build(texts, run.min_word_count).names if own else (),
        provenance={"data": tokens.meta.data, "tokenizer": tokens.meta.tokenizer, "stage": run.stage},
    )
    captioner = start_captioner(config)
    if codebook is not None:
        captioner.image.start_from(codebook)
    return captioner


def train_captioner(
    run: CaptionerRun, codebook: Tensor | None = None, agreement: Agreement | None = None
) -> None:
    """Train into `run.out`.

    Args:
        run: the run.
        codebook: (K, E) of `run.tokenizer`, for the first embeddings.
        agreement: the alignment score of each training caption with its image, for quality buckets.
    """
    task = CaptionerTask(run, codebook, agreement)
    shape = task.model.captioner.config.shape  # of `run.start`, where there is one
    train(task, run.training, run.out, dataclasses.replace(run, model=shape))
