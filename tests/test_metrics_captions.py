"""Caption metrics against pycocoevalcap, with Java and without, and what happens when Java fails."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from tavq.eval.results import with_intervals
from tavq.metrics import java
from tavq.metrics.captions import METRICS, bleu_score, caption_metrics, meteor_score
from tavq.metrics.java import JavaError, java_available, tokenize_java

FIXTURE = json.loads((Path(__file__).parent / "fixtures/coco_captions.json").read_text())
PURE = [name for name in METRICS if name not in ("METEOR", "SPICE")]
needs_java = pytest.mark.skipif(not java_available(), reason="needs Java")


@pytest.fixture(scope="module")
def captions() -> tuple[dict[str, str], dict[str, list[str]]]:
    references: dict[str, list[str]] = {}
    for item in FIXTURE["annotations"]:
        references.setdefault(str(item["image_id"]), []).append(item["caption"])
    return {str(item["image_id"]): item["caption"] for item in FIXTURE["results"]}, references


@pytest.mark.slow
@needs_java
def test_java_equals_pycocoevalcap(captions):
    scores = caption_metrics(*captions, backend="java")
    assert scores.backend == "java"
    assert set(scores.values) | set(scores.skipped) == set(METRICS)
    for name, expected in FIXTURE["pycocoevalcap"].items():
        assert scores.values[name] == pytest.approx(expected, abs=1e-9), name


def test_python_equals_pycocoevalcap(captions):
    scores = caption_metrics(*captions, backend="python")
    assert set(scores.values) == set(PURE)
    assert scores.skipped == {"METEOR": "needs Java", "SPICE": "needs Java"}
    for name in PURE:
        assert scores.values[name] == pytest.approx(FIXTURE["pycocoevalcap"][name], abs=1e-9), name


def test_meteor_of_whole_matches(monkeypatch):
    """By hand: a caption equal to its reference scores 1 and adds no fragment to the sum (2 in 7 words).

    The lines are those that METEOR 1.5 gives for these captions; its own total for them is the same.
    """
    counts = ["1 1 0 0 1 1", "3 3 1 1 2 2 1 1", "3 3 0 0 3 3"]
    rows = [(line + " 0" * 20).split()[:20] for line in counts]
    tails = ["1 1 1", "1 3 3", "2 3 3"]
    lines = [" ".join(row) + f" {tail}\n" for row, tail in zip(rows, tails, strict=True)]
    monkeypatch.setattr(java, "_run_java", lambda *_: "".join(lines))
    hypotheses = ["dog", "a b c", "red dog barks"]
    statistics = java.meteor_statistics(hypotheses, [["dog"], ["a b c"], ["barks red dog"]])
    assert meteor_score(statistics) == pytest.approx([1, 1, 1 - 0.6 * (2 / 3) ** 0.2])
    assert meteor_score(statistics.sum(axis=0)) == pytest.approx(1 - 0.6 * (2 / 7) ** 0.2)


@needs_java
def test_odd_captions_score_alike_with_and_without_java():
    """Empty, punctuation only, one reference, very long: the scores agree to 1e-9."""
    odd = json.loads((Path(__file__).parent / "fixtures/ptb_corenlp.json").read_text())[:900]
    texts = [caption for caption, _ in odd] + ["", "...", "word " * 300]
    draw = random.Random(0)
    hypotheses = {str(i): text for i, text in enumerate(texts[:300])}
    references = {i: draw.sample(texts, k=draw.randint(1, 5)) for i in hypotheses}
    results = [
        caption_metrics(hypotheses, references, backend=backend, metrics=PURE)
        for backend in ("java", "python")
    ]
    for name in PURE:
        np.testing.assert_allclose(results[0].statistics[name], results[1].statistics[name], atol=1e-9)
        assert results[0].values[name] == pytest.approx(results[1].values[name], abs=1e-9)


@pytest.mark.slow
def test_published_result(shared_dir):
    content = json.loads((shared_dir / "data/coco_captions/published_result.json").read_text())
    hypotheses = {str(item["image_id"]): item["caption"] for item in content["results"]}
    for backend in ["python", "java"] if java_available() else ["python"]:
        values = caption_metrics(hypotheses, content["refs"], backend=backend, metrics=PURE).values
        assert values["CIDEr"] == pytest.approx(0.59979, abs=1e-5)
        assert values["BLEU-4"] == pytest.approx(0.19083, abs=1e-5)
        assert values["ROUGE-L"] == pytest.approx(0.39625, abs=1e-5)


def test_shuffled_captions_score_lower(captions):
    hypotheses, references = captions
    shuffled = dict(
        zip(hypotheses, list(hypotheses.values())[1:] + list(hypotheses.values())[:1], strict=True)
    )
    right, wrong = (caption_metrics(h, references, backend="python").values for h in (hypotheses, shuffled))
    assert all(wrong[name] < right[name] for name in PURE)
    assert wrong["CIDEr"] < right["CIDEr"] / 3


def test_identical_captions_by_hand():
    """Two images, each caption equal to its reference: CIDEr 10, the rest 1; three words lack 4-grams."""
    pair = {"a": "a red dog runs", "b": "two blue cats sleep"}
    values = caption_metrics(pair, {i: [c] for i, c in pair.items()}, backend="python").values
    assert values["CIDEr"] == pytest.approx(10)
    assert values["BLEU-4"] == pytest.approx(1, abs=1e-6)
    assert values["ROUGE-L"] == pytest.approx(1)


def test_bleu_by_hand():
    """4 words against 5: unigrams 3/4, bigrams 1/3, brevity exp(1 - 5/4)."""
    sums = np.array([4, 5, 4, 3, 2, 1, 3, 1, 0, 0], dtype=float)
    assert bleu_score(sums, 1) == pytest.approx(0.75 * np.exp(-0.25), abs=1e-6)
    assert bleu_score(sums, 2) == pytest.approx(np.sqrt(0.25) * np.exp(-0.25), abs=1e-6)


def test_the_intervals_lie_around_the_values(captions):
    scores = caption_metrics(*captions, backend="python")
    assert scores.statistics["CIDEr"].mean() == pytest.approx(scores.values["CIDEr"])
    for name, entry in with_intervals(scores.statistics).items():
        assert entry["low"] < scores.values[name] == entry["value"] < entry["high"]


@pytest.mark.parametrize(
    ("hypotheses", "references", "words"),
    [
        ({}, {}, "no references"),
        ({"a": "x"}, {"b": ["x"]}, "1 images without caption"),
        ({"a": "x"}, {"a": []}, "no reference caption"),
    ],
)
def test_refused_input(hypotheses, references, words):
    with pytest.raises(ValueError, match=words):
        caption_metrics(hypotheses, references, backend="python")


def test_empty_references_score_zero():
    values = caption_metrics({"a": "a dog", "b": ""}, {"a": ["..."], "b": [""]}, backend="python").values
    assert values["CIDEr"] == 0 and values["BLEU-1"] < 1e-6


def test_without_java(monkeypatch, captions):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert caption_metrics(*captions, backend="auto", metrics=["BLEU-1"]).backend == "python"
    with pytest.raises(JavaError, match="no java on the path; install one"):
        caption_metrics(*captions, backend="java")


@pytest.mark.parametrize(
    ("script", "words"), [("sleep 60", "no answer in 0.5 s"), ("exit 3", r"java failed \(3\)")]
)
def test_broken_java(monkeypatch, tmp_path, script, words):
    """A java that hangs (in a child of its own, too) or fails ends in one clear error, at once."""
    stub = tmp_path / "java"
    stub.write_text(f"#!/bin/sh\n{script}\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    started = time.monotonic()
    with pytest.raises(JavaError, match=words):
        tokenize_java(["a dog"], timeout_s=0.5)
    assert time.monotonic() - started < 10


def test_java_that_loses_a_line(monkeypatch):
    monkeypatch.setattr(java, "_run_java", lambda *_: "a dog\n\n")
    with pytest.raises(JavaError, match="1 lines for 2 captions"):
        tokenize_java(["a dog", "a cat"])


def test_spice_runs_where_its_models_are(monkeypatch, tmp_path):
    """The command and the file formats of SPICE 1.0, with a stand-in for the program."""
    stub = tmp_path / "java"
    stub.write_text(
        "#!/usr/bin/env python3\nimport json, sys\na = sys.argv\ni = a.index('-out')\n"
        "items = json.load(open(a[i - 1]))\n"
        "scores = [{'image_id': x['image_id'], 'scores': {'All': {'f': len(x['refs']) / 10}}}\n"
        "          for x in items]\n"
        "json.dump(scores, open(a[i + 1], 'w'))\n"
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/local/bin:/usr/bin:/bin")
    assert java.spice_scores(["a", "b"], [["x"], ["y", "z"]]).tolist() == [0.1, 0.2]
