"""AdamW, with Muon for the matrices inside a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Factors of x, x^3 and x^5 that draw singular values in (0, 1] to about 1 within five iterations."""
ADAMW_RMS = 0.2


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but Muon for the parameter groups with `muon=True`.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps along the semi-orthogonal
    matrix nearest to the momentum, so that the weak directions of a gradient count as much as its strong
    ones. A step has the root mean square of one of AdamW (Liu et al. 2025, arXiv:2502.16982), so that both
    share learning rate and weight decay. The kernel of a convolution is a matrix, each output channel a row.

    `torch.optim.Muon` iterates in bfloat16, which most CPUs emulate slowly, and takes no convolutions.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for matrix in group["params"] if group.get("muon") else ():
                if matrix.grad is not None:
                    self._step_matrix(group, matrix, matrix.grad)
                    matrix.grad = None  # AdamW passes over it
        return super().step(closure)

    def _step_matrix(self, group: dict[str, Any], matrix: Tensor, gradient: Tensor) -> None:
        state = self.state[matrix]
        if not state:  # named as AdamW names its own, whose state is loaded by the same code
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(matrix)
        momentum = state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
        ahead = whole(gradient.lerp(momentum, MOMENTUM)).flatten(1)
        rate = group["lr"] * ADAMW_RMS * max(ahead.shape) ** 0.5
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        step = orthogonalised(ahead).view(matrix.shape)
        matrix.sub_(sharded_like(step, matrix), alpha=rate)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 has cut into a part for each process; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `whole`: this process's part of `tensor`, where `like` has parts."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    replicated = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=like.placements)


def orthogonalised(matrix: Tensor) -> Tensor:
    """The semi-orthogonal matrix nearest to `matrix` (n, m), roughly: singular values of 0.7 to 1.2.

    Newton-Schulz iterates x <- (a + b g + c g^2) x with g = x x^T. The factors are polynomials of the first
    g, so they commute: they are multiplied at the size of the shorter side, and x by their product once.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.float()
    x = x.mT if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp_min(1e-7)
    gram = x @ x.mT
    product = torch.eye(len(gram), device=gram.device)
    for _ in range(5):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)
