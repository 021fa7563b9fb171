"""Decode captions from image tokens: greedy decoding, beam search or sampling.

`generate` of transformers decodes the words behind the image prefix. A second pass over all captions, packed
into one sequence, then gives the probability of each word. A caption depends on the tokens of its image, on
the settings and, where it is sampled, on its seed; it never depends on the rest of the batch.

Shapes: B images, N image tokens, h w token grid, G captions of each image (a group), T words of a caption,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tavq.base.seeding import mixed_seed

from .config import DecodingConfig
from .likelihood import pad_captions, word_log_probs
from .model import Captioner


@dataclasses.dataclass(frozen=True)
class Word:
    """One word of a caption (a sub-word with a pretrained decoder)."""

    text: str
    probability: float
    """Probability that the captioner gave the word, knowing the words before it."""
    patches: np.ndarray | None = None
    """(h, w) float32, sums to 1: attention from the word's prediction to the image tokens, if asked for."""


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption with its score and the probability of each of its words."""

    text: str
    score: float
    """Mean log-probability of the words and the end token, plus what `DecodingConfig.alignment` adds."""
    words: tuple[Word, ...]

    def marked(self, threshold: float) -> str:
        """Join the words; those less probable than `threshold` are written as [word?]."""
        return " ".join(w.text if w.probability >= threshold else f"[{w.text}?]" for w in self.words)


AlignmentScore = Callable[[Tensor, Sequence[Sequence[str]]], Tensor]
"""How well the codes of each image match its G sentences: ids (B, N), B groups of G texts -> (B, G)."""


@torch.inference_mode()
def decode_captions(
    captioner: Captioner,
    ids: Tensor,
    settings: DecodingConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    with_patches: bool = False,
    alignment_score: AlignmentScore | None = None,
) -> list[list[Caption]]:
    """Caption images, given as tokens.

    Args:
        captioner: in eval mode.
        ids: (B, N) or (B, h, w) int64.
        settings: beam search of width 5 by default.
        seeds: B seeds for sampling; `settings.seed` for every image by default.
        with_patches: give each word its attention over the image tokens (by a slower attention kernel).
        alignment_score: the score that `settings.alignment` weighs; `Pipeline.caption` passes that of its
            tokenizer.

    Returns:
        For each image `n_best` captions, best first.

    Raises:
        ValueError: `settings.alignment` is set, but no `alignment_score` is given.
    """
    settings = settings or DecodingConfig()
    score_texts = alignment_score if settings.alignment else None
    if settings.alignment and score_texts is None:
        raise ValueError(
            f"alignment is {settings.alignment}, but no alignment_score is given; call Pipeline.caption"
        )
    if len(ids) == 0:
        return []

    ids = ids.flatten(1)
    candidates = decode_word_ids(captioner, ids, settings, seeds)
    captions = to_captions(captioner, ids, candidates, settings, with_patches=with_patches)

    if score_texts is not None:
        scores = score_texts(ids, [[caption.text for caption in group] for group in captions])
        captions = [
            [replace(c, score=c.score + settings.alignment * s) for c, s in zip(group, row, strict=True)]
            for group, row in zip(captions, scores.tolist(), strict=True)
        ]
    # Beam search returns its beams in order, by the length penalty. Samples come in the order of their draws.
    if settings.alignment or settings.temperature > 0:
        captions = [sorted(group, key=lambda caption: -caption.score) for group in captions]

    return [group[: settings.n_best] for group in captions]


@torch.inference_mode()
def decode_word_ids(
    captioner: Captioner, ids: Tensor, settings: DecodingConfig, seeds: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Decode `settings.num_candidates` captions for each image of ids (B, N), as word ids without the end."""
    prefix = captioner.prefix_embeddings(ids, settings.style)
    if settings.temperature > 0:
        prefix = prefix.repeat_interleave(settings.num_candidates, dim=0)
        strategy = _sampling_options(settings, seeds or [settings.seed] * len(ids))
    else:
        strategy = _beam_search_options(settings)

    with warnings.catch_warnings():
        # transformers warns that prompt n-grams are not checked; our prompt is an image prefix without words
        warnings.filterwarnings("ignore", "Passing `no_repeat_ngram_size`")
        rows = captioner.language_model.generate(
            inputs_embeds=prefix,
            attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device),
            max_new_tokens=_max_words(captioner, settings),
            min_new_tokens=1,
            do_sample=False,
            suppress_tokens=captioner.text.suppressed_ids or None,
            no_repeat_ngram_size=settings.no_repeat_ngram,
            eos_token_id=captioner.text.end_id,
            pad_token_id=captioner.text.pad_id,
            **strategy,
        ).tolist()

    captions = [_before_end(row, captioner.text.end_id) for row in rows]
    size = settings.num_candidates
    return [captions[first : first + size] for first in range(0, len(captions), size)]


