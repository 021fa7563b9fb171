"""Captions from image tokens: greedy, beam search or sampling, then the probability of each word.

A caption depends on the tokens of its image, the settings and, if sampled, its own seed: never on the batch.

Legend: B batch, N image tokens, h w token grid, C captions an image, T positions a caption, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tavq.base.seeding import mixed_seed

from .model import Captioner, Style


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How captions are searched for."""

    beam: int = 5
    """Width of the beam search; 1 is greedy."""
    n_best: int = 1
    """Captions an image, the best first; as many samples when `temperature` is above 0."""
    length_penalty: float = 1.0
    """Exponent on the length that divides a beam's log-probability; above 1 favours longer captions."""
    no_repeat_ngram: int = 3
    """No word sequence of this length occurs twice in a caption; 0 allows all."""
    max_words: int | None = None
    """The longest caption; by default what the captioner was trained for."""
    style: Style = "short"
    """Captions, or long descriptions where the captioner was trained on dense text."""
    temperature: float = 0.0
    """Above 0 samples instead of searching."""
    seed: int = 0
    """Of the samples."""
    top_p: float = 1.0
    """Samples come from the likeliest words that hold this much probability."""
    alignment: float = 0.0
    """Above 0 aligned codes help to choose among the beams or samples: the weight of how well they fit the
    sentence, beside its mean log-probability (4 was best on Flickr8k)."""

    @property
    def candidates(self) -> int:
        """Captions an image that are searched for."""
        return self.beam if self.alignment and self.temperature == 0 else self.n_best

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
        if self.alignment < 0 or (self.alignment and self.candidates == 1):
            raise ValueError(
                f"alignment is {self.alignment} with {self.candidates} candidates an image, "
                "expected 0 or more, and several to choose from: widen the beam, or draw several samples"
            )


@dataclasses.dataclass(frozen=True)
class Word:
    """One word of a caption (a sub-word with a pretrained decoder)."""

    text: str
    probability: float
    """That the model gave it, knowing the words before."""
    patches: np.ndarray | None = None
    """(h, w) float32, sums to 1: the image tokens that its prediction looked at; only when asked for."""


@dataclasses.dataclass(frozen=True)
class Caption:
    """A sentence with the model's own doubts."""

    text: str
    score: float
    """Mean log-probability of its words and of its end; plus what `DecodingConfig.alignment` adds."""
    words: tuple[Word, ...]

    def marked(self, threshold: float) -> str:
        """The words, those less probable than `threshold` in [brackets?]."""
        return " ".join(w.text if w.probability >= threshold else f"[{w.text}?]" for w in self.words)


GREEDY = DecodingConfig(beam=1, no_repeat_ngram=0)
Fit = Callable[[Tensor, Sequence[Sequence[str]]], Tensor]
"""How well the codes of each image fit its C sentences: ids (B, N), B times C texts -> (B, C) in [-2, 0]."""


@torch.inference_mode()
def caption_ids(
    captioner: Captioner,
    ids: Tensor,
    settings: DecodingConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    with_patches: bool = False,
    fit: Fit | None = None,
) -> list[list[Caption]]:
    """Describe images.

    Args:
        captioner: in eval mode.
        ids: (B, N) or (B, h, w) int64.
        settings: beam search of width 5 by default.
        seeds: B seeds for sampling; `settings.seed` for every image by default.
        with_patches: give each word the map of the image tokens behind it (a slower attention).
        fit: what `settings.alignment` weighs; `Pipeline.caption` gives its tokenizer's.

    Returns:
        For each image `n_best` captions, the best first.
    """
    settings = settings or DecodingConfig()
    if settings.alignment and fit is None:
        raise ValueError(f"alignment is {settings.alignment}, but no fit is given; call Pipeline.caption")
    if len(ids) == 0:
        return []
    ids = ids.flatten(1)
    found = search(captioner, ids, settings, seeds)
    captions = describe(captioner, ids, found, settings, with_patches=with_patches)
    if settings.alignment:
        fits = fit(ids, [[caption.text for caption in group] for group in captions])
        captions = [
            [replace(c, score=c.score + settings.alignment * f) for c, f in zip(*pair, strict=True)]
            for pair in zip(captions, fits.tolist(), strict=True)
        ]
    if settings.alignment or settings.temperature > 0:  # beams come in order
        captions = [sorted(group, key=lambda caption: -caption.score) for group in captions]
    return [group[: settings.n_best] for group in captions]


@torch.inference_mode()
def describe(
    captioner: Captioner,
    ids: Tensor,
    found: list[list[list[int]]],
    settings: DecodingConfig,
    *,
    with_patches: bool = False,
) -> list[list[Caption]]:
    """Turn what `search` found for ids (B, N) into captions, with the probability of each word."""
    words_BCT = _padded(captioner, found)
    starts_BC = torch.full_like(words_BCT[..., 0], captioner.start_id(settings.style))
    log_probs_BCT = word_log_probs(captioner, ids, words_BCT, starts_BC).cpu()
    patches = None
    if with_patches:
        patches = captioner.attention(ids, words_BCT, starts_BC).cpu()
        patches = patches.unflatten(-1, captioner.config.grid_size)
    limit = _limit(captioner, settings)
    return [
        [
            _caption(
                captioner,
                words,
                log_probs_BCT[b, c],
                None if patches is None else patches[b, c],
                ended=len(words) < limit,
            )
            for c, words in enumerate(candidates)
        ]
        for b, candidates in enumerate(found)
    ]


