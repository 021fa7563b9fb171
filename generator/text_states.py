"""Token states of many captions, computed once and kept packed on disk.

Legend: n texts, T text slots, E text width.
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

PART = 1024  # texts encoded at a time


@dataclasses.dataclass(frozen=True)
class PackedStates:
    """States of the tokens of n texts, one after the other, without padding.

    Attributes:
        states: (total tokens, E) float16.
        starts: (n + 1,) int64; text i has the tokens `starts[i]` to `starts[i + 1]`.
        max_tokens: T.
    """

    states: Tensor
    starts: Tensor
    max_tokens: int

    def rows(self, texts: Sequence[int]) -> TokenStates:
        """The states of some texts, padded to T slots, in float32."""
        states = torch.zeros(len(texts), self.max_tokens, self.states.shape[1])
        mask = torch.zeros(len(texts), self.max_tokens, dtype=torch.bool)
        for row, text in enumerate(texts):
            first, end = self.starts[text], self.starts[text + 1]
            states[row, : end - first] = self.states[first:end]
            mask[row, : end - first] = True
        return TokenStates(states, mask)


def pack_states(
    encoder: TextEncoder, texts: Sequence[str], max_tokens: int, directory: Path | None = None
) -> PackedStates:
    """Token states of `texts`, from the cache where the same encoder has read the same texts before.

    Args:
        encoder: the frozen text encoder.
        texts: n texts; one longer than `max_tokens` is cut, with the encoder's warning.
        max_tokens: T.
        directory: of the cache; the default one when None. A file takes about 10 KB a caption.
    """
    digest = hashlib.sha256(f"{encoder.hash} {max_tokens}\n".encode())
    digest.update("\n".join(texts).encode())
    stored = cached_tensors(
        directory or cache_directory("token_states"),
        digest.hexdigest()[:16],
        lambda: _encode(encoder, texts, max_tokens),
    )
    return PackedStates(stored["states"], stored["starts"], max_tokens)


def _encode(encoder: TextEncoder, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
    parts, counts = [], [0]
    with tqdm(total=len(texts), desc="encoding captions", unit="text", disable=None) as bar:
        for start in range(0, len(texts), PART):
            batch = encoder.token_states(texts[start : start + PART], max_tokens)
            parts.append(batch.states[batch.mask].half())
            counts += batch.mask.sum(1).tolist()
            bar.update(len(batch.mask))
    return {"states": torch.cat(parts), "starts": torch.tensor(counts).cumsum(0)}
