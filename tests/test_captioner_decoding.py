"""Decoding: a caption belongs to its image, its settings and its seed, never to the batch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from tavq.captioner.config import GREEDY, PRESETS, DecodingConfig
from tavq.captioner.dataset import caption_targets
from tavq.captioner.decoding import Caption, Word, decode_captions, decode_word_ids
from tavq.captioner.model import Captioner, CaptionerConfig

WORDS = tuple(f"w{i}" for i in range(30))
SETTINGS = {
    "greedy": GREEDY,
    "beam": DecodingConfig(beam=4, n_best=3),
    "long": DecodingConfig(beam=3, length_penalty=2.0, no_repeat_ngram=2),
    "sample": DecodingConfig(temperature=1.0, n_best=2),
    "nucleus": DecodingConfig(temperature=0.7, top_p=0.8),
}


def spelling(ids: torch.Tensor, texts: Sequence[Sequence[str]]) -> torch.Tensor:
    """A fit of ids (B, N) and B times C texts that knows the image as well as the sentence: (B, C)."""
    found = [
        [-((row.sum().item() + sum(map(ord, t))) % 97) / 97 for t in g]
        for row, g in zip(ids, texts, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 32, (8, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def captioner(ids: torch.Tensor) -> Captioner:
    """Half-way to knowing eight captions of 2 to 9 words: it hesitates, and ends at various lengths."""
    torch.manual_seed(0)
    shape = dataclasses.replace(PRESETS["tiny"], dropout=0.0, token_dropout=0.0)
    captioner = Captioner(CaptionerConfig(shape, 32, 8, (3, 4), "abc", WORDS))
    words, lengths = torch.randint(3, 13, (8, 1, 9)), torch.arange(2, 10)[:, None]
    targets = caption_targets(words, lengths, captioner.text.end_id)
    optimizer = torch.optim.Adam(captioner.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(captioner(ids, words).flatten(0, 2), targets.flatten(), ignore_index=-1).backward()
        optimizer.step()
    return captioner.eval().requires_grad_(False)


@pytest.mark.parametrize("name", SETTINGS)
def test_alone_in_a_batch_and_in_another_order(captioner: Captioner, ids: torch.Tensor, name: str):
    settings, seeds = SETTINGS[name], list(range(10, 18))
    together = decode_word_ids(captioner, ids, settings, seeds)
    alone = [decode_word_ids(captioner, ids[i : i + 1], settings, seeds[i : i + 1])[0] for i in range(8)]
    turned = decode_word_ids(captioner, ids.flip(0), settings, seeds[::-1])[::-1]
    assert together == alone == turned
    assert all(len(found) == settings.n_best for found in together)
    lengths = {len(caption) for found in together for caption in found}
    assert len(lengths) > 1, "the captions must differ in length for this test to mean anything"
    assert len({tuple(found[0]) for found in together}) > 4


def test_greedy_is_the_argmax_of_every_step(captioner: Captioner, ids: torch.Tensor):
    text, found = captioner.text, decode_word_ids(captioner, ids, GREEDY)
    for row, [caption] in zip(ids, found, strict=True):
        logits = captioner(row[None], torch.tensor([[caption]]))[0, 0]
        logits[:, text.suppressed_ids] = -torch.inf
        logits[0, text.end_id] = -torch.inf
        best = logits.argmax(-1).tolist()
        assert best[: len(caption)] == caption
        assert len(caption) == captioner.config.shape.max_words or best[len(caption)] == text.end_id


def test_wider_beams_find_likelier_captions(captioner: Captioner, ids: torch.Tensor):
    greedy = decode_captions(captioner, ids, GREEDY)  # of which the test above says what it is
    wide = decode_captions(captioner, ids, DecodingConfig(beam=8))
    scores = torch.tensor([[a[0].score, b[0].score] for a, b in zip(greedy, wide, strict=True)])
    assert (scores[:, 1] > scores[:, 0]).any() and scores[:, 1].mean() > scores[:, 0].mean()


def test_scores_are_the_mean_log_probability_of_words_and_end(captioner: Captioner, ids: torch.Tensor):
    for [caption] in decode_captions(captioner, ids, DecodingConfig(beam=3, max_words=4)):
        words = torch.tensor([word.probability for word in caption.words]).log()
        if len(words) == 4:
            assert caption.score == pytest.approx(words.mean().item(), abs=1e-4)
        else:
            end = caption.score * (len(words) + 1) - words.sum().item()
            assert end < 0


def test_blocked_ngrams_do_not_occur_twice(captioner: Captioner, ids: torch.Tensor):
    def repeats(settings: DecodingConfig) -> int:
        groups = decode_word_ids(captioner, ids, settings)
        pairs = [list(itertools.pairwise(caption)) for group in groups for caption in group]
        return sum(len(p) - len(set(p)) for p in pairs)

    assert repeats(DecodingConfig(beam=3, length_penalty=5.0)) > 0
    assert repeats(DecodingConfig(beam=3, length_penalty=5.0, no_repeat_ngram=2)) == 0


def test_no_caption_holds_padding_or_the_unknown_word(captioner: Captioner, ids: torch.Tensor):
    found = decode_word_ids(captioner, ids, DecodingConfig(temperature=3.0, n_best=8))
    assert all(caption and min(caption) >= captioner.text.num_special for group in found for caption in group)


def test_samples_come_with_the_best_first(captioner: Captioner, ids: torch.Tensor):
    for found in decode_captions(captioner, ids, DecodingConfig(temperature=2.0, n_best=6)):
        scores = [caption.score for caption in found]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1


@pytest.mark.parametrize("drawn", [{"beam": 4}, {"n_best": 4, "temperature": 1.0}])
def test_alignment_ranks_all_candidates_by_likelihood_and_fit(
    captioner: Captioner, ids: torch.Tensor, drawn: dict[str, float]
):
    settings = DecodingConfig(**drawn, alignment=3.0)
    likely = decode_captions(captioner, ids, dataclasses.replace(settings, n_best=4, alignment=0.0))
    expected = []
    for row, candidates in zip(ids, likely, strict=True):
        fits = spelling(row[None], [[c.text for c in candidates]])[0].tolist()
        scored = [(c.score + 3.0 * fit, c.text) for c, fit in zip(candidates, fits, strict=True)]
        expected.append(sorted(scored, key=lambda pair: -pair[0])[: settings.n_best])
    found = decode_captions(captioner, ids, settings, alignment_score=spelling)
    assert [[c.text for c in group] for group in found] == [[text for _, text in group] for group in expected]
    assert found[0][0].score == pytest.approx(expected[0][0][0])
    alone = [decode_captions(captioner, row[None], settings, alignment_score=spelling)[0] for row in ids]
    best = [group[0].text for group in found]
    assert best == [group[0].text for group in alone]
    assert best != [group[0].text for group in likely]


def test_alignment_needs_somebody_who_knows_the_codes(captioner: Captioner, ids: torch.Tensor):
    with pytest.raises(ValueError, match="no alignment_score is given; call Pipeline"):
        decode_captions(captioner, ids, DecodingConfig(alignment=4.0))


def test_seeds_decide_what_is_sampled(captioner: Captioner, ids: torch.Tensor):
    settings = DecodingConfig(temperature=1.0)
    eight = ids[:1].repeat(8, 1)
    one = decode_word_ids(captioner, eight, settings, range(8))
    other = decode_word_ids(captioner, eight, settings, range(8, 16))
    assert one != other and len({tuple(found[0]) for found in one}) > 1

    [alone] = decode_word_ids(captioner, ids[:1], settings)
    assert decode_word_ids(captioner, ids[:1].repeat(3, 1), settings)[0] == alone

    seeded = [dataclasses.replace(settings, seed=seed) for seed in range(8)]
    assert [decode_word_ids(captioner, ids[:1], each)[0] for each in seeded] == one


def test_samples_follow_the_model(captioner: Captioner, ids: torch.Tensor):
    settings = DecodingConfig(temperature=1.0)
    groups = decode_word_ids(captioner, ids[:1].repeat(2000, 1), settings, range(2000))
    first = [group[0][0] for group in groups]
    logits = captioner(ids[:1], torch.zeros(1, 1, 1, dtype=torch.long))[0, 0, 0]
    logits[[*captioner.text.suppressed_ids, captioner.text.end_id]] = -torch.inf
    shares = torch.bincount(torch.tensor(first), minlength=len(logits)) / 2000
    assert (shares - logits.softmax(-1)).abs().max() < 0.04


def test_patches_and_marks(captioner: Captioner, ids: torch.Tensor):
    [caption, *_], *_ = decode_captions(captioner, ids.view(8, 3, 4), with_patches=True)
    assert all(word.patches.shape == (3, 4) for word in caption.words)
    assert sum(word.patches.sum() for word in caption.words) == pytest.approx(len(caption.words), abs=1e-4)
    doubtful = Caption("a dog", -1.0, (Word("a", 0.9), Word("dog", 0.1)))
    assert doubtful.marked(0.5) == "a [dog?]" and doubtful.marked(0.05) == "a dog"


def test_no_image_gives_no_caption(captioner: Captioner):
    assert decode_captions(captioner, torch.zeros(0, 12, dtype=torch.long)) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beam": 0}, "beam is 0, expected 1 or more"),
        ({"beam": 2, "n_best": 3}, "n_best is 3 and beam 2; widen the beam"),
        ({"top_p": 0.0}, "expected temperature >= 0 and 0 < top_p <= 1"),
        ({"alignment": -1.0}, "alignment is -1.0 with 5 candidates an image, expected 0 or more"),
        ({"alignment": 4.0, "beam": 1}, "several candidates to rank: widen the beam, or sample several"),
        ({"alignment": 4.0, "temperature": 1.0}, "alignment is 4.0 with 1 candidates an image"),
    ],
)
def test_impossible_settings(wrong: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DecodingConfig(), **wrong)


def test_captions_longer_than_trained_are_refused(captioner: Captioner, ids: torch.Tensor):
    with pytest.raises(ValueError, match="max_words is 40, expected 1 to 16"):
        decode_captions(captioner, ids, DecodingConfig(max_words=40))