def _caption(
    captioner: Captioner, words: list[int], log_probs: Tensor, maps: Tensor | None, *, ended: bool
) -> Caption:
    pieces = captioner.text.pieces(words)
    probabilities = log_probs[: len(words)].exp().tolist()
    patches = [None] * len(words) if maps is None else list(maps[: len(words)].numpy())
    counted = log_probs[: len(words) + ended]
    return Caption(
        captioner.text.decode(words),
        float(counted.mean()) if len(counted) else -math.inf,
        tuple(Word(*parts) for parts in zip(pieces, probabilities, patches, strict=True)),
    )


@torch.inference_mode()
def search(
    captioner: Captioner, ids: Tensor, settings: DecodingConfig, seeds: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """For each image of ids (B, N), `settings.candidates` captions as ids, without the end."""
    samples = settings.temperature > 0
    prompt = captioner.prompt(ids, settings.style)
    if samples:
        prompt = prompt.repeat_interleave(settings.candidates, dim=0)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Passing `no_repeat_ngram_size`"
        )  # the prompt holds no words anyway
        rows = captioner.language.generate(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device),
            max_new_tokens=_limit(captioner, settings),
            min_new_tokens=1,
            do_sample=False,
            suppress_tokens=captioner.text.suppressed_ids or None,
            no_repeat_ngram_size=settings.no_repeat_ngram,
            eos_token_id=captioner.text.end_id,
            pad_token_id=captioner.text.pad_id,
            **(_sampling(settings, seeds or [settings.seed] * len(ids)) if samples else _beams(settings)),
        ).tolist()
    captions = [_until_end(row, captioner.text.end_id) for row in rows]
    return [captions[i : i + settings.candidates] for i in range(0, len(captions), settings.candidates)]


def _beams(settings: DecodingConfig) -> dict[str, Any]:
    if settings.beam == 1:
        return {"num_beams": 1}
    return {
        "num_beams": settings.beam,
        "num_return_sequences": settings.candidates,
        "length_penalty": settings.length_penalty,
        "early_stopping": False,
    }


def _sampling(settings: DecodingConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """Sampling as the argmax of logits plus noise that belongs to (seed, copy, position)."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    steps = [TemperatureLogitsWarper(settings.temperature)] if settings.temperature != 1 else []
    steps += [TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else []
    keys = [mixed_seed(seed, copy) for seed in seeds for copy in range(settings.candidates)]
    return {"logits_processor": LogitsProcessorList([*steps, _Noise(keys)])}


class _Noise:
    """Adds Gumbel noise to each row's logits; an argmax is then a draw (Gumbel-max trick)."""

    def __init__(self, keys: Sequence[int]):
        self.keys = keys

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = [self._row(key, input_ids.shape[1], scores.shape[1]) for key in self.keys]
        return scores + torch.stack(noise).to(scores)

    @staticmethod
    def _row(key: int, position: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(mixed_seed(key, position))
        return -torch.empty(size, dtype=torch.float64).exponential_(generator=generator).log()


def word_log_probs(
    captioner: Captioner,
    ids: Tensor,
    words: Tensor,
    starts: Tensor | None = None,
    *,
    without: Sequence[int] = (),
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability of each word of (B, C, T) and of the end behind it.

    Padding is read as the end: entry t < length is the word's, entry `length` the end's; the rest is void.
    Words in `without` have no share of the probability; none of `words` may be among them. The logits are
    divided by `temperature`.

    Returns:
        (B, C, T + 1) float32.
    """
    logits = captioner(ids, words, starts).float() / temperature
    if without:
        logits[..., list(without)] = -torch.inf
    ends = torch.full_like(words[..., :1], captioner.text.end_id)
    targets = torch.cat([words, ends], dim=-1)
    targets = targets.masked_fill(targets == captioner.text.pad_id, captioner.text.end_id)
    return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


@torch.inference_mode()
def log_likelihood(captioner: Captioner, ids: Tensor, texts: Sequence[str]) -> Tensor:
    """Log-probability of each text given its image, summed over its words and its end: (B,) float32.

    Args:
        captioner: in eval mode.
        ids: (B, N) or (B, h, w) int64.
        texts: B sentences; words outside the vocabulary count as the unknown word.
    """
    if len(texts) != len(ids):
        raise ValueError(f"got {len(ids)} images and {len(texts)} texts, expected one text an image")
    limit = captioner.config.shape.max_words
    encoded = [captioner.text.encode(text) for text in texts]
    longest = max(map(len, encoded))
    if longest > limit:
        warnings.warn(f"a text has {longest} words; only the first {limit} are scored", stacklevel=2)
    encoded = [words[:limit] for words in encoded]
    log_probs = word_log_probs(captioner, ids.flatten(1), _padded(captioner, [[words] for words in encoded]))
    lengths = torch.tensor([len(words) for words in encoded], device=ids.device)
    counted = torch.arange(log_probs.shape[-1], device=ids.device) <= lengths[:, None]
    return (log_probs[:, 0] * counted).sum(-1)


def _padded(captioner: Captioner, captions: Iterable[Sequence[Sequence[int]]]) -> Tensor:
    """Captions of B images, C each -> (B, C, T), T at least 1."""
    captions = list(captions)
    rows = [torch.tensor(words, dtype=torch.long) for group in captions for words in group]
    rows.append(torch.zeros(1, dtype=torch.long))  # so that T is 1 when all captions are empty
    padded = pad_sequence(rows, batch_first=True, padding_value=captioner.text.pad_id)[:-1]
    return padded.unflatten(0, (len(captions), -1)).to(captioner.starts.weight.device)


def _limit(captioner: Captioner, settings: DecodingConfig) -> int:
    longest = captioner.longest(settings.style)
    if settings.max_words is not None and not 1 <= settings.max_words <= longest:
        raise ValueError(f"max_words is {settings.max_words}, expected 1 to {longest} as trained")
    return settings.max_words or longest


def _until_end(row: list[int], end_id: int) -> list[int]:
    return row[: row.index(end_id)] if end_id in row else row
