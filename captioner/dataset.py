"""The captioner's training set: image tokens with padded captions, and the targets of the cross-entropy loss.

Shapes: B images, N image tokens, G captions of each image (a group), T words of a caption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from tavq.base.arrays import Ragged, build_once, open_ragged, write_ragged
from tavq.base.cache import cache_directory
from tavq.base.seeding import mixed_seed
from tavq.data.tokens import AllTexts, TokenSet

from .model import Captioner
from .vocabulary import Vocabulary

TEXTS_AT_ONCE = 1024  # written together
WORDS_VERSION = 1  # raised when `metric_words` splits a text in another way

AlignmentScores = Sequence[np.ndarray]
"""The alignment score of each caption with its image: one array per image, in the order of a token set."""


class CaptionDataset(Dataset):
    """Image tokens with G captions each, as padded word ids.

    `self[(index, draw_seed)]` samples a variant of the image's tokens, and G of its captions. If the
    captioner has the long style, half of the draws of an image with dense text hold that text instead.

    Args:
        tokens: the training split.
        captioner: gives the vocabulary, the start tokens and the maximum lengths.
        captions_per_image: G.
        buckets: the quality bucket of each caption of each image, as `quality_buckets` gives them.
    """

    def __init__(
        self,
        tokens: TokenSet,
        captioner: Captioner,
        captions_per_image: int,
        buckets: list[list[int]] | None = None,
    ):
        self.tokens = tokens
        self.captions_per_image = captions_per_image
        self.buckets = buckets
        text = captioner.text
        shape = captioner.config.shape
        self.max_words = max(shape.max_words, shape.long_words)
        self.pad_id = text.pad_id
        self.start_id = captioner.start_id()

        if shape.long_words:
            self.long_start_id = captioner.start_id("long")
        # The long text of an image, where it is read, is the last one of its texts.
        self.with_long_texts = dataclasses.replace(tokens, with_long_texts=bool(shape.long_words))
        self.words = pack_words(text, AllTexts(self.with_long_texts))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Tensor]:
        index, draw_seed = item
        rng = torch.Generator().manual_seed(mixed_seed(draw_seed, 1))
        variants = self.tokens.ids[index]
        variant = int(torch.randint(len(variants), (1,), generator=rng))

        # Images with fewer than G captions leave rows empty: length -1, which no target is made from.
        rows = self.captions_per_image
        example = {
            "ids": variants[variant].flatten().long(),
            "words": torch.full((rows, self.max_words), self.pad_id),
            "lengths": torch.full((rows,), -1),
            "starts": torch.full((rows,), self.start_id),
            "index": torch.tensor(index),
        }
        for row, (words, start) in enumerate(self._sample_texts(index, rng)):
            truncated = torch.tensor(words[: self.max_words])
            example["words"][row, : len(truncated)] = truncated
            # The full length, so that `caption_targets` sees that the end was cut off.
            example["lengths"][row] = len(words)
            example["starts"][row] = start
        return example

    def _sample_texts(self, index: int, rng: torch.Generator) -> list[tuple[list[int], int]]:
        """Sample the texts of one draw; return the word ids and the start token of each."""
        # Drawn even where there is no long text, so that the captions of a seed do not depend on it.
        use_long_text = bool(torch.randint(2, (1,), generator=rng))
        texts = self.with_long_texts.captions_of(index)
        num_captions = len(self.tokens.captions_of(index))
        if use_long_text and len(texts) > num_captions:
            long_words = self.words[texts[num_captions]].tolist()
            if long_words:
                return [(long_words, self.long_start_id)]

        sampled = torch.randperm(num_captions, generator=rng)[: self.captions_per_image].tolist()
        return [
            (self.words[texts[i]].tolist(), self.start_id if self.buckets is None else self.buckets[index][i])
            for i in sampled
        ]


def pack_words(vocabulary: Vocabulary, texts: Iterable[str]) -> Ragged:
    """Turn texts into word ids, once, in a file of the cache.

    To split the captions of each batch anew would take 0.1 ms for each of them.
    """
    digest = hashlib.sha256(f"{WORDS_VERSION} {vocabulary.fingerprint}\n".encode())
    for text in texts:
        digest.update(f"{text}\n".encode())
    path = build_once(
        cache_directory("caption_words") / f"{digest.hexdigest()[:24]}.safetensors",
        lambda path: write_ragged(path, "words", _word_ids(vocabulary, texts)),
    )
    return open_ragged(path, "words")


def _word_ids(vocabulary: Vocabulary, texts: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the word ids of some texts and their numbers of words."""
    rest = iter(texts)
    while group := [vocabulary.encode(text) for text in itertools.islice(rest, TEXTS_AT_ONCE)]:
        words = [word for text in group for word in text]
        yield np.array(words, np.int32), np.array([len(text) for text in group])


def caption_targets(words: Tensor, lengths: Tensor, end_id: int) -> Tensor:
    """Make the targets of the cross-entropy loss: what follows each position, -1 where nothing is learned.

    Args:
        words: (B, G, T) word ids, padded.
        lengths: (B, G) words of each caption; more than T where it was truncated, -1 for an empty row.
        end_id: the end token, which follows the last word of a caption that was not truncated.

    Returns:
        (B, G, T + 1) int64.
    """
    targets = F.pad(words, (0, 1), value=end_id)
    position = torch.arange(targets.shape[-1], device=words.device)
    targets = targets.masked_fill(position == lengths[..., None], end_id)

    # A truncated caption does not end behind its last word; to learn that it does would teach breaking off.
    truncated = lengths > words.shape[-1]
    no_end = truncated[..., None] & (position == words.shape[-1])
    return targets.masked_fill((position > lengths[..., None]) | no_end, -1)


def quality_buckets(alignment_scores: AlignmentScores, count: int) -> list[list[int]]:
    """Sort all captions into `count` equally full buckets by their alignment score; bucket 0 is the worst."""
    edges = np.quantile(np.concatenate(alignment_scores), np.arange(1, count) / count)
    return [np.searchsorted(edges, scores).tolist() for scores in alignment_scores]
