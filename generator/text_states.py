"""Token states of many captions: computed once and kept on disk without padding, or anew in each batch.

From the disk they are read as they are needed, so that memory does not grow with their number. To encode the
captions of each batch anew would take longer than a training step of the small generator, but no disk.

Shapes: n texts, T text tokens, M text width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from tqdm import tqdm

from tavq.base.arrays import Ragged, build_once, open_ragged, write_ragged
from tavq.base.cache import cache_directory
from tavq.data.text_encoder import TextEncoder, TokenStates

TEXTS_AT_ONCE = 1024  # texts that the encoder is given together


class TextStates(Protocol):
    """States of the tokens of n texts."""

    def rows(self, texts: Sequence[int]) -> TokenStates:
        """Return the states of some texts, padded to T slots, in float32."""


def open_states(
    encoder: TextEncoder, texts: Sequence[str], max_tokens: int, cache: Literal["disk", "none"]
) -> TextStates:
    """Return the states of `texts`, kept on disk or encoded when they are asked for.

    Args:
        encoder: the frozen text encoder.
        texts: n texts; one longer than `max_tokens` is truncated, with the encoder's warning.
        max_tokens: T.
        cache: "none" keeps nothing.
    """
    return (
        pack_states(encoder, texts, max_tokens)
        if cache == "disk"
        else BatchStates(encoder, texts, max_tokens)
    )


class BatchStates:
    """Encodes texts when they are asked for; arguments as those of `open_states`."""

    def __init__(self, encoder: TextEncoder, texts: Sequence[str], max_tokens: int):
        self.encoder = encoder
        self.texts = texts
        self.max_tokens = max_tokens
        self._has_warned = False

    def rows(self, texts: Sequence[int]) -> TokenStates:
        """Return the states of some texts, padded to T slots, rounded to float16 as those on disk are."""
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            found = self.encoder.token_states([self.texts[text] for text in texts], self.max_tokens)
        if heard and not self._has_warned:  # once, not in each batch
            self._has_warned = True
            warnings.warn(heard[0].message, stacklevel=2)
        return TokenStates(found.states.half().float(), found.mask.clone())


@dataclasses.dataclass(frozen=True)
class PackedStates:
    """States of the tokens of n texts, without padding, in a file.

    Attributes:
        states: the states of each text, (tokens, M) float16.
        max_tokens: T.
    """

    states: Ragged
    max_tokens: int

    def rows(self, texts: Sequence[int]) -> TokenStates:
        """Return the states of some texts, padded to T slots, in float32."""
        states_BTM = torch.zeros(len(texts), self.max_tokens, self.states.values.shape[1])
        mask_BT = torch.zeros(len(texts), self.max_tokens, dtype=torch.bool)
        for row, text in enumerate(texts):
            states_TM = torch.from_numpy(self.states[text])
            states_BTM[row, : len(states_TM)] = states_TM
            mask_BT[row, : len(states_TM)] = True
        return TokenStates(states_BTM, mask_BT)


def pack_states(
    encoder: TextEncoder, texts: Sequence[str], max_tokens: int, directory: Path | None = None
) -> PackedStates:
    """Encode `texts`, or open their states in the cache.

    Args:
        encoder: the frozen text encoder.
        texts: n texts; one longer than `max_tokens` is truncated, with the encoder's warning.
        max_tokens: T.
        directory: of the cache; None takes `cache_directory("token_states")`. A text takes about 10 KB.
    """
    # All that the states depend on, so that nothing outdated is ever read.
    digest = hashlib.sha256(f"{encoder.hash} {max_tokens}\n".encode())
    for number, text in enumerate(texts):
        digest.update(f"\n{text}".encode() if number else text.encode())
    folder = directory or cache_directory("token_states")
    path = build_once(
        folder / f"{digest.hexdigest()[:16]}.safetensors",
        lambda path: write_ragged(path, "states", _encode(encoder, texts, max_tokens)),
    )
    return PackedStates(open_ragged(path, "states"), max_tokens)


def _encode(
    encoder: TextEncoder, texts: Sequence[str], max_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the states of some texts and their numbers of tokens."""
    rest = iter(texts)
    with tqdm(total=len(texts), desc="encoding captions", unit="text", disable=None) as bar:
        while group := list(itertools.islice(rest, TEXTS_AT_ONCE)):
            batch = encoder.token_states(group, max_tokens)
            yield batch.states[batch.mask].half().numpy(), batch.mask.sum(1).numpy()
            bar.update(len(group))
