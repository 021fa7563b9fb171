"""Linear layers laid out for decoding a fixed number of rows.

Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Precision

Linear = Callable[[Tensor], Tensor]
"""(R, I) -> (R, O)."""
INT8_MAX = 127.0


def prepared_linear(weight_OI: Tensor, rows: int, precision: Precision, *, compiled: bool = False) -> Linear:
    """Return the function x -> x @ weight.T in the layout that is fastest for `rows` rows.

    Microseconds on one AVX2 core, 768 -> 4096:

        rows          1     2     8    16
        F.linear    966  2001  1685  2220
        transposed  586  1053  1870  2390
        packed      760   995   882  1246
        int8        340   461   596   746

    Rejected: int8 weights with bfloat16 inputs (442, 517, 966, 1693); torch.ao's dynamic int8, whose one
    scale for all rows would let the images of a batch change one another.

    Args:
        weight_OI: (O, I) float32.
        rows: inputs of a call (R).
        precision: of the weights; int8 also rounds the inputs.
        compiled: take F.linear, which torch.compile can see into, unless the precision is int8.

    Raises:
        ValueError: int8 on another device than the CPU.
    """
    if precision == "int8":
        return _int8_linear(weight_OI)

    on_cpu = weight_OI.device.type == "cpu"
    if compiled or not on_cpu or precision == "bfloat16" or not torch.backends.mkldnn.is_available():
        weight = weight_OI.to(getattr(torch, precision))
        return lambda x: F.linear(x, weight)
    if rows == 1:
        transposed = weight_OI.t().contiguous()
        return lambda x: x @ transposed
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _int8_linear(weight_OI: Tensor) -> Linear:
    """Quantise weights with one scale per output, and inputs with one per row; the sums are exact."""
    if weight_OI.device.type != "cpu":
        raise ValueError(
            f"precision is 'int8' on {weight_OI.device.type}, which is for the CPU; choose 'bfloat16'"
        )
    weight_scale_O = weight_OI.abs().amax(1).clamp_min(1e-12) / INT8_MAX
    weight_IO = (weight_OI / weight_scale_O[:, None]).round().to(torch.int8).t()

    def linear(x_RI: Tensor) -> Tensor:
        # The infinity norm is abs().amax() in one operation.
        largest = torch.linalg.vector_norm(x_RI, ord=torch.inf, dim=-1, keepdim=True)
        scale_R1 = largest.clamp_min_(1e-12) / INT8_MAX
        quantised_RI = (x_RI / scale_R1).round_().to(torch.int8)
        return torch._int_mm(quantised_RI, weight_IO) * scale_R1 * weight_scale_O

    return linear
