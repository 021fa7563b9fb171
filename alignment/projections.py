"""From codes to the text encoder's space: the g_l of docs/method.md.

Shapes: K codes, E code width, D text width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_LEVELS = 3


class TextProjections(nn.Module):
    """The g_l: codes -> the text encoder's space, one a level.

    g_l(k) = W_l (GELU(V_l c_k) + m_k). The first term is a smooth function of the code c_k, so that what one
    code learns its neighbours learn; the mark m_k, shared by the levels, is what code k means beside that.
    Codes are short (E = 16): read by the first term alone, the same ids find fewer of their texts
    (docs/experiments.md).

    Args:
        num_codes: K.
        code_dim: E.
        hidden: width of V_l c_k and m_k.
        text_dim: D.
    """

    def __init__(self, num_codes: int, code_dim: int, hidden: int, text_dim: int):
        super().__init__()
        self.marks = nn.Parameter(torch.zeros(num_codes, hidden))
        self.enter = nn.ModuleList(nn.Linear(code_dim, hidden) for _ in range(NUM_LEVELS))
        self.leave = nn.ModuleList(nn.Linear(hidden, text_dim) for _ in range(NUM_LEVELS))

    def forward(self, codes: Tensor, marks: Tensor, level: int) -> Tensor:
        """Codes (..., E) of any length, their marks (..., hidden), level 1, 2 or 3 -> (..., D)."""
        codes = (
            F.normalize(codes, dim=-1) * codes.shape[-1] ** 0.5
        )  # else V_l c_k is too small for GELU to bend
        return self.leave[level - 1](F.gelu(self.enter[level - 1](codes)) + marks)
