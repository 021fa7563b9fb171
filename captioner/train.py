"""tavq train captioner --tokens DIR --out DIR [--preset tiny|flickr8k|base]
tavq train captioner --tokens DIR --out DIR --preset flickr8k-self-critical --start DIR

Train the captioner on image tokens: with cross-entropy, then by self-critical training with CIDEr-D as the
reward. Rerunning the command resumes a stopped run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.base.processes import own_share, part_of_mean, shares_of_all
from tavq.data.column import Column
from tavq.data.tokens import AllTexts, TokenSet, open_tokens
from tavq.training.dry_run import dry_run
from tavq.training.loop import train
from tavq.training.provenance import TokenProvenance
from tavq.training.task import StepOutput, Task

from .config import GREEDY, CaptionerRun
from .dataset import AlignmentScores, CaptionDataset, caption_targets, quality_buckets
from .decoding import decode_word_ids
from .model import Captioner, CaptionerConfig, create_captioner
from .reward import CiderD, DocumentFrequencies, ends_in_function_word, with_end
from .self_critical import self_critical_loss
from .vocabulary import WordVocabulary, metric_words

EVALUATION_BATCH = 100


class CaptionerTrainer(nn.Module):
    """The captioner with its loss: cross-entropy, or the self-critical loss where `reward` is given."""

    def __init__(self, captioner: Captioner, run: CaptionerRun, reward: CiderD | None):
        super().__init__()
        self.captioner = captioner
        self.run = run
        self.reward = reward

    def forward(self, batch: dict[str, Tensor], step: int) -> StepOutput:
        if self.reward is None:
            return self._cross_entropy(batch)
        return self._self_critical(batch, self.reward)

    def _cross_entropy(self, batch: dict[str, Tensor]) -> StepOutput:
        # The dataset pads to the maximum length; a batch is only as long as its longest caption.
        lengths = batch["lengths"]
        longest = max(1, int(lengths.max()))
        words = batch["words"][..., :longest]

        logits = self.captioner(batch["ids"], words, batch["starts"]).float()
        targets = caption_targets(words, lengths, self.captioner.text.end_id)
        loss = F.cross_entropy(
            logits.flatten(0, 2), targets.flatten(), ignore_index=-1, label_smoothing=self.run.label_smoothing
        )
        loss = part_of_mean(loss, (targets != -1).sum())
        return StepOutput(loss, {"loss": loss.detach()})

    def _self_critical(self, batch: dict[str, Tensor], reward: CiderD) -> StepOutput:
        # No dropout: samples and gradient must belong to one policy.
        self.captioner.eval()
        return self_critical_loss(
            self.captioner,
            batch["ids"],
            batch["index"].tolist(),
            reward,
            self.run.samples_per_image,
            self.run.baseline,
            self.run.sample_temperature,
        )


class CaptionerTask(Task[CaptionerTrainer, Captioner]):
    """The captioner as the training loop sees it; the validation CIDEr decides which weights are saved."""

    name = "captioner"
    monitor = ("CIDEr", "max")
    # The blocks of the image encoder, of GPT-2, and of Llama and its kind.
    muon_modules = frozenset({"blocks", "h", "layers"})

    def __init__(
        self,
        run: CaptionerRun,
        codebook: Tensor | None = None,
        alignment_scores: AlignmentScores | None = None,
    ):
        self.run = run
        tokens = open_tokens(run.tokens, "train")
        self.val = open_tokens(run.tokens, "val")

        torch.manual_seed(run.training.seed)
        captioner = _initial_captioner(run, tokens, codebook)
        self.earlier_card = captioner.card

        buckets = _buckets(run, captioner, alignment_scores)
        self.dataset = CaptionDataset(tokens, captioner, run.captions_per_image, buckets)

        reward = None
        if run.stage == "self-critical":
            # The end is a word of the reward: without it captions learn to break off.
            references = Column(
                lambda image: [with_end(metric_words(text)) for text in tokens.captions[image]], len(tokens)
            )
            reward = CiderD(references, DocumentFrequencies.of(references))
        self.model = CaptionerTrainer(captioner, run, reward)
        self.shipped = captioner

        # Validation scores captions as the published metric does, without the end.
        self.val_cider = CiderD([[metric_words(text) for text in texts] for texts in self.val.captions])

    @torch.inference_mode()
    def evaluate(self, model: Captioner, step: int) -> dict[str, float]:
        """Score greedy captions of the validation split, and count how many end in a function word."""
        device = model.start_embedding.weight.device
        # Variant 0 of each image is the image as it is, not mirrored or cropped.
        ids = self.val.ids[:, 0].flatten(1).long()
        shares = [
            [model.text.words(group[0]) for group in decode_word_ids(model, batch.to(device), GREEDY)]
            for batch in own_share(ids.split(EVALUATION_BATCH))
        ]
        captions = [words for share in shares_of_all(shares) for words in share]
        return {
            "CIDEr": float(self.val_cider.scores(captions, range(len(captions))).mean()),
            "function_word_end": float(np.mean([ends_in_function_word(words) for words in captions])),
            "words": float(np.mean([len(words) for words in captions])),
            "distinct": len(set(map(tuple, captions))) / len(captions),
        }

    def save(self, model: Captioner, directory: Path, card: str) -> None:
        model.card = card
        model.save_pretrained(directory)


def train_captioner(
    run: CaptionerRun, codebook: Tensor | None = None, alignment_scores: AlignmentScores | None = None
) -> None:
    """Train the captioner into `run.out`.

    Args:
        run: the run.
        codebook: (K, E) of `run.tokenizer`, which initialises the code embeddings.
        alignment_scores: of each training caption with its image, for quality buckets.
    """
    task = CaptionerTask(run, codebook, alignment_scores)
    # `run.start` decides the size, not the flags: the saved configuration shall say what was trained.
    shape = task.model.captioner.config.shape
    resolved = dataclasses.replace(run, model=shape)
    if run.dry_run:
        dry_run(task, run.training, resolved)
    else:
        train(task, run.training, run.out, resolved)


def _initial_captioner(run: CaptionerRun, tokens: TokenSet, codebook: Tensor | None) -> Captioner:
    """Return the captioner that training starts from: the one in `run.start`, or a new one."""
    if run.start is not None:
        return _loaded_captioner(run, run.start, tokens, codebook)
    if run.stage == "self-critical":
        raise ValueError("self-critical training needs a captioner to go on from; add --start DIR")
    if (run.tokenizer is None) != (codebook is None):
        raise ValueError(f"no codebook of tokenizer {run.tokenizer} was handed in; run tavq train captioner")
    return _new_captioner(run, tokens, codebook)


def _loaded_captioner(run: CaptionerRun, start: Path, tokens: TokenSet, codebook: Tensor | None) -> Captioner:
    captioner = Captioner.from_pretrained(start)
    # With a codebook in hand the user has named the tokenizer, so other codes than before are meant.
    if codebook is None:
        captioner.check_codebook(tokens.meta.codebook_hash)

    config = captioner.config
    if (config.num_codes, config.grid_size) != (tokens.meta.num_codes, tokens.meta.grid_size):
        raise ValueError(
            f"{start} reads {config.grid_size} tokens of {config.num_codes} codes, {run.tokens} "
            f"holds {tokens.meta.grid_size} of {tokens.meta.num_codes}; train a captioner anew, without "
            "--start"
        )
    captioner.config = dataclasses.replace(
        config,
        codebook_hash=tokens.meta.codebook_hash,
        provenance=_provenance(run, tokens),
    )
    return captioner


def _new_captioner(run: CaptionerRun, tokens: TokenSet, codebook: Tensor | None) -> Captioner:
    texts = AllTexts(dataclasses.replace(tokens, with_long_texts=bool(run.model.long_words)))
    # A pretrained decoder brings its own vocabulary.
    from_scratch = run.model.decoder is None

    captioner = create_captioner(
        CaptionerConfig(
            shape=run.model,
            num_codes=tokens.meta.num_codes,
            code_dim=run.model.width if codebook is None else codebook.shape[1],
            grid_size=tokens.meta.grid_size,
            codebook_hash=tokens.meta.codebook_hash,
            words=WordVocabulary.build(texts, run.min_word_count).names if from_scratch else (),
            provenance=_provenance(run, tokens),
        )
    )
    if codebook is not None:
        captioner.image_encoder.initialize_from(codebook)
    return captioner


def _provenance(run: CaptionerRun, tokens: TokenSet) -> TokenProvenance:
    return TokenProvenance(tokens.meta.data, tokens.meta.tokenizer, run.stage)


def _buckets(
    run: CaptionerRun, captioner: Captioner, alignment_scores: AlignmentScores | None
) -> list[list[int]] | None:
    """Return the quality bucket of each training caption, None where the captioner is trained without."""
    count = captioner.config.shape.quality_buckets
    if not count or run.stage != "cross-entropy":
        return None
    if alignment_scores is None:
        raise ValueError(
            f"{count} quality buckets, but no alignment scores; add --model.quality-buckets {count} "
            "and the --tokenizer that gives them"
        )
    return quality_buckets(alignment_scores, count)
