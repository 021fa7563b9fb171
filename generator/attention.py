"""Scaled dot-product attention, by torch or, on CUDA, by xformers.

Legend: B rows, L queries, S keys, h heads, d head width.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Attention = Literal["auto", "sdpa", "xformers"]
ALIGNMENT = 8  # xformers reads a bias whose rows start at multiples of 8 numbers


@functools.cache
def xformers_ops() -> ModuleType | None:
    """`xformers.ops`, or None where xformers is not installed."""
    if importlib.util.find_spec("xformers") is None:
        return None
    import xformers.ops

    return xformers.ops


def attend(q_BLhd: Tensor, k_BShd: Tensor, v_BShd: Tensor, bias_BLS: Tensor, backend: Attention) -> Tensor:
    """Attend with an additive bias that all heads share.

    Args:
        q_BLhd, k_BShd, v_BShd: queries, keys and values; views of a larger cache are fine.
        bias_BLS: 0 where a key may be seen, -inf where not; L may be 1 for all queries.
        backend: `auto` takes xformers for half precision on CUDA where it is installed.

    Returns:
        (B, L, h, d).

    Raises:
        ValueError: xformers was asked for by name where it cannot run.
    """
    if use_xformers(q_BLhd, backend):
        return xformers_ops().memory_efficient_attention(
            q_BLhd, k_BShd, v_BShd, attn_bias=_aligned(bias_BLS, q_BLhd)
        )
    q, k, v = (part.transpose(1, 2) for part in (q_BLhd, k_BShd, v_BShd))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BLS.unsqueeze(1)).transpose(1, 2)


def use_xformers(q: Tensor, backend: Attention) -> bool:
    """Decide for xformers; asked for by name, it must be able to run."""
    if backend == "sdpa":
        return False
    if backend == "auto":
        return q.is_cuda and q.element_size() == 2 and xformers_ops() is not None
    if not q.is_cuda or xformers_ops() is None:
        where = "is not installed" if xformers_ops() is None else f"has no kernels for {q.device.type}"
        raise ValueError(f"attention is 'xformers', which {where}; choose 'auto' or 'sdpa'")
    return True


def _aligned(bias_BLS: Tensor, q_BLhd: Tensor) -> Tensor:
    """The bias as (B, h, L, S), each row starting at a multiple of ALIGNMENT."""
    keys = bias_BLS.shape[-1]
    padded = F.pad(bias_BLS, (0, -keys % ALIGNMENT))[..., :keys]
    rows, length, heads, _ = q_BLhd.shape
    return padded.unsqueeze(1).expand(rows, heads, length, keys)