@torch.inference_mode()
def to_captions(
    captioner: Captioner,
    ids: Tensor,
    candidates: list[list[list[int]]],
    settings: DecodingConfig,
    *,
    with_patches: bool = False,
) -> list[list[Caption]]:
    """Turn the word ids that `decode_word_ids` gave for ids (B, N) into captions with word probabilities.

    The probabilities are those of the captioner itself: without temperature, top-p or any other constraint.
    """
    words_BGT = pad_captions(captioner, candidates)
    starts_BG = torch.full_like(words_BGT[..., 0], captioner.start_id(settings.style))
    log_probs_BGT = word_log_probs(captioner, ids, words_BGT, starts_BG).cpu()

    maps_BGThw = None
    if with_patches:
        maps = captioner.attention_maps(ids, words_BGT, starts_BG).cpu()
        maps_BGThw = maps.unflatten(-1, captioner.config.grid_size)

    # A caption of maximum length was cut off: the captioner never said that it ends there.
    limit = _max_words(captioner, settings)
    return [
        [
            _caption(
                captioner,
                words,
                log_probs_BGT[b, g],
                None if maps_BGThw is None else maps_BGThw[b, g],
                ended=len(words) < limit,
            )
            for g, words in enumerate(group)
        ]
        for b, group in enumerate(candidates)
    ]


def _caption(
    captioner: Captioner, words: list[int], log_probs: Tensor, maps: Tensor | None, *, ended: bool
) -> Caption:
    pieces = captioner.text.pieces(words)
    probabilities = log_probs[: len(words)].exp().tolist()
    patches: list[np.ndarray | None] = [None] * len(words)
    if maps is not None:
        patches = list(maps[: len(words)].numpy())

    scored = log_probs[: len(words) + ended]
    return Caption(
        captioner.text.decode(words),
        float(scored.mean()) if len(scored) else -math.inf,
        tuple(Word(*parts) for parts in zip(pieces, probabilities, patches, strict=True)),
    )


def _beam_search_options(settings: DecodingConfig) -> dict[str, Any]:
    if settings.beam == 1:
        return {"num_beams": 1}
    return {
        "num_beams": settings.beam,
        "num_return_sequences": settings.num_candidates,
        "length_penalty": settings.length_penalty,
        "early_stopping": False,
    }


def _sampling_options(settings: DecodingConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """Sample by greedy decoding of logits to which noise of (seed, copy, position) is added.

    `do_sample` of transformers draws from torch's global state for the whole batch at once: a caption would
    depend on the other images of its batch.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    processors: list[Any] = []
    if settings.temperature != 1:
        processors.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    # The noise comes last: temperature and top-p act on the distribution, the argmax then samples from it.
    keys = [mixed_seed(seed, copy) for seed in seeds for copy in range(settings.num_candidates)]
    processors.append(_GumbelNoise(keys))

    return {"logits_processor": LogitsProcessorList(processors)}


class _GumbelNoise:
    """Add Gumbel noise to the logits of each row; their argmax is then a sample (Gumbel-max trick).

    Args:
        keys: one seed per row.
    """

    def __init__(self, keys: Sequence[int]):
        self.keys = keys

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = [self._noise(key, input_ids.shape[1], scores.shape[1]) for key in self.keys]
        return scores + torch.stack(noise).to(scores)

    @staticmethod
    def _noise(key: int, position: int, size: int) -> Tensor:
        # On the CPU, so that a seed gives the same noise on every device. In float64, since float32 has too
        # few digits near 0 and would cut off the tail of the Gumbel distribution.
        rng = torch.Generator().manual_seed(mixed_seed(key, position))
        return -torch.empty(size, dtype=torch.float64).exponential_(generator=rng).log()


def _max_words(captioner: Captioner, settings: DecodingConfig) -> int:
    longest = captioner.max_words(settings.style)
    if settings.max_words is not None and not 1 <= settings.max_words <= longest:
        raise ValueError(f"max_words is {settings.max_words}, expected 1 to {longest} as trained")
    return settings.max_words or longest


def _before_end(words: list[int], end_id: int) -> list[int]:
    return words[: words.index(end_id)] if end_id in words else words
