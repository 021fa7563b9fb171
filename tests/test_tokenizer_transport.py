"""Transport: against POT, against closed forms, and in its limits."""

import math

import ot
import pytest
import torch

from tavq.alignment.transport import (
    gaussian_cost,
    gaussian_unit_cost,
    single_unit_cost,
    sinkhorn_plan,
    transport_cost,
)


def problem(seed: int = 0, codes: int = 7, units: int = 5) -> torch.Tensor:
    return torch.rand(codes, units, generator=torch.Generator().manual_seed(seed)) * 2


def marginals(cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((cost.shape[0],), 1 / cost.shape[0]), torch.full((cost.shape[1],), 1 / cost.shape[1])


def test_balanced_plan_agrees_with_pot():
    """POT: ot.sinkhorn(a, b, M, reg, method='sinkhorn_log')."""
    cost = problem()
    a, b = marginals(cost)
    expected = ot.sinkhorn(a, b, cost, reg=0.2, method="sinkhorn_log", numItermax=5000, stopThr=1e-12)
    mask = torch.ones(cost.shape[1], dtype=torch.bool)
    plan = sinkhorn_plan(cost, mask, epsilon=0.2, relaxation=math.inf, iterations=500)
    assert torch.allclose(plan, expected, atol=1e-4)
    value = transport_cost(cost, mask, epsilon=0.2, relaxation=math.inf, iterations=500)
    assert float(value) == pytest.approx(float((expected * cost).sum()), abs=1e-4)


@pytest.mark.parametrize(("relaxation", "epsilon"), [(0.05, 0.1), (0.5, 0.1), (5.0, 0.1), (0.5, 0.005)])
def test_semi_relaxed_plan_agrees_with_pot(relaxation, epsilon):
    """POT: ot.unbalanced.sinkhorn_unbalanced(a, b, M, reg, reg_m=(relaxation, inf), reg_type='kl')."""
    cost = problem(1).double()
    a, b = (m.double() for m in marginals(cost))
    expected = ot.unbalanced.sinkhorn_unbalanced(
        a,
        b,
        cost,
        reg=epsilon,
        reg_m=(relaxation, float("inf")),
        reg_type="kl",
        method="sinkhorn",
        numItermax=20000,
        stopThr=1e-12,
    )
    mask = torch.ones(cost.shape[1], dtype=torch.bool)
    plan = sinkhorn_plan(cost, mask, epsilon=epsilon, relaxation=relaxation, iterations=5000)
    assert torch.allclose(plan.double(), expected, atol=1e-4)
    value = transport_cost(cost, mask, epsilon=epsilon, relaxation=relaxation, iterations=5000)
    assert float(value) == pytest.approx(float((expected * cost).sum()), abs=1e-4)


def test_text_marginal_is_exact_after_any_number_of_iterations():
    mask = torch.tensor([True, True, True, False, False])
    plan = sinkhorn_plan(problem(2), mask, epsilon=0.05, relaxation=0.1, iterations=1)
    assert torch.allclose(plan.sum(0), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, 0]), atol=1e-5)


def test_masked_units_change_nothing():
    cost, settings = problem(3), {"epsilon": 0.1, "relaxation": 0.5, "iterations": 20}
    wide = torch.cat([cost, torch.full((7, 3), 9.0)], dim=1)
    mask = torch.tensor([True] * 5 + [False] * 3)
    alone = transport_cost(cost, mask[:5], **settings)
    assert float(transport_cost(wide, mask, **settings)) == pytest.approx(float(alone), rel=1e-5)


def test_batched_problems_equal_single_ones():
    costs = torch.stack([problem(seed) for seed in range(6)]).view(2, 3, 7, 5)
    masks = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    masks[:, 0] = True
    settings = {"epsilon": 0.1, "relaxation": 0.5, "iterations": 10}
    batched = transport_cost(costs, masks.unsqueeze(0), **settings)
    for i in range(2):
        for j in range(3):
            single = transport_cost(costs[i, j], masks[j], **settings)
            assert float(batched[i, j]) == pytest.approx(float(single), rel=1e-5)


def test_one_unit_in_closed_form_equals_sinkhorn():
    cost, mask = problem(4, units=1), torch.tensor([True])
    iterated = transport_cost(cost, mask, epsilon=0.2, relaxation=0.7, iterations=500)
    assert float(single_unit_cost(cost, epsilon=0.2, relaxation=0.7)) == pytest.approx(
        float(iterated), abs=1e-4
    )


def test_gaussian_cost_equals_the_formula():
    generator = torch.Generator().manual_seed(0)
    codes, units = torch.randn(2, 6, 4, generator=generator), torch.randn(3, 5, 4, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
    got = gaussian_cost(codes, units, mask)
    for i in range(2):
        for j in range(3):
            z, t = codes[i], units[j][mask[j]]
            expected = (z.mean(0) - t.mean(0)).square().sum()
            expected += (z.std(0, correction=0) - t.std(0, correction=0)).square().sum()
            assert float(got[i, j]) == pytest.approx(float(expected), rel=1e-4)


def test_gaussian_cost_has_a_finite_gradient_where_all_codes_agree():
    codes = torch.ones(1, 4, 3, requires_grad=True)
    gaussian_cost(codes, torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)).sum().backward()
    assert torch.isfinite(codes.grad).all()


def test_the_gaussian_cost_of_one_unit_is_that_of_a_text_of_one_unit():
    generator = torch.Generator().manual_seed(0)
    codes, units = (
        torch.nn.functional.normalize(torch.randn(3, n, 6, generator=generator), dim=-1) for n in (8, 4)
    )
    found = gaussian_unit_cost(codes, units)
    for place in range(4):
        single = gaussian_cost(codes, units[:, [place]], torch.ones(3, 1, dtype=torch.bool))
        assert torch.allclose(found[:, place], single.diagonal(), atol=1e-5)
    assert torch.allclose(
        gaussian_unit_cost(codes, units[0]),
        found[:, :0].new_tensor(
            [[float(2 - 2 * codes[b].mean(0) @ units[0, u]) for u in range(4)] for b in range(3)]
        ),
        atol=1e-5,
    )


def test_the_gradient_of_a_cost_is_the_plan_which_is_held_constant():
    """The envelope theorem: a plan that moved with the cost would add terms of its own."""
    options = {"epsilon": 0.1, "relaxation": 0.5}
    cost = torch.rand(3, 6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[True, True, True, False]]).expand(3, -1)
    transport_cost(cost, mask, iterations=5, **options).sum().backward()
    plan = sinkhorn_plan(cost.detach(), mask, iterations=5, **options)
    assert torch.allclose(cost.grad, plan, atol=1e-7)

    single = cost.detach().clone().requires_grad_()
    single_unit_cost(single, **options).sum().backward()
    assert torch.allclose(single.grad, torch.softmax(-single.detach() / 0.6, dim=1), atol=1e-7)
