"""CIDEr, BLEU-1 to 4, METEOR, ROUGE-L and SPICE of captions, computed by pycocoevalcap.

Each metric is kept as statistics per image, which are summed into the corpus score: the bootstrap resamples
them. CIDEr is that of pycocoevalcap, the CIDEr-D formula with the document frequencies of the evaluated
references. Values are raw: a published "CIDEr 60" is 0.60 here.

Captions are split by the Penn Treebank tokenizer of Java where Java is present; the one in `ptb.py` gives the
same tokens. METEOR and SPICE exist in Java only.

Shapes: n images, k statistics per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .bootstrap import Score, mean_score
from .java import java_available, meteor_statistics, spice_missing, spice_scores, tokenize_java
from .ptb import tokenize_all

Backend = Literal["auto", "java", "python"]
METRICS = ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "SPICE")
JAVA_ONLY = ("METEOR", "SPICE")

# METEOR 1.5, parameters of the task "rank" for English
METEOR_ALPHA = 0.85  # weight of recall against precision
METEOR_BETA = 0.2  # exponent of the fragmentation penalty
METEOR_GAMMA = 0.6  # weight of the fragmentation penalty
METEOR_DELTA = 0.75  # weight of content words against function words
METEOR_STAGE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase


@dataclass(frozen=True)
class CaptionScores:
    """Caption metrics of one set of images."""

    ids: tuple[str, ...]
    """The images, sorted; statistics are in this order."""
    statistics: dict[str, np.ndarray]
    """For each metric, (n, k) statistics. `score_of(metric)` turns their sum over images into the value."""
    backend: str
    """Tokenizer that was used: "java" or "python"."""
    skipped: dict[str, str]
    """For each metric that could not be computed, the reason."""

    @property
    def values(self) -> dict[str, float]:
        """Compute the corpus score of each metric."""
        return {
            name: float(score_of(name)(rows.sum(axis=0), len(rows))) for name, rows in self.statistics.items()
        }


def caption_metrics(
    hypotheses: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    backend: Backend = "auto",
    metrics: Sequence[str] = METRICS,
    timeout_s: float = 600.0,
) -> CaptionScores:
    """Score one caption per image against the references of that image.

    Args:
        hypotheses: image id -> caption. Every image with references needs one.
        references: image id -> human captions, raw text.
        backend: "java" or "python" tokenizer; "auto" takes Java where it is present.
        metrics: names from `METRICS`; those that cannot run here are listed in `skipped`.
        timeout_s: limit for each Java process, in seconds.

    Raises:
        ValueError: ids do not match, an image has no reference, a name is unknown, or Java was asked for and
            fails.
    """
    _check(hypotheses, references, backend, metrics)
    if backend == "auto":
        backend = "java" if java_available() else "python"
    skipped = _skipped(metrics, backend)

    ids = tuple(sorted(references))
    tokenized_hypotheses, tokenized_references = _tokenize(
        [hypotheses[i] for i in ids], [references[i] for i in ids], backend, timeout_s
    )
    statistics = _statistics(
        tokenized_hypotheses,
        tokenized_references,
        [name for name in metrics if name not in skipped],
        timeout_s,
    )
    return CaptionScores(ids, statistics, backend, skipped)


def score_of(metric: str) -> Score:
    """Return the function that turns the summed statistics of a metric into its value."""
    # BLEU and METEOR are ratios of sums over the corpus; the others are means over images.
    if metric.startswith("BLEU-"):
        order = int(metric.removeprefix("BLEU-"))
        return lambda sums, n: bleu_score(sums, order)
    if metric == "METEOR":
        return lambda sums, n: meteor_score(sums)
    return mean_score


def bleu_score(sums: np.ndarray, order: int) -> np.ndarray:
    """Compute corpus BLEU (Papineni et al. 2002).

    Args:
        sums: (..., 10): hypothesis length, closest reference length, 4 counts of n-grams, 4 of matched ones.
        order: length of the longest n-gram.

    Returns:
        (...) values.
    """
    hypothesis_length = sums[..., 0]
    reference_length = sums[..., 1]
    ngrams = sums[..., 2 : 2 + order]
    matched = sums[..., 6 : 6 + order]

    # The small numbers are those of pycocoevalcap, against division by zero; others would give other scores.
    precision = np.prod((matched + 1e-15) / (ngrams + 1e-9), axis=-1) ** (1 / order)
    ratio = (hypothesis_length + 1e-15) / (reference_length + 1e-9)
    brevity_penalty = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
    return precision * brevity_penalty


def meteor_score(sums: np.ndarray) -> np.ndarray:
    """Compute METEOR 1.5 for English (Denkowski and Lavie 2014, sec. 2).

    Args:
        sums: (..., 23): words of hypothesis and reference, function words of both, 4 stages of matches
            (content words of hypothesis and reference, function words of both), chunks, matched words of
            both.

    Returns:
        (...) values.
    """
    words = sums[..., 0:2]
    function_words = sums[..., 2:4]
    stages = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    chunks = sums[..., 20]
    matches = sums[..., 21:23].sum(axis=-1) / 2

    # Weighted matches over weighted words: precision for the hypothesis, recall for the reference.
    content = stages[..., 0:2]
    function = stages[..., 2:4]
    weighted = METEOR_DELTA * content + (1 - METEOR_DELTA) * function
    matched = (METEOR_STAGE_WEIGHTS[:, None] * weighted).sum(axis=-2)
    total = METEOR_DELTA * (words - function_words) + (1 - METEOR_DELTA) * function_words
    precision, recall = np.moveaxis(_ratio(matched, total), -1, 0)
    f_mean = _ratio(precision * recall, METEOR_ALPHA * precision + (1 - METEOR_ALPHA) * recall)

    # The fewer chunks the matches form, the more the order of the words agrees.
    fragmentation = _ratio(chunks, matches)
    return f_mean * (1 - METEOR_GAMMA * fragmentation**METEOR_BETA)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide; 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)


def _check(hypotheses: Mapping, references: Mapping, backend: str, metrics: Sequence[str]) -> None:
    if not references:
        raise ValueError("no references; give at least one image with captions")
    if hypotheses.keys() != references.keys():
        without_caption = references.keys() - hypotheses.keys()
        without_reference = hypotheses.keys() - references.keys()
        example = next(iter(without_caption or without_reference))
        raise ValueError(
            f"{len(without_caption)} images without caption, {len(without_reference)} captions without "
            f"reference (first: {example!r}); score one caption for every image of the reference set"
        )
    empty = next((i for i, captions in references.items() if not captions), None)
    if empty is not None:
        raise ValueError(f"image {empty!r} has no reference caption; leave it out")
    if backend not in ("auto", "java", "python"):
        raise ValueError(f"backend {backend!r}; choose one of: auto, java, python")
    unknown = next((name for name in metrics if name not in METRICS), None)
    if unknown is not None:
        raise ValueError(f"metric {unknown!r}; choose among: {', '.join(METRICS)}")


def _skipped(metrics: Sequence[str], backend: str) -> dict[str, str]:
    """Return the metrics that cannot be computed here, each with the reason."""
    if backend == "python":
        return {name: "needs Java" for name in metrics if name in JAVA_ONLY}
    reason = spice_missing()
    return {"SPICE": reason} if reason and "SPICE" in metrics else {}


def _tokenize(
    hypotheses: list[str], references: list[Sequence[str]], backend: str, timeout_s: float
) -> tuple[list[str], list[list[str]]]:
    """Tokenise all captions in one call, since every call starts Java anew."""
    flat = hypotheses + [caption for captions in references for caption in captions]
    tokens = iter(tokenize_java(flat, timeout_s) if backend == "java" else tokenize_all(flat))
    return [next(tokens) for _ in hypotheses], [[next(tokens) for _ in captions] for captions in references]


def _statistics(
    hypotheses: list[str], references: list[list[str]], metrics: Sequence[str], timeout_s: float
) -> dict[str, np.ndarray]:
    statistics: dict[str, np.ndarray] = {}
    if "CIDEr" in metrics:
        statistics["CIDEr"] = _cider(hypotheses, references)
    orders = [name for name in metrics if name.startswith("BLEU-")]
    if orders:
        statistics |= dict.fromkeys(orders, _bleu_statistics(hypotheses, references))
    if "METEOR" in metrics:
        statistics["METEOR"] = meteor_statistics(hypotheses, references, timeout_s)
    if "ROUGE-L" in metrics:
        statistics["ROUGE-L"] = _rouge_l(hypotheses, references)
    if "SPICE" in metrics:
        statistics["SPICE"] = spice_scores(hypotheses, references, timeout_s)[:, None]
    return statistics


def _cider(hypotheses: list[str], references: list[list[str]]) -> np.ndarray:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    if not any(caption for captions in references for caption in captions):
        # The scorer fails where no reference holds a word.
        return np.zeros((len(hypotheses), 1))

    scorer = CiderScorer(n=4, sigma=6.0)
    for hypothesis, captions in zip(hypotheses, references, strict=True):
        scorer += (hypothesis, captions)
    _, per_image = scorer.compute_score()
    return np.asarray(per_image, dtype=np.float64)[:, None]


def _bleu_statistics(hypotheses: list[str], references: list[list[str]]) -> np.ndarray:
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    rows = []
    for hypothesis, captions in zip(hypotheses, references, strict=True):
        cooked = cook_test(hypothesis, cook_refs(captions), eff="closest")
        rows.append([cooked["testlen"], cooked["reflen"], *cooked["guess"], *cooked["correct"]])
    return np.array(rows, dtype=np.float64)


def _rouge_l(hypotheses: list[str], references: list[list[str]]) -> np.ndarray:
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    pairs = zip(hypotheses, references, strict=True)
    return np.array([[rouge.calc_score([hypothesis], captions)] for hypothesis, captions in pairs])
