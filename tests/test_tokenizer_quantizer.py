"""Every quantiser: ids in range, round trip, gradients, and what its paper promises."""

import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch import FSQ

from tavq.tokenizer.config import QuantizerConfig
from tavq.tokenizer.quantizer import QUANTIZERS, rotate_to


def make(name: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"num_codes": 60, "fsq_levels": (5, 4, 3)} if name == "fsq" else {"num_codes": 48}
    return QUANTIZERS[name](QuantizerConfig(name=name, code_dim=8, **size, **changes))


def latents_for(quantizer, count: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, quantizer.config.code_dim, generator=generator)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_ids_are_in_range_and_decode_round_trips(name):
    quantizer = make(name).eval()
    result = quantizer(latents_for(quantizer))
    assert result.ids.dtype == torch.int64
    assert 0 <= int(result.ids.min()) and int(result.ids.max()) < quantizer.config.num_codes
    assert torch.allclose(result.codes, quantizer.lookup(result.ids), atol=1e-6)
    every_id = torch.arange(quantizer.config.num_codes)
    codes = quantizer.lookup(every_id)
    inside = torch.atanh(codes.clamp(-0.999, 0.999)) if name == "fsq" else codes
    assert torch.equal(quantizer.nearest(inside), every_id)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_nearest_agrees_with_forward(name):
    quantizer = make(name).eval()
    latents = latents_for(quantizer)
    assert torch.equal(quantizer(latents).ids, quantizer.nearest(latents))


def test_straight_through_gradient_is_the_identity():
    quantizer = make("nearest").eval()
    latents = F.normalize(latents_for(quantizer), dim=1).requires_grad_()
    codes = quantizer.straight_through(latents, quantizer.lookup(quantizer.nearest(latents)))
    direction = torch.randn_like(codes)
    (codes * direction).sum().backward()
    assert torch.equal(latents.grad, direction)


def test_rotation_trick_keeps_the_value_and_the_angle_of_the_gradient():
    latents = torch.randn(5, 8, requires_grad=True)
    codes = torch.randn(5, 8)
    assert torch.allclose(rotate_to(latents, codes), codes, atol=1e-5)
    (rotate_to(latents, codes) * codes).sum().backward()  # along the code
    assert torch.allclose(F.cosine_similarity(latents.grad, latents.detach()), torch.ones(5), atol=1e-5)


def test_unused_codes_are_drawn_again_from_the_batch():
    quantizer = make("nearest", usage_decay=0.5).train()
    clustered = F.normalize(torch.randn(4, 8), dim=1).repeat(50, 1) + 0.01 * torch.randn(200, 8)
    before = quantizer.weight.detach().clone()
    for _ in range(20):
        quantizer(clustered)
    moved = (quantizer.weight.detach() != before).any(dim=1)
    assert moved.sum() > 40
    nearness = (quantizer.codebook @ F.normalize(clustered, dim=1).T).amax(dim=1)
    assert (nearness[moved] > 0.99).all()


def test_cvq_pulls_unused_codes_to_the_data_and_leaves_used_ones():
    quantizer = make("cvq").train()
    quantizer.usage.copy_(torch.cat([torch.ones(24) * 5, torch.zeros(24)]))
    before = quantizer.codebook.detach().clone()
    batch = F.normalize(torch.randn(512, 8) + torch.tensor([3.0] + [0.0] * 7), dim=1)
    quantizer.adapt(batch, torch.randint(24, (512,)))
    assert torch.allclose(quantizer.codebook[:24], before[:24], atol=1e-5)
    assert (quantizer.codebook[24:] @ batch.T).amax(dim=1).min() > 0.999


def test_simvq_moves_every_code_when_one_is_used():
    quantizer = make("simvq").train()
    target = quantizer.codebook[3].detach() + 0.1 * torch.randn(8)
    before = quantizer.codebook.detach().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    quantizer(target.unsqueeze(0)).loss.backward()
    optimizer.step()
    assert ((quantizer.codebook - before).norm(dim=1) > 1e-6).all()
    assert [name for name, _ in quantizer.named_parameters()] == ["transform.weight"]


def test_ibq_sends_a_gradient_to_every_code_and_nearest_only_to_the_chosen():
    for name, all_codes in (("ibq", True), ("nearest", False)):
        quantizer = make(name).train()
        result = quantizer(latents_for(quantizer, count=3))
        (result.loss + result.codes.sum()).backward()
        moved = (quantizer.weight.grad.norm(dim=1) > 0).sum()
        assert (int(moved) == 48) is all_codes


