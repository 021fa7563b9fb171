"""CIDEr-D as a reward: the metric's values, and the end of the sentence as a word."""

import numpy as np
import pytest
from pycocoevalcap.cider.cider_scorer import CiderScorer

from tavq.captioner.reward import END, CiderD, DocumentFrequencies, ends_in_function_word, with_end

SUBJECTS = [
    "a brown dog",
    "two men in red shirts",
    "the little girl",
    "a man on a bike",
    "black and white dogs",
]
ACTIONS = [
    "runs across the grass",
    "are sitting on a bench",
    "jumps over a log",
    "play in the snow",
    "is running",
]


def random_captions(images: int, each: int, seed: int) -> list[list[list[str]]]:
    random = np.random.default_rng(seed)
    return [
        [f"{random.choice(SUBJECTS)} {random.choice(ACTIONS)}".split() for _ in range(each)]
        for _ in range(images)
    ]


def pycocoevalcap(candidates: list[list[str]], references: list[list[list[str]]]) -> np.ndarray:
    scorer = CiderScorer(n=4, sigma=6.0)
    for candidate, captions in zip(candidates, references, strict=True):
        scorer += (" ".join(candidate), [" ".join(words) for words in captions])
    return scorer.compute_score()[1]


def test_equals_pycocoevalcap_with_the_same_frequencies():
    references = random_captions(40, 5, seed=0)
    candidates = [captions[0] for captions in random_captions(40, 1, seed=1)]
    candidates[:3] = [[], ["dog"], ["a", "a", "a", "a", "a", "dog"]]
    scores = CiderD(references).scores(candidates, range(40))
    expected = pycocoevalcap(candidates, references)
    assert expected.std() > 0.5
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)


def test_frequencies_of_another_split_change_the_score():
    references = random_captions(40, 5, seed=0)
    frequencies = DocumentFrequencies.of(random_captions(400, 5, seed=2))
    candidates = [captions[0] for captions in references]
    own = CiderD(references).scores(candidates, range(40))
    assert np.abs(CiderD(references, frequencies).scores(candidates, range(40)) - own).max() > 0.1


def test_hand_worked_frequencies():
    frequencies = DocumentFrequencies.of([[["a", "dog"], ["a", "cat"]], [["a", "bird"]]])
    assert frequencies.images == 2
    assert (
        frequencies.counts["a",] == 2
        and frequencies.counts["dog",] == 1
        and frequencies.counts["a", "dog"] == 1
    )


def test_the_end_makes_a_broken_caption_cost():
    references = [
        [with_end("a man on a bike".split()), with_end("a man rides".split())],
        [with_end(["snow"])],
    ]
    whole, broken = [with_end(words.split()) for words in ("a man on a bike", "a man on a bike on a")]
    cut = "a man on a".split()
    scores = CiderD(references).scores([whole, broken, cut], [0, 0, 0])
    assert scores[0] > scores[1] and scores[0] > scores[2]
    assert with_end(["a"]) == ["a", END]


@pytest.mark.parametrize(
    ("caption", "broken"),
    [("a man on a", True), ("a man in the snow", False), ("a dog and", True), ("", False)],
)
def test_function_word_end(caption: str, broken: bool):
    assert ends_in_function_word(caption.split()) is broken
