"""Words and ids: our own vocabulary in the metric's form, or the tokenizer of a pretrained language model.

Both offer the same: `encode` a caption, `decode` ids for people, `words` for the metric, `pieces` to show.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tavq.metrics.ptb import tokenize

CLITIC = re.compile(r" (?=(?:'(?:s|re|ve|ll|d|m)|n't)(?: |$))")


def metric_words(caption: str) -> list[str]:
    """The caption as the metric sees it: lower-case Penn Treebank tokens without punctuation."""
    return tokenize(caption).split()


def detokenize(words: Iterable[str]) -> str:
    """Words in the metric's form as a plain lower-case sentence; `metric_words` of it gives the same words.

    There is no full stop: behind a single letter or an abbreviation it would become part of a token.
    """
    return CLITIC.sub("", " ".join(words))


class WordVocabulary:
    """Words seen often enough in the training captions, behind three special ids."""

    pad_id, end_id, unknown_id = 0, 1, 2
    num_special = 3

    def __init__(self, words: Sequence[str]):
        self.names = tuple(words)
        self.ids = {word: index for index, word in enumerate(words, start=self.num_special)}

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int = 5) -> WordVocabulary:
        """The words that `captions` hold at least `min_count` times, the most frequent first."""
        counts = Counter(word for caption in captions for word in metric_words(caption))
        kept = [word for word, count in counts.items() if count >= min_count]
        if not kept:
            raise ValueError(f"no word occurs {min_count} times in the captions; lower --min-word-count")
        return cls(sorted(kept, key=lambda word: (-counts[word], word)))

    def __len__(self) -> int:
        return self.num_special + len(self.names)

    @property
    def suppressed_ids(self) -> list[int]:
        """What no caption may hold."""
        return [self.pad_id, self.unknown_id]

    def encode(self, caption: str) -> list[int]:
        """Ids of a caption, without the end; a rare word becomes `unknown_id`."""
        return [self.ids.get(word, self.unknown_id) for word in metric_words(caption)]

    def words(self, ids: Iterable[int]) -> list[str]:
        """The caption's words in the metric's form."""
        return self.pieces(ids)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """One string an id."""
        return [self.names[i - self.num_special] for i in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The caption for people."""
        return detokenize(self.pieces(ids))


class PretrainedVocabulary:
    """The tokenizer of a pretrained causal language model; captions are lower-case, without full stop."""

    def __init__(self, tokenizer: Any):
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{tokenizer.name_or_path} has no end token; choose a model that has one")
        self.tokenizer = tokenizer
        self.end_id = tokenizer.eos_token_id
        self.pad_id = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @classmethod
    def load(cls, source: str | Path) -> PretrainedVocabulary:
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(source))

    @property
    def suppressed_ids(self) -> list[int]:
        return []

    def save(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)

    def encode(self, caption: str) -> list[int]:
        text = detokenize(metric_words(caption))
        return self.tokenizer(" " + text, add_special_tokens=False)["input_ids"]

    def words(self, ids: Iterable[int]) -> list[str]:
        return metric_words(self.decode(ids))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self.tokenizer.decode([i]).strip() for i in ids]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.tokenizer.decode(list(ids)).split())


Vocabulary = WordVocabulary | PretrainedVocabulary
