"""Token states of many captions, computed once and kept on disk without padding.

Shapes: n texts, T text tokens, M text width.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tavq.base.cache import cache_directory, cached_tensors
from tavq.data.text_encoder import TextEncoder, TokenStates

TEXTS_AT_ONCE = 1024  # texts that the encoder is given together


@dataclasses.dataclass(frozen=True)
class PackedStates:
    """States of the tokens of n texts, one text after the other, without padding.

    Attributes:
        states: (tokens of all texts, M) float16.
        starts: (n + 1,) int64; text i has the tokens `starts[i]` to `starts[i + 1]`.
        max_tokens: T.
    """

    states: Tensor
    starts: Tensor
    max_tokens: int

    def rows(self, texts: Sequence[int]) -> TokenStates:
        """Return the states of some texts, padded to T slots, in float32."""
        states_BTM = torch.zeros(len(texts), self.max_tokens, self.states.shape[1])
        mask_BT = torch.zeros(len(texts), self.max_tokens, dtype=torch.bool)
        for row, text in enumerate(texts):
            start, end = self.starts[text], self.starts[text + 1]
            states_BTM[row, : end - start] = self.states[start:end]
            mask_BT[row, : end - start] = True
        return TokenStates(states_BTM, mask_BT)


def pack_states(
    encoder: TextEncoder, texts: Sequence[str], max_tokens: int, directory: Path | None = None
) -> PackedStates:
    """Encode `texts`, or read their states from the cache.

    Args:
        encoder: the frozen text encoder.
        texts: n texts; one longer than `max_tokens` is truncated, with the encoder's warning.
        max_tokens: T.
        directory: of the cache; None takes `cache_directory("token_states")`. A text takes about 10 KB.
    """
    # All that the states depend on, so that nothing outdated is ever read.
    digest = hashlib.sha256(f"{encoder.hash} {max_tokens}\n".encode())
    digest.update("\n".join(texts).encode())
    stored = cached_tensors(
        directory or cache_directory("token_states"),
        digest.hexdigest()[:16],
        lambda: _encode(encoder, texts, max_tokens),
    )
    return PackedStates(stored["states"], stored["starts"], max_tokens)


def _encode(encoder: TextEncoder, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
    states, lengths = [], [0]
    with tqdm(total=len(texts), desc="encoding captions", unit="text", disable=None) as bar:
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            batch = encoder.token_states(texts[start : start + TEXTS_AT_ONCE], max_tokens)
            states.append(batch.states[batch.mask].half())
            lengths += batch.mask.sum(1).tolist()
            bar.update(len(batch.mask))
    return {"states": torch.cat(states), "starts": torch.tensor(lengths).cumsum(0)}
