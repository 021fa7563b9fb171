"""The Python tokenizer gives what the Java one gives."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tavq.metrics.java import java_available, tokenize_java
from tavq.metrics.ptb import sanitise, tokenize, tokenize_all

CASES = [
    tuple(case) for case in json.loads((Path(__file__).parent / "fixtures/ptb_corenlp.json").read_text())
]
ODD = """
dog A Mr. U.S. 5 1,000 3.5 1/2 ½ don't it's dogs' 's 'n' cannot gonna T-shirt and/or w/ AT&T
C++ #tag @user a@b.com http://x.com/a foo.com ( ) [ ] <b> . ... ! ?! , ; : - -- … " ' `` “ ”
\u2018 \u2019 é 日本 😀 ♥ ° % $5 £5 & &amp; * / \\ _ = ~ | :) <3 5'10" '80s 5th 10:30 p.m. no. St.
etc. Inc. 12/25/10 (650) -5 .5 end.Next o'clock ma'am ™ привет Ph.D. don\u2019t
""".split()


def test_recorded_odd_captions():
    """1,695 odd captions with the tokens that CoreNLP 3.4.1 gave for them."""
    wrong = [(caption, tokens, tokenize(caption)) for caption, tokens in CASES if tokenize(caption) != tokens]
    assert len(CASES) > 1600
    assert wrong == []


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog isn't (really) here.", "a man 's dog is n't -lrb- really -rrb- here"),
        ("Mr. Smith, U.S. citizen; at 5 p.m.", "mr. smith u.s. citizen at 5 p.m."),
        ("end of one.Start of next", "end of one.start of next"),
        ("", ""),
        (" \n ", ""),
        ("?! ... --", "?!"),
    ],
)
def test_by_hand(caption, tokens):
    assert tokenize(caption) == tokens


def test_line_separators_cannot_shift_captions():
    captions = ["a dog\u2028runs\r\nfast", "a\x85cat", "x"]
    assert [sanitise(caption).count("\n") for caption in captions] == [0, 0, 0]
    assert tokenize_all(captions) == ["a dog runs fast", "a cat", "x"]


@pytest.mark.skipif(not java_available(), reason="needs Java")
def test_java_now():
    """Fresh random captions and the order-sensitive ones, against the Java tokenizer of this machine."""
    draw = random.Random(7)
    captions = [" ".join(draw.choices(ODD, k=draw.randint(0, 9))) for _ in range(500)]
    captions += ["bus no.", "5 dogs", "a\u2028b", "", "x"]
    assert tokenize_all(captions) == tokenize_java(captions)
