"""Words, phrases and sentences of a text: hand-worked answers and properties on real captions."""

import time

import pytest

from tavq.alignment.units import lemma, split_units
from tavq.data.layouts import open_dataset


def test_hand_worked_caption():
    units = split_units("Two brown dogs are jumping over a fallen log . The boy is riding his red bike!")
    assert units.words == ("two", "brown", "dog", "jump", "fall", "log", "boy", "ride", "red", "bike")
    assert units.phrases == (
        "two brown dogs",
        "jumping over a fallen log",
        "fallen log",
        "boy",
        "riding his red bike",
        "red bike",
    )
    assert units.sentences == (
        "Two brown dogs are jumping over a fallen log .",
        "The boy is riding his red bike!",
    )


@pytest.mark.parametrize(
    ("word", "tag", "base"),
    [
        ("dogs", "NNS", "dog"), ("children", "NN", "child"), ("grass", "NN", "grass"),
        ("dresses", "NNS", "dress"), ("shorts", "NNS", "shorts"), ("buses", "NNS", "bus"),
        ("tennis", "NN", "tennis"), ("women", "NNS", "woman"), ("running", "VBG", "run"),
        ("riding", "VBG", "ride"), ("jumps", "VBZ", "jump"), ("carried", "VBD", "carry"),
        ("carries", "VBZ", "carry"), ("dancing", "VBG", "dance"), ("playing", "VBG", "play"),
        ("sat", "VBD", "sit"), ("rolling", "VBG", "roll"), ("catches", "VBZ", "catch"),
        ("sing", "VB", "sing"), ("crossed", "VBD", "cross"), ("swimming", "VBG", "swim"),
        ("looking", "VBG", "look"), ("skating", "VBG", "skate"), ("red", "JJ", "red"),
        ("snowmobiling", "VBG", "snowmobiling"),
    ],
)  # fmt: skip
def test_lemmas(word, tag, base):
    assert lemma(word, tag) == base


def test_generic_heads_stop_words_and_repeats_are_dropped():
    units = split_units(
        "In the foreground of the picture there is a dog. The dog has a ball and the dog is wet."
    )
    assert units.words == ("dog", "ball", "wet")
    assert set(units.phrases) == {"dog", "ball"}


def test_contractions_leave_no_stray_letters():
    units = split_units("The men don't wear the boy's hats.")
    assert {"wear", "hat", "boy", "man"} <= set(units.words)
    assert all(len(unit) > 1 for unit in units.words + units.phrases)


def test_lines_and_white_space():
    units = split_units("a  dog\truns\nTwo cats sit.   They look   at Dr. Smith. İstanbul is big!")
    assert units.sentences == (
        "a dog runs",
        "Two cats sit.",
        "They look at Dr. Smith.",
        "İstanbul is big!",
    )


def test_empty_text_is_refused_and_punctuation_has_no_unit():
    with pytest.raises(ValueError, match="empty text"):
        split_units(" \n")
    assert split_units("...").sentences == ()


@pytest.mark.slow
def test_real_captions(flickr8k_dir):
    examples = open_dataset(flickr8k_dir, "val").examples[:300]
    captions = [caption for example in examples for caption in example.captions]
    start = time.perf_counter()
    units = [split_units(caption) for caption in captions]
    rate = len(captions) / (time.perf_counter() - start)
    assert rate > 300, f"{rate:.0f} captions a second"  # 3,700 on one idle core
    for caption, unit in zip(captions, units, strict=True):
        assert "".join(unit.sentences).replace(" ", "") == caption.replace(" ", "")
        for level in (unit.words, unit.phrases, unit.sentences):
            assert len(set(level)) == len(level)
        assert not {"is", "are", "has", "be", "the", "a"} & set(unit.words)
    assert sum(bool(unit.words and unit.phrases) for unit in units) > 0.99 * len(units)
