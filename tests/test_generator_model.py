"""The generator as a function: causality, text mask, attention back ends, its checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import types

import pytest
import torch

from tavq.data.text_encoder import TokenStates
from tavq.generator import attention
from tavq.generator.config import PRESETS
from tavq.generator.model import GeneratorConfig, GeneratorModel, apply_rotary_emb, precompute_rope_cache

TINY = GeneratorConfig.of(PRESETS["tiny"], num_codes=64, grid_size=(4, 4))


def random_model(config: GeneratorConfig = TINY) -> GeneratorModel:
    """A generator none of whose weights is zero."""
    torch.manual_seed(1)
    model = GeneratorModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_texts(count: int, config: GeneratorConfig = TINY, seed: int = 0) -> TokenStates:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, config.max_text_tokens + 1, (count, 1), generator=generator)
    mask = torch.arange(config.max_text_tokens) < lengths
    states = torch.randn(count, config.max_text_tokens, config.text_dim, generator=generator)
    return TokenStates(states * mask[..., None], mask)


def random_ids(count: int, config: GeneratorConfig = TINY) -> torch.Tensor:
    return torch.randint(
        config.num_codes, (count, config.num_tokens), generator=torch.Generator().manual_seed(3)
    )


def test_outputs_have_exactly_no_gradient_from_later_inputs():
    model, texts, ids = random_model(), random_texts(1), random_ids(1)
    embedded = model.token_embedding(ids).detach().requires_grad_()
    model.token_embedding.forward = lambda read: embedded[:, : read.shape[1]]
    logits = model(ids, texts.states, texts.mask)
    for k in (0, 5, TINY.num_tokens - 1):
        (gradient,) = torch.autograd.grad(logits[0, k].square().sum(), embedded, retain_graph=True)
        assert torch.count_nonzero(gradient[0, k:]) == 0
        assert all(torch.count_nonzero(gradient[0, before]) for before in range(k))


def test_raster_order_given_is_raster_order():
    model, texts, ids = random_model(), random_texts(3), random_ids(3)
    order = torch.arange(16).expand(3, -1)
    with torch.inference_mode():
        expected = model(ids, texts.states, texts.mask)
        assert torch.equal(model(ids, texts.states, texts.mask, order), expected)


def test_in_a_random_order_a_token_sees_what_comes_before_it_in_that_order_and_no_more():
    model, texts, ids = random_model(), random_texts(1), random_ids(1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))[None]
    embeddings = []
    hook = model.token_embedding.register_forward_hook(
        lambda *_: embeddings.append(_[-1].detach().requires_grad_()) or embeddings[-1]
    )
    logits = model(ids, texts.states, texts.mask, order)
    hook.remove()
    for number, place in enumerate(order[0].tolist()):
        (gradient,) = torch.autograd.grad(logits[0, place].sum(), embeddings[0], retain_graph=True)
        seen = gradient[0].abs().sum(-1) > 0  # of the tokens in the order in which they are read
        assert seen.tolist() == [earlier < number for earlier in range(15)]


def test_an_order_that_differs_at_two_places_changes_nothing_before_them():
    model, texts, ids = random_model(), random_texts(1), random_ids(1)
    swapped = torch.arange(16)[None].clone()
    swapped[0, 3], swapped[0, 4] = 4, 3
    with torch.inference_mode():
        raster = model(ids, texts.states, texts.mask)
        other = model(ids, texts.states, texts.mask, swapped)
    same = (raster - other).abs().amax(-1)[0] < 1e-4
    assert same[:3].all() and not same[3:5].any()


def test_empty_text_slots_do_not_matter_and_text_does():
    model, texts, ids = random_model(), random_texts(2), random_ids(2)
    texts.mask[:] = torch.arange(TINY.max_text_tokens) < 5
    noisy = texts.states.clone()
    noisy[:, 5:] = 1000.0
    expected = model(ids, texts.states, texts.mask)
    assert torch.equal(model(ids, noisy, texts.mask), expected)
    noisy[:, 4] += 1.0
    assert not torch.allclose(model(ids, noisy, texts.mask), expected)


def test_null_text_is_one_learned_vector_whatever_the_states():
    model, ids = random_model(), random_ids(1)
    none = torch.zeros(1, TINY.max_text_tokens, dtype=torch.bool)
    first, second = (model(ids, random_texts(1, seed=s).states, none) for s in (1, 2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first.sum(), model.null_embedding)
    assert torch.count_nonzero(gradient)


def test_first_loss_is_that_of_a_uniform_guess():
    model, texts, ids = GeneratorModel(TINY).eval(), random_texts(4), random_ids(4)
    logits = model(ids, texts.states, texts.mask)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert loss.item() == pytest.approx(math.log(TINY.num_codes), abs=1e-5)


def test_an_untrained_block_passes_its_input_through():
    x = torch.randn(1, TINY.sequence_length, TINY.width)
    model = GeneratorModel(TINY).eval()
    bias = torch.zeros(1, TINY.sequence_length, TINY.sequence_length)
    for block in model.blocks:
        assert torch.equal(block(x, model.rope_cache[: x.shape[1]], bias), x)


def test_embeddings_enter_the_blocks_at_the_scales_they_are_meant_to_have():
    model, texts = GeneratorModel(TINY), random_texts(2)
    texts.mask[1] = False
    embedded, seen = model.embed_text(30 * texts.states, texts.mask)
    rms = embedded.square().mean(-1).sqrt()
    assert rms[0, texts.mask[0]].tolist() == pytest.approx([1.0] * int(texts.mask[0].sum()), abs=1e-3)
    assert torch.equal(embedded[1, 0], model.null_embedding) and seen[1].tolist() == [True] + [False] * 31
    assert 0.6 < rms[1, 0] < 1.4  # the null text is as large as a text
    for embedding in (model.token_embedding.weight, model.position_embedding, model.bos_embedding):
        assert 0.3 < embedding.std() < 0.7


def test_dropout_disturbs_the_embeddings_and_both_branches_of_a_block_in_training_alone():
    config = dataclasses.replace(TINY, dropout=0.5)
    model, texts, ids = random_model(config), random_texts(1), random_ids(1)
    assert torch.equal(model(ids, texts.states, texts.mask), model(ids, texts.states, texts.mask))

    calls = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.train()
    first, second = (model(ids, texts.states, texts.mask) for _ in range(2))
    assert not torch.equal(first, second)
    assert calls[: len(calls) // 2] == ["dropout", *["blocks.0.dropout"] * 2, *["blocks.1.dropout"] * 2]


def test_rotation_keeps_lengths_and_sees_only_distances_in_rows_and_columns():
    rope = precompute_rope_cache(TINY)
    q, k = torch.randn(2, 1, 1, 1, 1, TINY.width // TINY.num_heads)

    def score(query_place: tuple[int, int], key_place: tuple[int, int]) -> float:
        slots = [TINY.max_text_tokens + 1 + r * TINY.grid_size[1] + c for r, c in (query_place, key_place)]
        rotated = [apply_rotary_emb(x, rope[slot : slot + 1]) for x, slot in zip((q, k), slots, strict=True)]
        assert rotated[0].norm().item() == pytest.approx(q.norm().item(), rel=1e-5)
        return float((rotated[0] * rotated[1]).sum())

    assert score((1, 2), (0, 1)) == pytest.approx(score((2, 3), (1, 2)), abs=1e-4)
    assert score((1, 2), (0, 1)) != pytest.approx(score((1, 2), (1, 1)), abs=1e-3)
    assert (rope[: TINY.max_text_tokens + 1] == torch.tensor([1.0, 0.0])).all()


def test_xformers_and_sdpa_give_the_same(monkeypatch):
    calls = []

    def memory_efficient_attention(q, k, v, attn_bias):
        calls.append(tuple(attn_bias.shape))
        assert attn_bias.stride(-2) % attention.BIAS_ALIGNMENT == 0 or attn_bias.shape[-2] == 1
        weights = torch.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5 + attn_bias
        return torch.einsum("bhls,bshd->blhd", weights.softmax(-1), v)

    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(attention, "xformers_ops", lambda: ops)
    q, k, v = torch.randn(2, 5, 2, 8), torch.randn(2, 11, 2, 8), torch.randn(2, 11, 2, 8)
    bias = torch.zeros(2, 5, 11).masked_fill(torch.rand(2, 5, 11) < 0.3, -math.inf)
    bias[..., 0] = 0
    expected = attention.attend(q, k, v, bias, "auto")  # on the CPU: torch's own
    assert calls == []
    monkeypatch.setattr(attention, "use_xformers", lambda q, backend: True)
    torch.testing.assert_close(attention.attend(q, k, v, bias, "auto"), expected, atol=1e-3, rtol=1e-3)
    assert calls == [(2, 2, 5, 11)]


def test_xformers_is_chosen_for_half_precision_on_cuda_only(monkeypatch):
    monkeypatch.setattr(attention, "xformers_ops", lambda: types.SimpleNamespace())
    cuda = {"is_cuda": True, "device": torch.device("cuda")}
    half, full = (types.SimpleNamespace(**cuda, element_size=lambda n=n: n) for n in (2, 4))
    assert attention.use_xformers(half, "auto") and not attention.use_xformers(full, "auto")
    assert attention.use_xformers(full, "xformers") and not attention.use_xformers(half, "sdpa")
    with pytest.raises(ValueError, match="no kernels for cpu; choose 'auto' or 'sdpa'"):
        attention.use_xformers(torch.zeros(1), "xformers")


def test_attention_gets_one_type_under_autocast(monkeypatch):
    types_seen = []

    def memory_efficient_attention(q, k, v, attn_bias):
        types_seen.append({q.dtype, k.dtype, v.dtype, attn_bias.dtype})
        return v

    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(attention, "xformers_ops", lambda: ops)
    monkeypatch.setattr(attention, "use_xformers", lambda q, backend: True)
    model = GeneratorModel(TINY)
    states = torch.randn(2, TINY.max_text_tokens, TINY.text_dim)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(2, 16, dtype=torch.long), states, torch.ones(states.shape[:2]).bool())
    assert types_seen and all(seen == {torch.bfloat16} for seen in types_seen)


def test_hardware_without_a_kernel_of_xformers_is_told_once_and_gets_torchs_attention(monkeypatch):
    def memory_efficient_attention(q, k, v, attn_bias):
        raise NotImplementedError("No operator found for this GPU\nand many lines more")

    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(attention, "xformers_ops", lambda: ops)
    monkeypatch.setattr(attention, "use_xformers", lambda q, backend: "cpu" not in attention.UNSUPPORTED)
    monkeypatch.setattr(attention, "UNSUPPORTED", set())
    q, k, v = (torch.randn(1, 3, 2, 8) for _ in range(3))
    bias = torch.zeros(1, 3, 3)
    with pytest.raises(ValueError, match=r"No operator found for this GPU\); choose 'auto' or 'sdpa'"):
        attention.attend(q, k, v, bias, "xformers")
    with pytest.warns(UserWarning, match="No operator found for this GPU") as told:
        first = attention.attend(q, k, v, bias, "auto")
        second = attention.attend(q, k, v, bias, "auto")
    assert len(told) == 1 and torch.equal(first, second)
    assert torch.equal(first, attention.attend(q, k, v, bias, "sdpa"))


def test_the_choice_of_attention_has_a_name(monkeypatch):
    monkeypatch.setattr(attention, "xformers_ops", lambda: types.SimpleNamespace())
    assert attention.choice("cuda", True, "auto") == "xformers" == attention.choice("cuda", False, "xformers")
    for case in (("cuda", False, "auto"), ("cpu", True, "auto"), ("cuda", True, "sdpa")):
        assert attention.choice(*case).startswith("torch")


def test_embeddings_start_as_an_isometric_image_of_the_codebook():
    model, codebook = (
        GeneratorModel(TINY),
        torch.nn.functional.normalize(torch.randn(TINY.num_codes, 8), dim=-1),
    )
    model.init_weights(codebook)
    embedded = torch.nn.functional.normalize(model.token_embedding.weight, dim=-1)
    torch.testing.assert_close(embedded @ embedded.T, codebook @ codebook.T, atol=1e-5, rtol=1e-5)
    assert model.token_embedding.weight.square().mean().sqrt().item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="the codebook has 3 codes, the generator 64"):
        model.init_weights(codebook[:3])


def test_saved_generator_loads_with_the_same_logits(tmp_path):
    model, texts, ids = (
        random_model(dataclasses.replace(TINY, codebook_hash="abc")),
        random_texts(2),
        random_ids(2),
    )
    model.save_pretrained(tmp_path)
    loaded = GeneratorModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(ids, texts.states, texts.mask), model(ids, texts.states, texts.mask))
    loaded.check_codebook("abc")
    with pytest.raises(
        ValueError, match=r"codebook is xyz, the generator learned ids of abc; load that tokenizer"
    ):
        loaded.check_codebook("xyz")


@pytest.mark.parametrize("former", ["prior", "ta-vq-prior"])
def test_checkpoints_that_call_it_a_prior_still_load(former, tmp_path):
    random_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["kind"] == "ta-vq-generator"
    (tmp_path / "config.json").write_text(json.dumps(config | {"kind": former}))
    assert GeneratorModel.from_pretrained(tmp_path).config == TINY


def test_base_has_about_a_hundred_million_weights():
    with torch.device("meta"):
        models = {name: GeneratorModel(GeneratorConfig.of(shape)) for name, shape in PRESETS.items()}
        counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert 90e6 < counts["base"] < 110e6 and 4e6 < counts["flickr8k"] < 5e6 and counts["tiny"] < 2e5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 36}, "width is 36 with 2 heads; expected a multiple of 8"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_text_of_another_encoder_is_refused():
    model, ids = random_model(), random_ids(1)
    with pytest.raises(ValueError, match=r"text states are \(7, 384\), expected \(32, 384\)"):
        model(ids, torch.zeros(1, 7, 384), torch.ones(1, 7, dtype=torch.bool))
