"""The sampling contract: an image is a function of its prompt, its seed and the settings."""

from __future__ import annotations

import dataclasses
import math
import shutil
import unittest.mock

import pytest
import torch

from tavq.data.text_encoder import TokenStates
from tavq.generator.config import PRESETS, SamplingConfig
from tavq.generator.engine import Engine
from tavq.generator.model import GeneratorConfig, GeneratorModel
from tavq.generator.sampling import (
    gumbel_noise,
    resample,
    sample,
    sample_next_token,
    stream,
    top_k_top_p_filtering,
)

TINY = GeneratorConfig.of(PRESETS["tiny"], num_codes=64, grid_size=(4, 4))
SETTINGS = SamplingConfig(guidance_scale=2.0, guidance_schedule="constant", micro_batch=4, draft_tokens=1)
PINNED_TOKENS = [21, 47, 27, 42, 51, 13, 61, 57, 43, 4, 3, 20, 48, 28, 54, 46]


@pytest.fixture(scope="module")
def model() -> GeneratorModel:
    """A generator with random weights, none of them zero."""
    torch.manual_seed(1)
    model = GeneratorModel(TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def texts() -> TokenStates:
    """64 texts of unlike lengths."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(TINY.max_text_tokens) < torch.randint(3, 33, (64, 1), generator=generator)
    return TokenStates(torch.randn(64, TINY.max_text_tokens, TINY.text_dim, generator=generator), mask)


def part(texts: TokenStates, rows: slice | list[int]) -> TokenStates:
    return TokenStates(texts.states[rows], texts.mask[rows])


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [SETTINGS, SamplingConfig(), SamplingConfig(guidance_scale=1.0, micro_batch=4, top_k=20, top_p=0.9)],
)
def test_64_prompts_draw_the_same_at_batch_1_3_and_16(model, texts, settings):
    seeds = [7 * i for i in range(64)]
    drawn = {}
    for batch in (1, 3, 16):
        chunks = [slice(i, i + batch) for i in range(0, 64, batch)]
        drawn[batch] = torch.cat([sample(model, part(texts, c), seeds[c], settings) for c in chunks])
    assert torch.equal(drawn[1], drawn[3]) and torch.equal(drawn[1], drawn[16])
    assert len({tuple(row) for row in drawn[1].tolist()}) == 64


def test_place_in_the_batch_and_the_other_prompts_do_not_matter(model, texts):
    order = [5, 9, 2, 33, 60]
    seeds = [11, 12, 13, 14, 15]
    one = sample(model, part(texts, order), seeds, SETTINGS)
    turned = sample(model, part(texts, order[::-1]), seeds[::-1], SETTINGS)
    assert torch.equal(one, turned.flip(0))


def test_noise_of_a_seed_is_pinned():
    """Values of torch 2.13; if they change, every recipe that was ever saved draws another picture."""
    expected = {
        (0, 0): [-0.656934, 2.707247, -0.824124],
        (123, 5): [1.392569, 2.648331, -0.324523],
        (-1, 0): [-1.297805, 1.466822, 0.212081],
    }
    for (seed, position), values in expected.items():
        torch.testing.assert_close(
            gumbel_noise(seed, position, 3), torch.tensor(values), atol=1e-5, rtol=1e-5
        )


def test_tokens_of_a_seed_are_pinned(model, texts):
    assert sample(model, part(texts, [0]), [42], SETTINGS)[0].tolist() == PINNED_TOKENS


def test_noise_is_standard_gumbel_and_differs_by_seed_and_position():
    noise = torch.cat([gumbel_noise(seed, 0, 1000) for seed in range(100)])
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.02)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.02)
    rows = torch.stack([gumbel_noise(s, p, 50) for s in range(4) for p in range(4)])
    assert (torch.corrcoef(rows) - torch.eye(16)).abs().max() < 0.6
    assert torch.equal(gumbel_noise(3, 4, 50)[:20], gumbel_noise(3, 4, 20))


def test_noise_reaches_far_into_the_tail():
    """float32 uniforms come in steps of 6e-8, which would cut the noise off at 16.6."""
    uniform = torch.full((3,), 1 - 1e-9, dtype=torch.float64)
    with unittest.mock.patch.object(torch, "rand", lambda *size, dtype, generator: uniform.to(dtype).clone()):
        assert gumbel_noise(0, 0, 3)[0].item() == pytest.approx(-math.log(1e-9), abs=1e-3)


def test_draws_follow_the_tempered_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, -1)
    noise = torch.stack([gumbel_noise(seed, 0, 4) for seed in range(20_000)])
    drawn = sample_next_token(logits, noise, SamplingConfig(temperature=2.0))
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, (logits[0] / 2.0).softmax(-1), atol=0.01, rtol=0)


def test_temperature_0_is_argmax_whatever_the_seed(model, texts):
    greedy = dataclasses.replace(SETTINGS, temperature=0.0)
    ids = sample(model, part(texts, [3, 4]), [1, 2], greedy)
    assert torch.equal(ids, sample(model, part(texts, [3, 4]), [8, 9], greedy))
    with torch.inference_mode():
        text, null = (model(ids, texts.states[3:5], texts.mask[3:5] & seen) for seen in (True, False))
    assert torch.equal((null + 2.0 * (text - null)).argmax(-1), ids)


def test_scale_1_is_no_guidance(model, texts):
    ids = sample(model, part(texts, [6]), [5], SamplingConfig(guidance_scale=1.0))
    with torch.inference_mode():
        logits = model(ids, texts.states[6:7], texts.mask[6:7])[0]
    noise = torch.stack([gumbel_noise(5, position, TINY.num_codes) for position in range(TINY.num_tokens)])
    assert torch.equal((logits + noise).argmax(-1), ids[0])


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_drafts_give_the_tokens_of_plain_decoding(model, texts, temperature, scale):
    some, seeds = part(texts, slice(8)), list(range(8))
    plain = SamplingConfig(scale, "cosine", temperature=temperature, top_k=50, draft_tokens=1)
    expected = sample(model, some, seeds, plain)
    for count in (2, 5, 30):
        drafted = dataclasses.replace(plain, draft_tokens=count, micro_batch=3)
        assert torch.equal(sample(model, some, seeds, drafted), expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("draft_tokens", [1, 5])
def test_guidance_follows_its_schedule(model, texts, schedule, draft_tokens):
    config = SamplingConfig(3.0, schedule, temperature=0.0, draft_tokens=draft_tokens)
    ids = sample(model, part(texts, [3]), [1], config)
    with torch.inference_mode():
        text, null = (model(ids, texts.states[3:4], texts.mask[3:4] & seen) for seen in (True, False))
    scale = torch.tensor([config.guidance_scale_at(position, 16) for position in range(16)])
    assert torch.equal((null + scale[:, None] * (text - null)).argmax(-1), ids)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_decoding_gives_the_tokens_of_plain_decoding(model, texts):
    plain = dataclasses.replace(SETTINGS, micro_batch=1)
    compiled = dataclasses.replace(plain, compile=True, draft_tokens=4)
    some = part(texts, slice(2))
    assert torch.equal(sample(model, some, [5, 6], compiled), sample(model, some, [5, 6], plain))


def test_drafts_take_fewer_passes_and_keep_what_is_given(model, texts, monkeypatch):
    passes, decode_window = [], Engine.decode_window
    monkeypatch.setattr(Engine, "decode_window", lambda *args: passes.append(1) or decode_window(*args))
    settings = dataclasses.replace(SETTINGS, draft_tokens=8, micro_batch=1)
    whole = sample(model, part(texts, [0]), [4], settings)
    assert 2 <= len(passes) < TINY.num_tokens
    passes.clear()
    kept = torch.ones(1, 16, dtype=torch.bool).index_fill(1, torch.tensor([15]), False)
    assert torch.equal(
        sample(model, part(texts, [0]), [4], settings, given_ids=whole, given_mask=kept), whole
    )
    assert len(passes) == 2


def test_seeds_survive_the_batch_with_drafts(model, texts):
    settings = dataclasses.replace(SETTINGS, draft_tokens=4, micro_batch=2)
    together = sample(model, part(texts, slice(16)), range(16), settings)
    alone = [sample(model, part(texts, [i]), [i], settings) for i in range(16)]
    assert torch.equal(torch.cat(alone), together)


def test_guidance_schedules_rise_from_their_start_to_all():
    for schedule in ("linear", "cosine"):
        settings = SamplingConfig(guidance_scale=5.0, guidance_schedule=schedule, guidance_start=0.0)
        scales = [settings.guidance_scale_at(position, 11) for position in range(11)]
        assert scales[0] == 1.0 and scales[5] == pytest.approx(3.0) and scales[10] == pytest.approx(5.0)
        assert scales == sorted(scales)
    half = dataclasses.replace(settings, guidance_start=0.5)
    assert half.guidance_scale_at(0, 11) == 3.0 and half.guidance_scale_at(10, 11) == pytest.approx(5.0)
    constant = SamplingConfig(guidance_scale=5.0, guidance_schedule="constant")
    assert constant.guidance_scale_at(0, 11) == 5.0


def test_top_k_with_ties_keeps_k():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    kept = top_k_top_p_filtering(logits, top_k=2, top_p=1.0).isfinite()
    assert kept.tolist() == [[False, True, True, False, False], [True, True, False, False, False]]


def test_among_many_equals_the_lower_codes_stay():
    logits = torch.randint(3, (1, 5000), generator=torch.Generator().manual_seed(0)).float()
    kept = top_k_top_p_filtering(logits, top_k=100, top_p=1.0).isfinite()[0]
    assert torch.equal(kept.nonzero().flatten(), (logits[0] == 2).nonzero().flatten()[:100])


def test_top_p_keeps_the_fewest_that_hold_p():
    logits = torch.tensor([[0.2, 0.5, 0.1, 0.2]]).log()
    assert top_k_top_p_filtering(logits, 0, 0.45).isfinite().tolist() == [[False, True, False, False]]
    assert top_k_top_p_filtering(logits, 0, 0.55).isfinite().tolist() == [[True, True, False, False]]
    assert top_k_top_p_filtering(logits, 0, 0.85).isfinite().tolist() == [[True, True, False, True]]
    assert torch.equal(top_k_top_p_filtering(logits, 0, 1.0), logits)


def test_top_p_counts_what_top_k_leaves():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    kept = top_k_top_p_filtering(logits, 2, 0.55).isfinite()
    assert kept.tolist() == [[True, False, False, False]]  # 0.4 / 0.7 is enough; 0.4 alone would not be


def test_top_k_and_top_p_decide_what_is_sampled():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(500, -1)
    noise = torch.stack([gumbel_noise(seed, 0, 4) for seed in range(500)])

    def sampled(**settings) -> set[int]:
        return set(sample_next_token(logits, noise, SamplingConfig(**settings)).tolist())

    assert sampled(top_k=0) == {0, 1, 2, 3}
    assert sampled(top_k=2) == {0, 1}
    assert sampled(top_k=0, top_p=0.6) == {0}
    # The nucleus is one of the tempered softmax, whose largest probabilities are 0.39 and 0.28.
    assert sampled(top_k=0, top_p=0.6, temperature=3.0) == {0, 1}


@pytest.mark.parametrize("draft_tokens", [1, 5])
@pytest.mark.parametrize("keep", ["top", "box", "random"])
def test_completion_keeps_what_is_given(model, texts, keep, draft_tokens):
    settings = dataclasses.replace(SETTINGS, draft_tokens=draft_tokens)
    given = torch.randint(TINY.num_codes, (2, TINY.num_tokens))
    mask = {
        "top": torch.arange(16) < 8,
        "box": torch.zeros(4, 4, dtype=torch.bool).index_fill(0, torch.tensor([1, 2]), True).flatten(),
        "random": torch.rand(2, 16) < 0.5,
    }[keep].expand(2, -1)
    ids = sample(model, part(texts, [0, 1]), [0, 1], settings, given_ids=given, given_mask=mask)
    assert torch.equal(ids[mask], given[mask])
    assert not torch.equal(ids[~mask], given[~mask])
    all_kept = sample(
        model, part(texts, [0]), [0], settings, given_ids=ids[:1], given_mask=torch.ones(1, 16) > 0
    )
    assert torch.equal(all_kept, ids[:1])


def test_completion_of_its_own_beginning_draws_the_rest_of_the_same_image(model, texts):
    whole = sample(model, part(texts, [2]), [77], SETTINGS)
    mask = torch.arange(16) < 6
    again = sample(model, part(texts, [2]), [77], SETTINGS, given_ids=whole[0], given_mask=mask)
    assert torch.equal(again, whole)


def test_ids_that_are_not_to_be_kept_are_never_looked_at(model, texts):
    mask = torch.arange(16) < 6
    given = torch.where(mask, 5, -1)
    ids = sample(model, part(texts, [2]), [7], SETTINGS, given_ids=given, given_mask=mask)
    assert (ids[0, :6] == 5).all() and ids.min() >= 0
    first = next(
        stream(model, part(texts, [2]), [7], SETTINGS, given_ids=given, given_mask=mask, every_rows=1)
    )
    assert first.known[0].tolist() == [True] * 6 + [False] * 10
    assert torch.count_nonzero(first.ids[0, 6:]) == 0


@pytest.mark.parametrize("draft_tokens", [1, 5])
def test_stream_grows_row_by_row_to_the_sampled_image(model, texts, draft_tokens):
    seeds, settings = [1, 2, 3, 4, 5], dataclasses.replace(SETTINGS, draft_tokens=draft_tokens)
    parts = list(stream(model, part(texts, slice(5)), seeds, settings, every_rows=1))
    assert torch.equal(parts[-1].ids, sample(model, part(texts, slice(5)), seeds, SETTINGS))
    assert parts[-1].known.all() and len(parts) == 2 * TINY.grid_size[0]
    assert parts[0].known.sum(1).tolist() == [4, 4, 4, 4, 0]
    every_second = list(stream(model, part(texts, slice(5)), seeds, settings, every_rows=2))
    assert [partial.known.sum().item() for partial in every_second] == [4 * 8, 4 * 16, 4 * 16 + 8, 5 * 16]
    for partial in parts:
        assert torch.equal(partial.ids[partial.known], parts[-1].ids[partial.known])
        assert torch.count_nonzero(partial.ids[~partial.known]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0, at most 1"),
        ({"top_k": -2}, "top_k is -2"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"draft_tokens": 0}, "draft_tokens is 0"),
        ({"precision": "int4"}, "precision is 'int4'; choose float32, bfloat16, int8"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"guidance_start": 1.5}, "guidance_start is 1.5, expected 0 to 1"),
        ({"guidance_schedule": "up"}, "choose constant, linear or cosine"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**change)


def test_a_generator_in_training_mode_is_refused(model, texts):
    with pytest.raises(ValueError, match=r"training mode.*call model.eval\(\)"):
        sample(GeneratorModel(TINY).train(), part(texts, [0]), [0], SETTINGS)
    with pytest.raises(ValueError, match="every_rows is 0"):
        next(stream(model, part(texts, [0]), [0], SETTINGS, every_rows=0))


def test_wrong_counts_and_shapes_are_refused(model, texts):
    two = part(texts, [0, 1])
    with pytest.raises(ValueError, match="got 2 texts and 1 seeds"):
        sample(model, two, [1], SETTINGS)
    with pytest.raises(ValueError, match="expected both or neither"):
        sample(model, two, [1, 2], SETTINGS, given_ids=torch.zeros(16, dtype=torch.int64))
    ones = torch.ones(16, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"given_ids are \(2, 4, 4\)"):
        sample(model, two, [1, 2], SETTINGS, given_ids=torch.zeros(2, 4, 4), given_mask=ones)
    with pytest.raises(ValueError, match="given_ids reach from 64 to 64, expected 0 to 63"):
        sample(model, two, [1, 2], SETTINGS, given_ids=torch.full((16,), 64), given_mask=ones)


def test_resampled_tokens_are_the_generator_s_own_guesses_at_each_place(model):
    ids = torch.randint(TINY.num_codes, (64, 16), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    sampled = resample(model, ids, top_k=3)
    with torch.inference_mode():
        none = torch.zeros(64, TINY.max_text_tokens, dtype=torch.bool)
        logits = model(ids, torch.zeros(*none.shape, TINY.text_dim), none)
    likeliest = logits.topk(3).indices
    assert (likeliest == sampled[..., None]).any(-1).all()
    assert len({int(rank) for rank in (likeliest == sampled[..., None]).nonzero()[:, 2]}) == 3
