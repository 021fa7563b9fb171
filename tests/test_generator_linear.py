"""Layers laid out for decoding compute what a plain layer computes, each row by itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tavq.data.text_encoder import TokenStates
from tavq.generator.config import PRESETS, SamplingConfig
from tavq.generator.linear import prepared_linear
from tavq.generator.model import GeneratorConfig, GeneratorModel
from tavq.generator.sampling import sample


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 96, generator=generator), torch.randn(160, 96, generator=generator)


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-6), ("int8", 0.02), ("bfloat16", 0.01)])
def test_prepared_layers_agree_with_the_plain_one(rows, precision, tolerance):
    x, weight = inputs(rows)
    x = x.bfloat16() if precision == "bfloat16" else x
    expected = F.linear(x.double(), weight.double())
    error = (prepared_linear(weight, rows, precision)(x).double() - expected).norm() / expected.norm()
    assert error < tolerance


def test_int8_is_exact_where_weights_and_inputs_are_whole_steps():
    weight = torch.tensor([[127.0, -3.0], [10.0, 127.0]])
    assert prepared_linear(weight, 1, "int8")(torch.tensor([[127.0, 5.0]])).tolist() == [[16114.0, 1905.0]]


def test_int8_rows_do_not_depend_on_one_another():
    x, weight = inputs(4)
    layer = prepared_linear(weight, 4, "int8")
    louder = x.clone()
    louder[1:] *= 1000
    assert torch.equal(layer(x)[0], layer(louder)[0])


def test_int8_survives_a_row_of_zeros():
    assert torch.equal(prepared_linear(inputs(1)[1], 1, "int8")(torch.zeros(1, 96)), torch.zeros(1, 160))


def test_int8_beside_the_cpu_is_refused():
    with pytest.raises(
        ValueError, match="precision is 'int8' on meta, which is for the CPU; choose 'bfloat16'"
    ):
        prepared_linear(torch.zeros(4, 4, device="meta"), 1, "int8")


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_reduced_precision_keeps_the_contract_and_most_tokens(precision):
    torch.manual_seed(1)
    model = GeneratorModel(GeneratorConfig.of(PRESETS["tiny"], num_codes=64, grid_size=(4, 4))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    texts = TokenStates(torch.randn(6, 32, 384), torch.arange(32).expand(6, -1) < 9)
    settings = SamplingConfig(precision=precision)
    drawn = sample(model, texts, range(6), settings)
    alone = [sample(model, TokenStates(texts.states[[i]], texts.mask[[i]]), [i], settings) for i in range(6)]
    assert torch.equal(torch.cat(alone), drawn)
    full = sample(model, texts, range(6), dataclasses.replace(settings, precision="float32"))
    assert (drawn == full).float().mean() > 0.5
    assert not torch.equal(drawn, full)
