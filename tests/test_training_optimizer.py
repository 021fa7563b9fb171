"""Muon beside AdamW: what a step is, and who takes it."""

import pytest
import torch
from torch import nn

from tavq.training.config import TrainingConfig
from tavq.training.optimizer import MuonAdamW, orthogonalised
from tavq.training.task import Task


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix)
    inside = left.T @ found @ right.T
    assert 0.6 < inside.diagonal().min() and inside.diagonal().max() < 1.3
    assert inside.sub(inside.diagonal().diag()).abs().max() < 1e-4
    assert torch.allclose(orthogonalised(1e4 * matrix), found, atol=1e-4)  # its length is nothing


def test_directions_that_a_gradient_lacks_are_not_made_of_rounding_errors():
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(48, 3, generator=generator) @ torch.randn(3, 200, generator=generator)
    values = torch.linalg.svdvals(orthogonalised(thin))
    assert values[2] > 0.6 and values[3] < 1e-2
    assert not orthogonalised(torch.zeros(4, 8)).any()


def test_a_first_step_has_the_size_of_one_of_adamw():
    weight = nn.Parameter(torch.zeros(96, 64))
    optimizer = MuonAdamW([{"params": [weight], "muon": True}], lr=0.5, weight_decay=0.0)
    weight.grad = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    rms = weight.detach().square().mean().sqrt()
    assert 0.15 * 0.5 < rms < 0.25 * 0.5  # 0.2 of the rate, as Liu et al. found AdamW's steps to be
    assert weight.grad is None


def test_only_marked_groups_take_muons_step():
    def trained(optimizer_class, **marks):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(32, 8))
        groups = [{"params": [model[0].weight], **marks}, {"params": [model[0].bias, *model[2].parameters()]}]
        optimizer = optimizer_class(groups, lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            model(torch.ones(1, 2, 4, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    plain, same = trained(torch.optim.AdamW), trained(MuonAdamW)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))
    assert not torch.equal(trained(MuonAdamW, muon=True)[0].weight, plain[0].weight)


def test_its_state_is_saved_and_loaded():
    def steps(optimizer, weights, first, last):
        for step in range(first, last):
            for weight in weights:
                weight.grad = torch.full_like(weight, 1.0 + step) + torch.eye(4)
            optimizer.step()

    def fresh():
        weights = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))]
        return weights, MuonAdamW([{"params": weights[:1], "muon": True}, {"params": weights[1:]}], lr=0.1)

    whole, optimizer = fresh()
    steps(optimizer, whole, 0, 6)
    weights, first = fresh()
    steps(first, weights, 0, 3)
    again, second = fresh()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for weight, found in zip(again, weights, strict=True):
            weight.copy_(found)
    steps(second, again, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


class Blocks(Task):
    name = "generator"
    muon_modules = frozenset({"blocks"})

    def __init__(self):
        self.model = nn.ModuleDict(
            {"enter": nn.Linear(3, 4), "blocks": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))}
        )

    def evaluate(self, model, step):
        raise AssertionError

    save = evaluate


def test_muon_gets_the_matrices_of_the_named_blocks_and_nothing_else():
    task = Blocks()
    marked, others, vectors = task.parameter_groups(TrainingConfig(optimizer="muon"))
    assert marked["muon"] and marked["params"] == [task.model["blocks"][0].weight]
    assert others["params"] == [task.model["enter"].weight] and "muon" not in others
    assert len(vectors["params"]) == 4 and vectors["weight_decay"] == 0
    assert not task.parameter_groups(TrainingConfig())[0]["muon"]
    task.muon_modules = frozenset()
    with pytest.raises(ValueError, match="the generator names no matrices for Muon"):
        task.parameter_groups(TrainingConfig(optimizer="muon"))
