"""The noise of a draw, keyed by (seed, position): what makes an image a function of its own seed alone.

Changing a line here changes every picture that a recipe promises; a test pins the values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tavq.base.seeding import mixed_seed


def gumbel_noise(seed: int, position: int, num_codes: int) -> Tensor:
    """(num_codes,) float32 Gumbel noise of one token, drawn on the CPU.

    argmax(logits + noise) is a draw from softmax(logits). Uniforms are float64, so that the tail is not cut.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, position))
    uniform = torch.rand(num_codes, dtype=torch.float64, generator=generator)
    return uniform.log_().neg_().log_().neg_().float()


def gumbel_rows(seeds: Sequence[int], positions: Sequence[int], num_codes: int) -> Tensor:
    """(len(seeds), len(positions), num_codes) noise of some positions of some images."""
    return torch.stack([torch.stack([gumbel_noise(s, p, num_codes) for p in positions]) for s in seeds])
