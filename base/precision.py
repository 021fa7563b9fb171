"""Full precision inside autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(like: Tensor) -> torch.autocast:
    """A context without mixed precision: distances in bfloat16 give other ids (1.6 %, K = 1,024, E = 16)."""
    return torch.autocast(like.device.type, enabled=False)
