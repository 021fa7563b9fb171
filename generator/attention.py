"""Scaled dot-product attention, by torch or, on CUDA, by xformers.

Shapes: B rows, L queries, P keys, G heads, d head width.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .config import Attention

UNSUPPORTED: set[str] = set()
"""Types of devices for which xformers turned out to have no kernel."""
BIAS_ALIGNMENT = 8  # xformers wants each row of a bias to start at a multiple of 8 numbers


def choice(device_type: str, half_precision: bool, backend: Attention) -> str:
    """Name what `attend` takes, for logs: xformers or torch's own attention."""
    by_xformers = backend == "xformers" or (
        backend == "auto" and device_type == "cuda" and half_precision and xformers_ops() is not None
    )
    return "xformers" if by_xformers else "torch (scaled_dot_product_attention)"


def attend(q_BLGd: Tensor, k_BPGd: Tensor, v_BPGd: Tensor, bias_BLP: Tensor, backend: Attention) -> Tensor:
    """Attend with an additive bias that all heads share.

    Args:
        q_BLGd, k_BPGd, v_BPGd: queries, keys and values; views of a larger cache are fine.
        bias_BLP: 0 where a key may be seen, -inf where not; L may be 1 for all queries.
        backend: `auto` takes xformers for half precision on CUDA where it is installed.

    Returns:
        (B, L, G, d).

    Raises:
        ValueError: xformers was asked for by name where it cannot run.
    """
    if use_xformers(q_BLGd, backend):
        bias = _aligned_bias(bias_BLP, q_BLGd)
        try:
            return xformers_ops().memory_efficient_attention(q_BLGd, k_BPGd, v_BPGd, attn_bias=bias)
        except NotImplementedError as error:  # no kernel for this hardware
            reason = str(error).splitlines()[0]
            if backend == "xformers":
                raise ValueError(f"xformers cannot run here ({reason}); choose 'auto' or 'sdpa'") from error
            warnings.warn(f"xformers cannot run here ({reason}): attention is torch's", stacklevel=2)
            UNSUPPORTED.add(q_BLGd.device.type)
    q, k, v = (part.transpose(1, 2) for part in (q_BLGd, k_BPGd, v_BPGd))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BLP.unsqueeze(1)).transpose(1, 2)


def use_xformers(q: Tensor, backend: Attention) -> bool:
    """Decide for or against xformers; raise ValueError where it is asked for by name and cannot run."""
    if backend == "sdpa":
        return False
    if backend == "auto":
        fits = q.is_cuda and q.element_size() == 2 and q.device.type not in UNSUPPORTED
        return fits and xformers_ops() is not None
    if xformers_ops() is None:
        raise ValueError("attention is 'xformers', which is not installed; choose 'auto' or 'sdpa'")
    if not q.is_cuda:
        raise ValueError(
            f"attention is 'xformers', which has no kernels for {q.device.type}; choose 'auto' or 'sdpa'"
        )
    return True


@functools.cache
def xformers_ops() -> Any:
    """Return `xformers.ops`, or None where xformers is not installed."""
    if importlib.util.find_spec("xformers") is None:
        return None
    import xformers.ops

    return xformers.ops


def _aligned_bias(bias_BLP: Tensor, q_BLGd: Tensor) -> Tensor:
    """Return the bias as (B, G, L, P) of the queries' type, each row starting at a multiple of BIAS_ALIGNMENT
    numbers."""
    num_keys = bias_BLP.shape[-1]
    rows, length, num_heads, _ = q_BLGd.shape
    # Padded and cut again: the numbers between the rows stay in memory.
    padded = F.pad(bias_BLP.to(q_BLGd.dtype), (0, -num_keys % BIAS_ALIGNMENT))[..., :num_keys]
    return padded.unsqueeze(1).expand(rows, num_heads, length, num_keys)
