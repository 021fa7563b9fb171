"""From codes to the text encoder's space: the g_l of docs/method.md.

Shapes: K codes, E code width, M text width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import NUM_LEVELS


class TextProjections(nn.Module):
    """The g_l: codes -> the text encoder's space, one projection a level.

    g_l(k) = W_l (GELU(V_l c_k) + m_k). The first term is a smooth function of the code c_k, so that what
    one code learns its neighbours learn. The per-code embedding m_k, shared by the levels, is what code k
    means besides. Codes are short (E = 16): without m_k the same ids find fewer of their texts
    (docs/experiments.md).

    Args:
        num_codes: K.
        code_dim: E.
        hidden_dim: width of V_l c_k and m_k.
        text_dim: M.
    """

    def __init__(self, num_codes: int, code_dim: int, hidden_dim: int, text_dim: int):
        super().__init__()
        self.per_code_embedding = nn.Parameter(torch.zeros(num_codes, hidden_dim))
        self.proj_in = nn.ModuleList(nn.Linear(code_dim, hidden_dim) for _ in range(NUM_LEVELS))
        self.proj_out = nn.ModuleList(nn.Linear(hidden_dim, text_dim) for _ in range(NUM_LEVELS))

    def forward(self, codes: Tensor, embeddings: Tensor, level: int) -> Tensor:
        """Project codes to text space; the result is not normalised.

        Args:
            codes: (..., E), of any length.
            embeddings: (..., hidden_dim), their rows of `per_code_embedding`.
            level: 1, 2 or 3.

        Returns:
            (..., M).
        """
        # Codes of unit length would leave GELU in its linear part.
        codes = F.normalize(codes, dim=-1) * codes.shape[-1] ** 0.5
        hidden = F.gelu(self.proj_in[level - 1](codes)) + embeddings
        return self.proj_out[level - 1](hidden)