def test_fsq_codes_are_those_of_vector_quantize_pytorch():
    ours, theirs = make("fsq"), FSQ(levels=[5, 4, 3])
    everything = torch.arange(60)
    ids = torch.unique(theirs.codes_to_indices(theirs.indices_to_codes(everything)))
    assert len(ids) == len(torch.unique(ours.lookup(everything), dim=0)) == 60
    odd = ours.lookup(everything)[:, [0, 2]]  # levels of an odd number agree in value, even ones are shifted
    assert torch.allclose(odd, theirs.indices_to_codes(everything)[:, [0, 2]], atol=1e-6)


def test_configuration_mistakes_are_named():
    with pytest.raises(ValueError, match="set it to 60"):
        QuantizerConfig(name="fsq", num_codes=64, fsq_levels=(5, 4, 3))


def sgc(**changes) -> torch.nn.Module:
    return make("sgc", num_classes=2, **changes)


def test_sgc_takes_the_code_of_the_class_where_two_are_equally_near():
    quantizer = sgc(semantic_weight=0.5)
    with torch.no_grad():
        quantizer.weight[:2] = F.normalize(
            torch.tensor([[1.0, 0.1] + [0.0] * 6, [1.0, -0.1] + [0.0] * 6]), dim=1
        )
        quantizer.weight[2:] = F.normalize(torch.tensor([-1.0] + [0.0] * 7), dim=0)
    quantizer.histogram[0] = torch.tensor([1.0, 0.0])
    quantizer.histogram[1] = torch.tensor([0.0, 1.0])
    between = F.normalize(torch.tensor([[1.0, 0.02] + [0.0] * 6]), dim=1).repeat(2, 1)
    assert quantizer.assign(between, torch.tensor([0, 1])).tolist() == [0, 1]
    assert quantizer.assign(between, None).tolist() == [0, 0], "without classes the nearest code"
    far = F.normalize(torch.tensor([[1.0, 3.0] + [0.0] * 6]), dim=1)
    with torch.no_grad():
        quantizer.weight[2] = far[0]
    assert quantizer.assign(far, torch.tensor([1])).tolist() == [2], "meaning does not outweigh a far code"


def test_codes_of_sgc_are_running_means_of_their_latents_and_of_their_classes():
    quantizer = sgc(usage_decay=0.9, restart_below=0.0).train()
    quantizer.untouched.fill_(False)
    quantizer.usage[5] = 2.0
    before = quantizer.codebook[5].detach().clone()
    quantizer.histogram[5] = torch.tensor([1.0, 0.0])
    latents = F.normalize(torch.randn(4, 8), dim=1)
    quantizer.adapt(latents, torch.tensor([5, 5, 5, 5]), torch.tensor([1, 1, 1, 0]))

    # All 4 latents chose one of 48 codes: 48 times even use; N' = 0.9 N + 0.1 n (VQ-VAE, app. A.1).
    count = 0.9 * 2.0 + 0.1 * 48
    moved = (0.9 * 2.0 * before + 0.1 * 48 * latents.mean(dim=0)) / count
    torch.testing.assert_close(quantizer.codebook[5], F.normalize(moved, dim=0))
    one = (0.9 * 2.0 * 1.0 + 0.1 * 48 * 0.25) / count
    torch.testing.assert_close(quantizer.histogram[5], torch.tensor([one, 1 - one]))
    assert torch.equal(quantizer.histogram[6], torch.tensor([0.5, 0.5])), "a code that nothing chose stays"


def test_dead_codes_of_sgc_come_from_the_class_that_few_codes_mean():
    quantizer = sgc().train()
    quantizer.untouched.fill_(False)
    quantizer.usage[:] = 1.0
    quantizer.usage[40:] = 0.0
    quantizer.histogram[:] = torch.tensor([1.0, 0.0])
    quantizer.histogram[:2] = torch.tensor([0.0, 1.0])
    common = F.normalize(torch.randn(100, 8) + torch.tensor([5.0] + [0.0] * 7), dim=1)
    rare = F.normalize(torch.randn(100, 8) - torch.tensor([5.0] + [0.0] * 7), dim=1)
    classes = torch.tensor([0] * 100 + [1] * 100)
    quantizer.adapt(torch.cat([common, rare]), torch.randint(40, (200,)), classes)
    drawn = quantizer.codebook[40:, 0] < 0
    assert drawn.sum() >= 7, "38 to 46 codes mean the common class, 2 the other"
    assert torch.equal(quantizer.histogram[40:].argmax(dim=1).bool(), drawn)


def test_sgc_does_not_train_without_classes():
    quantizer = sgc().train()
    with pytest.raises(ValueError, match="--classes"):
        quantizer(latents_for(quantizer))
