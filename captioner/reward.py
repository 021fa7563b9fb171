"""CIDEr-D as a reward: the metric's formula, with the references' tf-idf vectors kept for the next time.

Vedantam et al. 2015, arXiv:1411.5726, sec. 4, as pycocoevalcap computes it. In training the end of a caption
is a word like any other, in candidates, references and document frequencies. Without it captions learn to
break off ("a man on a"), since a missing end costs no n-gram.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

END = "</s>"  # the Penn Treebank tokenizer never gives this token
ORDERS = 4  # n-grams of 1 to 4 words
IMAGES_KEPT = 8192  # whose references' vectors stay in memory
SIGMA = 6.0  # of the Gaussian length penalty, in bigrams
FUNCTION_WORDS = frozenset(
    """a an the and or but nor of in on at by to from with without into onto over under near behind beside
    between through across along around against for as than while is are was were be being been am has have
    had his her its their my your our this that these those some another each every who which what where when
    he she it they very""".split()
)

Ngram = tuple[str, ...]


@dataclass(frozen=True)
class DocumentFrequencies:
    """Document frequencies: an n-gram's document is the set of references of one image."""

    images: int
    """Number of images."""
    counts: Counter[Ngram]
    """In how many images' references each n-gram occurs."""

    @classmethod
    def of(cls, references: Iterable[Sequence[Sequence[str]]]) -> DocumentFrequencies:
        """Count over images, each with several references, each a sequence of words."""
        counts: Counter[Ngram] = Counter()
        images = 0
        for captions in references:
            # A set: an n-gram counts once per image, however many of its references hold it.
            counts.update({ngram for words in captions for ngram in _ngrams(words)})
            images += 1
        return cls(images, counts)


@dataclass(frozen=True)
class _Vector:
    """The tf-idf vectors of one sentence."""

    weights: tuple[dict[Ngram, float], ...]
    """For each order, n-gram -> tf-idf."""
    norms: tuple[float, ...]
    """L2 norm of each."""
    length: int
    """Length of the sentence in bigrams, which the length penalty compares."""


class CiderD:
    """CIDEr-D of captions against the references of their images.

    Args:
        references: for each image its reference captions as words; see `with_end`.
        frequencies: document frequencies; by default those of `references`, as in the published metric.
    """

    def __init__(
        self, references: Sequence[Sequence[Sequence[str]]], frequencies: DocumentFrequencies | None = None
    ):
        frequencies = frequencies or DocumentFrequencies.of(references)
        self.log_images = math.log(frequencies.images)
        self.counts = frequencies.counts
        # Vectors take some 10 KB a caption, so that those of a large set would not fit into memory.
        self.vectors_of = functools.lru_cache(maxsize=IMAGES_KEPT)(
            lambda image: [self._vector(words) for words in references[image]]
        )

    def scores(self, candidates: Sequence[Sequence[str]], images: Sequence[int]) -> np.ndarray:
        """Score n candidates.

        Args:
            candidates: n captions as words.
            images: n indices into the references, the image of each candidate.

        Returns:
            (n,) float64, 0 to 10.
        """
        pairs = zip(candidates, images, strict=True)
        return np.array([self._score(self._vector(words), self.vectors_of(image)) for words, image in pairs])

    def _score(self, candidate: _Vector, references: list[_Vector]) -> float:
        total = sum(_similarity(candidate, reference) for reference in references)
        return 10.0 * total / (ORDERS * len(references))

    def _vector(self, words: Sequence[str]) -> _Vector:
        weights: tuple[dict[Ngram, float], ...] = tuple({} for _ in range(ORDERS))
        for ngram, count in Counter(_ngrams(words)).items():
            # An n-gram of no reference counts as one of a single image, as in pycocoevalcap.
            idf = self.log_images - math.log(max(1.0, self.counts.get(ngram, 0)))
            weights[len(ngram) - 1][ngram] = count * idf

        norms = tuple(math.sqrt(sum(value * value for value in order.values())) for order in weights)
        # pycocoevalcap takes the number of bigrams for the length.
        return _Vector(weights, norms, max(0, len(words) - 1))


def with_end(words: Sequence[str]) -> list[str]:
    """Append the end to the words of a complete caption, as one more word."""
    return [*words, END]


def ends_in_function_word(words: Sequence[str]) -> bool:
    """Tell whether a caption breaks off behind a word that must be followed by another."""
    return bool(words) and words[-1] in FUNCTION_WORDS


def _ngrams(words: Sequence[str]) -> list[Ngram]:
    words = tuple(words)
    return [words[i : i + n] for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1)]


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """Sum the clipped cosine similarities of all orders, and multiply by the Gaussian length penalty."""
    total = 0.0
    orders = zip(candidate.weights, candidate.norms, reference.weights, reference.norms, strict=True)
    for weights, norm, reference_weights, reference_norm in orders:
        # Too short for an n-gram of this order, or every n-gram occurs in all images (idf 0).
        if not norm or not reference_norm:
            continue
        # Clipped at the reference's weight, so that repeating a word does not pay.
        dot = sum(
            min(weight, reference_weights[ngram]) * reference_weights[ngram]
            for ngram, weight in weights.items()
            if ngram in reference_weights
        )
        total += dot / (norm * reference_norm)

    return total * math.exp(-((candidate.length - reference.length) ** 2) / (2 * SIGMA**2))
