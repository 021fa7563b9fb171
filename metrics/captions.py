"""CIDEr, BLEU-1..4, METEOR, ROUGE-L and SPICE of captions, with what the bootstrap needs, by pycocoevalcap.

CIDEr is pycocoevalcap's, which is the CIDEr-D formula with the document frequencies of the evaluated
references. Values are raw: a published "CIDEr 60" is 0.60 here. Java tokenises where it is present; the
tokenizer in `ptb.py` gives the same tokens without. METEOR and SPICE exist in Java only.
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


@dataclass(frozen=True)
class CaptionScores:
    """Caption metrics of one set of images."""

    ids: tuple[str, ...]
    statistics: dict[str, np.ndarray]
    """By metric, (n, k): what `score_of(metric)` turns into the value once summed over images."""
    backend: str
    """Which tokenizer was used: "java" or "python"."""
    skipped: dict[str, str]
    """Metric that could not be measured -> why."""

    @property
    def values(self) -> dict[str, float]:
        """The corpus score of each metric."""
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
    """Score one caption an image against that image's references.

    Args:
        hypotheses: image id -> caption. Every image with references needs one.
        references: image id -> human captions, raw text.
        backend: "java" or "python" tokenizer; "auto" takes Java where it is present.
        metrics: names out of `METRICS`; what cannot run here is listed in `skipped`.
        timeout_s: the longest a Java process may take.

    Raises:
        ValueError: ids do not match, an image has no reference, an unknown name, or Java is asked for and
            fails.
    """
    _check(hypotheses, references, backend, metrics)
    ids = tuple(sorted(references))
    backend = ("java" if java_available() else "python") if backend == "auto" else backend
    tokenized = _tokenize([hypotheses[i] for i in ids], [references[i] for i in ids], backend, timeout_s)
    skipped = _skipped(metrics, backend)
    statistics = _measure(*tokenized, [name for name in metrics if name not in skipped], timeout_s)
    return CaptionScores(ids, statistics, backend, skipped)


def score_of(metric: str) -> Score:
    """Return the function from summed statistics to a metric's value: a mean, but for BLEU and METEOR."""
    if metric.startswith("BLEU-"):
        order = int(metric.removeprefix("BLEU-"))
        return lambda sums, n: bleu_score(sums, order)
    return (lambda sums, n: meteor_score(sums)) if metric == "METEOR" else mean_score


def bleu_score(sums: np.ndarray, order: int) -> np.ndarray:
    """Corpus BLEU (Papineni et al. 2002) with pycocoevalcap's guards against division by zero.

    Args:
        sums: (..., 10): hypothesis length, closest reference length, 4 counts of n-grams, 4 of those matched.
        order: the longest n-gram.
    """
    guess, correct = sums[..., 2 : 2 + order], sums[..., 6 : 6 + order]
    precision = np.prod((correct + 1e-15) / (guess + 1e-9), axis=-1) ** (1 / order)
    ratio = (sums[..., 0] + 1e-15) / (sums[..., 1] + 1e-9)
    return precision * np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)


def meteor_score(sums: np.ndarray) -> np.ndarray:
    """METEOR 1.5 for English (Denkowski and Lavie 2014, sec. 2) from its summed statistics (..., 23)."""
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    weights = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
    stages = sums[..., 4:20].reshape(
        *sums.shape[:-1], 4, 4
    )  # content of hypothesis, of reference; function of both
    content, function = stages[..., 0:2], stages[..., 2:4]
    matched = (weights[:, None] * (delta * content + (1 - delta) * function)).sum(axis=-2)
    lengths, functions = sums[..., 0:2], sums[..., 2:4]
    total = delta * (lengths - functions) + (1 - delta) * functions
    precision, recall = np.moveaxis(
        np.divide(matched, total, out=np.zeros_like(total), where=total > 0), -1, 0
    )
    denominator = alpha * precision + (1 - alpha) * recall
    f_mean = np.divide(precision * recall, denominator, out=np.zeros_like(recall), where=denominator > 0)
    words = sums[..., 21:23].sum(axis=-1) / 2
    fragments = np.divide(sums[..., 20], words, out=np.zeros_like(words), where=words > 0)
    return f_mean * (1 - gamma * fragments**beta)


def _check(hypotheses: Mapping, references: Mapping, backend: str, metrics: Sequence[str]) -> None:
    if not references:
        raise ValueError("no references; give at least one image with captions")
    if hypotheses.keys() != references.keys():
        lacking, spare = references.keys() - hypotheses.keys(), hypotheses.keys() - references.keys()
        example = next(iter(lacking or spare))
        raise ValueError(
            f"{len(lacking)} images without caption, {len(spare)} captions without reference "
            f"(first: {example!r}); score one caption for every image of the reference set"
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
    if backend == "python":
        return {name: "needs Java" for name in metrics if name in JAVA_ONLY}
    reason = spice_missing()
    return {"SPICE": reason} if reason and "SPICE" in metrics else {}


def _tokenize(
    hypotheses: list[str], references: list[Sequence[str]], backend: str, timeout_s: float
) -> tuple[list[str], list[list[str]]]:
    flat = hypotheses + [caption for captions in references for caption in captions]
    tokens = iter(tokenize_java(flat, timeout_s) if backend == "java" else tokenize_all(flat))
    return [next(tokens) for _ in hypotheses], [[next(tokens) for _ in captions] for captions in references]


def _measure(
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
        statistics["ROUGE-L"] = _rouge(hypotheses, references)
    if "SPICE" in metrics:
        statistics["SPICE"] = spice_scores(hypotheses, references, timeout_s)[:, None]
    return statistics


def _cider(hypotheses: list[str], references: list[list[str]]) -> np.ndarray:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    if not any(caption for captions in references for caption in captions):
        return np.zeros((len(hypotheses), 1))  # the scorer needs one word among the references
    scorer = CiderScorer(n=4, sigma=6.0)
    for hypothesis, captions in zip(hypotheses, references, strict=True):
        scorer += (hypothesis, captions)
    return np.asarray(scorer.compute_score()[1], dtype=np.float64)[:, None]


def _bleu_statistics(hypotheses: list[str], references: list[list[str]]) -> np.ndarray:
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    rows = []
    for hypothesis, captions in zip(hypotheses, references, strict=True):
        cooked = cook_test(hypothesis, cook_refs(captions), eff="closest")
        rows.append([cooked["testlen"], cooked["reflen"], *cooked["guess"], *cooked["correct"]])
    return np.array(rows, dtype=np.float64)


def _rouge(hypotheses: list[str], references: list[list[str]]) -> np.ndarray:
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    pairs = zip(hypotheses, references, strict=True)
    return np.array([[rouge.calc_score([hypothesis], captions)] for hypothesis, captions in pairs])
