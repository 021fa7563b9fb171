"""CIDEr-D as a reward: the metric's own formula over words, with references prepared once.

Vedantam et al. 2015, arXiv:1411.5726, sec. 4, as pycocoevalcap computes it. In training the end of a caption
is a word like any other, in candidates, references and frequencies; without it captions learn to break off
("a man on a"), since a missing end costs no n-gram.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

END = "</s>"  # no token of the metric's form
ORDERS = 4
SIGMA = 6.0
FUNCTION_WORDS = frozenset(
    """a an the and or but nor of in on at by to from with without into onto over under near behind beside
    between through across along around against for as than while is are was were be being been am has have
    had his her its their my your our this that these those some another each every who which what where when
    he she it they very""".split()
)

Ngram = tuple[str, ...]


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many images' references an n-gram occurs, out of `images`."""

    images: int
    counts: Counter[Ngram]

    @classmethod
    def of(cls, references: Iterable[Sequence[Sequence[str]]]) -> DocumentFrequencies:
        """Count over images; each has several references, each a sequence of words."""
        counts: Counter[Ngram] = Counter()
        images = 0
        for captions in references:
            counts.update({ngram for words in captions for ngram in _ngrams(words)})
            images += 1
        return cls(images, counts)


@dataclass(frozen=True)
class _Vector:
    """One sentence: tf-idf by n-gram for each order, their norms, and the length that CIDEr-D compares."""

    weights: tuple[dict[Ngram, float], ...]
    norms: tuple[float, ...]
    length: int


class CiderD:
    """CIDEr-D of candidates against the references of the images they describe.

    Args:
        references: for each image its reference captions as words; see `with_end`.
        frequencies: document frequencies; those of `references` by default, as the metric has it.
    """

    def __init__(
        self, references: Sequence[Sequence[Sequence[str]]], frequencies: DocumentFrequencies | None = None
    ):
        frequencies = frequencies or DocumentFrequencies.of(references)
        self.log_images, self.counts = math.log(frequencies.images), frequencies.counts
        self.references = [[self._vector(words) for words in captions] for captions in references]

    def __deepcopy__(self, memo: dict) -> CiderD:
        """Nothing changes it, and it is large: the averaged copy of a model shares it."""
        return self

    def scores(self, candidates: Sequence[Sequence[str]], images: Sequence[int]) -> np.ndarray:
        """CIDEr-D of each candidate (words) against the references of `images[i]`: (n,) float64, 0 to 10."""
        pairs = zip(candidates, images, strict=True)
        return np.array([self._score(self._vector(words), self.references[image]) for words, image in pairs])

    def _score(self, candidate: _Vector, references: list[_Vector]) -> float:
        total = sum(_similarity(candidate, reference) for reference in references)
        return 10.0 * total / (ORDERS * len(references))

    def _vector(self, words: Sequence[str]) -> _Vector:
        weights: tuple[dict[Ngram, float], ...] = tuple({} for _ in range(ORDERS))
        for ngram, count in Counter(_ngrams(words)).items():
            idf = self.log_images - math.log(max(1.0, self.counts.get(ngram, 0)))
            weights[len(ngram) - 1][ngram] = count * idf
        norms = tuple(math.sqrt(sum(value * value for value in order.values())) for order in weights)
        return _Vector(weights, norms, max(0, len(words) - 1))  # the metric counts bigrams


def with_end(words: Sequence[str]) -> list[str]:
    """The words of a caption that is complete, with the end as one more word."""
    return [*words, END]


def ends_in_function_word(words: Sequence[str]) -> bool:
    """Whether a caption breaks off behind a word that must be followed by another."""
    return bool(words) and words[-1] in FUNCTION_WORDS


def _ngrams(words: Sequence[str]) -> list[Ngram]:
    words = tuple(words)
    return [words[i : i + n] for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1)]


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """Sum over the orders of the clipped cosine, times the Gaussian of the difference in length."""
    total = 0.0
    parts = zip(candidate.weights, candidate.norms, reference.weights, reference.norms, strict=True)
    for own, own_norm, other, other_norm in parts:
        if own_norm and other_norm:
            dot = sum(
                min(value, other[ngram]) * other[ngram] for ngram, value in own.items() if ngram in other
            )
            total += dot / (own_norm * other_norm)
    return total * math.exp(-((candidate.length - reference.length) ** 2) / (2 * SIGMA**2))
