"""The cost of carrying a text onto an image: entropic optimal transport, and its Gaussian stand-in.

Shapes: S codes of an image, U text units, M text width, B batch; leading dimensions `...` are independent
    problems. Results are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sinkhorn_plan(
    cost: Tensor, unit_mask: Tensor, *, epsilon: float, relaxation: float, iterations: int
) -> Tensor:
    """Semi-relaxed entropic transport plan: every text unit is placed, image positions may stay empty.

    Minimises <P, C> + epsilon KL(P | a b') + relaxation KL(P 1 | a) over plans whose text marginal P' 1 is
    exactly b, with a uniform over the S codes and b uniform over the valid units. Scaling iterations after
    Chizat et al. 2018, arXiv:1607.05816, alg. 1, on costs above each unit's least, in float64 where float32
    could underflow; with `relaxation` infinite it is the balanced problem of Cuturi 2013, arXiv:1306.0895.

    Args:
        cost: (..., S, U), any finite values.
        unit_mask: (..., U) bool, broadcast against cost; True where a unit exists, at least one a problem.
        epsilon: entropic regularisation, in units of the cost; what costs 600 epsilon more than a unit's
            least (80 on Apple's MPS) counts as that.
        relaxation: weight of the image marginal's penalty, in units of the cost; `math.inf` makes it exact.
        iterations: pairs of updates; the text marginal is exact after each.

    Returns:
        P (..., S, U), columns sum to exactly 1/U, rows to 1/S as far as `relaxation` asks for it; detached
        from the graph.
    """
    with torch.no_grad():
        exponent = (cost.amin(dim=-2, keepdim=True) - cost).float() / epsilon
        if exponent.amin() < -40 and exponent.device.type != "mps":  # which has no float64
            exponent = exponent.double()
        exponent = exponent.clamp(min=-600 if exponent.dtype == torch.float64 else -80)
        damping = 1.0 if relaxation == float("inf") else relaxation / (relaxation + epsilon)
        b = (unit_mask / unit_mask.sum(dim=-1, keepdim=True)).unsqueeze(-2).to(exponent.dtype)
        kernel = torch.exp(exponent)
        kernel_b = kernel * b
        u = torch.full_like(kernel[..., :1], 1 / kernel.shape[-2])  # a times the scaling of the codes
        for _ in range(iterations):
            v = 1 / (u.transpose(-2, -1) @ kernel)
            u = (kernel_b @ v.transpose(-2, -1)).pow(-damping) / kernel.shape[-2]
        v = 1 / (u.transpose(-2, -1) @ kernel)
        return (kernel * u * (v * b)).float()


def transport_cost(cost: Tensor, unit_mask: Tensor, **sinkhorn: Any) -> Tensor:
    """<P, C> with the plan of `sinkhorn_plan` held constant: (..., S, U) -> (...), the mean cost of a unit.

    By the envelope theorem the detached plan gives the gradient of the regularised problem.
    """
    return (sinkhorn_plan(cost, unit_mask, **sinkhorn) * cost).sum(dim=(-2, -1))


def single_unit_cost(cost: Tensor, *, epsilon: float, relaxation: float) -> Tensor:
    """Transport cost of each text unit by itself, in closed form: (..., S, U) -> (..., U).

    With one unit the problem of `sinkhorn_plan` has the plan a_i exp(-C_i / (epsilon + relaxation)),
    normalised.
    """
    plan = torch.softmax(cost.detach() / -(epsilon + relaxation), dim=-2)
    return (plan * cost).sum(dim=-2)


def gaussian_cost(codes: Tensor, units: Tensor, unit_mask: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance between diagonal Gaussians fitted to each image's codes and each text's
    units.

    W2^2 = |mu_Z - mu_T|^2 + |sigma_Z - sigma_T|^2 (Dowson and Landau 1982), for all pairs: no plan, no
    iteration.

    Args:
        codes: (B, S, M).
        units: (B', U, M).
        unit_mask: (B', U) bool, at least one True a row.

    Returns:
        (B, B'), at least 0.
    """
    weight = unit_mask.float().unsqueeze(-1)
    count = weight.sum(dim=1)
    mean_units = (units * weight).sum(dim=1) / count
    variance_units = ((units - mean_units.unsqueeze(1)).square() * weight).sum(dim=1) / count
    mean_codes, variance_codes = codes.mean(dim=1), codes.var(dim=1, correction=0)
    # 1e-12 keeps the square root differentiable where all codes agree
    moments_codes = torch.cat([mean_codes, (variance_codes + 1e-12).sqrt()], dim=-1)
    moments_units = torch.cat([mean_units, (variance_units + 1e-12).sqrt()], dim=-1)
    return torch.cdist(moments_codes, moments_units, compute_mode="donot_use_mm_for_euclid_dist").square()


def gaussian_unit_cost(codes: Tensor, units: Tensor) -> Tensor:
    """`gaussian_cost` of each unit by itself, a Gaussian without extent: codes (B, S, M), units (B, U, M) or
    (U, M), all of unit length -> (B, U).

    |mu_Z - t|^2 + |sigma_Z|^2 is 2 - 2 mu_Z . t there, as |mu_Z|^2 + |sigma_Z|^2 = 1.
    """
    return (2 - 2 * codes.mean(dim=1, keepdim=True) @ units.transpose(-2, -1)).squeeze(1)
