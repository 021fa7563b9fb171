"""Word ids: a vocabulary of whole words, or the sub-word tokenizer of a pretrained language model.

Both have the same methods: `encode` a caption, `decode` ids to a sentence, `words` for the caption metrics,
and `pieces` to show one string per id.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tavq.base.hub import DATA_ONLY
from tavq.metrics.ptb import tokenize

CLITIC = re.compile(r" (?=(?:'(?:s|re|ve|ll|d|m)|n't)(?: |$))")


def metric_words(caption: str) -> list[str]:
    """Split a caption as the metrics do: lower-case Penn Treebank tokens without punctuation."""
    return tokenize(caption).split()


def detokenize(words: Iterable[str]) -> str:
    """Join Penn Treebank tokens to a plain sentence, which `metric_words` splits into the same tokens.

    The sentence has no full stop: behind a single letter or an abbreviation it would become part of a token.
    """
    return CLITIC.sub("", " ".join(words))


class WordVocabulary:
    """The frequent words of the training captions, behind three special ids.

    Args:
        words: most frequent first.
    """

    pad_id = 0
    end_id = 1
    unknown_id = 2
    num_special = 3

    def __init__(self, words: Sequence[str]):
        self.names = tuple(words)
        self.ids = {word: index for index, word in enumerate(words, start=self.num_special)}

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int = 5) -> WordVocabulary:
        """Collect the words that occur at least `min_count` times in `captions`."""
        counts = Counter(word for caption in captions for word in metric_words(caption))
        frequent = [word for word, count in counts.items() if count >= min_count]
        if not frequent:
            raise ValueError(f"no word occurs {min_count} times in the captions; lower --min-word-count")
        # Equally frequent words are in alphabetical order: ids do not depend on the order of the captions.
        return cls(sorted(frequent, key=lambda word: (-counts[word], word)))

    def __len__(self) -> int:
        return self.num_special + len(self.names)

    @property
    def fingerprint(self) -> str:
        """All that `encode` depends on, for caches."""
        return " ".join(self.names)

    @property
    def suppressed_ids(self) -> list[int]:
        """Ids that are never decoded or sampled."""
        return [self.pad_id, self.unknown_id]

    def encode(self, caption: str) -> list[int]:
        """Turn a caption into ids, without the end token; a rare word becomes `unknown_id`."""
        return [self.ids.get(word, self.unknown_id) for word in metric_words(caption)]

    def words(self, ids: Iterable[int]) -> list[str]:
        """Return the caption's words as the metrics have them."""
        return self.pieces(ids)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return one string per id."""
        return [self.names[i - self.num_special] for i in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into a sentence."""
        return detokenize(self.pieces(ids))


class PretrainedVocabulary:
    """The sub-word tokenizer of a pretrained causal language model.

    Captions are lower-case and have no full stop, as with `WordVocabulary`: what the two say is comparable.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any):
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{tokenizer.name_or_path} has no end token; choose a model that has one")
        self.tokenizer = tokenizer
        self.end_id = tokenizer.eos_token_id
        self.pad_id = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @classmethod
    def load(cls, source: str | Path) -> PretrainedVocabulary:
        """Load from a directory."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(source, **DATA_ONLY))

    @property
    def fingerprint(self) -> str:
        """All that `encode` depends on, for caches."""
        return self.tokenizer.backend_tokenizer.to_str()

    @property
    def suppressed_ids(self) -> list[int]:
        """No ids: a sub-word tokenizer has no unknown word, and its padding may be its end token."""
        return []

    def save(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)

    def encode(self, caption: str) -> list[int]:
        """Turn a caption into ids, without the end token."""
        text = detokenize(metric_words(caption))
        # With a space before it the first word gets the same id as in the middle of a sentence.
        return self.tokenizer(" " + text, add_special_tokens=False)["input_ids"]

    def words(self, ids: Iterable[int]) -> list[str]:
        """Return the caption's words as the metrics have them."""
        return metric_words(self.decode(ids))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return one string per id."""
        return [self.tokenizer.decode([i]).strip() for i in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into a sentence."""
        return " ".join(self.tokenizer.decode(list(ids)).split())


Vocabulary = WordVocabulary | PretrainedVocabulary
