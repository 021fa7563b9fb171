"""The engine computes what the model computes, and speculative decoding what autoregressive decoding does."""

from __future__ import annotations

import math

import pytest
import torch

from tavq.data.text_encoder import TokenStates
from tavq.generator.config import PRESETS
from tavq.generator.engine import Engine, apply_cfg, autoregressive_decode, l2_normalize, speculative_decode
from tavq.generator.model import GeneratorConfig, GeneratorModel, rms_norm

TINY = GeneratorConfig.of(PRESETS["tiny"], num_codes=64, grid_size=(4, 4))
N = TINY.num_tokens


@pytest.fixture(scope="module")
def model() -> GeneratorModel:
    """A generator none of whose weights is zero."""
    torch.manual_seed(1)
    model = GeneratorModel(TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def texts() -> TokenStates:
    """Three texts; the second is the null text."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(TINY.max_text_tokens) < torch.tensor([[5], [0], [20]])
    return TokenStates(torch.randn(3, TINY.max_text_tokens, TINY.text_dim, generator=rng), mask)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(TINY.num_codes, (3, N), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def full_logits(model, texts, ids) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, texts.states, texts.mask)


def decoded(engine: Engine, ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, N, K) of `ids`, one token per forward pass."""
    steps = [engine.decode_one_token(ids[:, i - 1] if i else None, i) for i in range(N)]
    return torch.stack(steps, 1)


@torch.inference_mode()
def test_decoding_with_the_cache_agrees_with_the_full_forward(model, texts, ids, full_logits):
    engine = Engine(model, 3)
    engine.prefill(texts)
    torch.testing.assert_close(decoded(engine, ids), full_logits, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_windows_agree_with_the_full_forward_wherever_they_begin(model, texts, ids, full_logits):
    engine = Engine(model, 3, window=4)
    engine.prefill(texts)
    # Each image decodes its own windows, which overlap those before; one runs past the end.
    for first in ([0, 0, 0], [1, 4, 3], [5, 8, 4], [9, 12, 8], [12, 15, 12]):
        position = torch.tensor(first)[:, None] + torch.arange(4)
        previous = ids.gather(1, (position - 1).clamp(0, N - 1))
        logits = engine.decode_window(previous, torch.tensor(first))
        for image in range(3):
            inside = position[image] < N
            expected = full_logits[image, position[image][inside]]
            torch.testing.assert_close(logits[image, inside], expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_rejected_draft_leaves_no_trace_in_the_cache(model, texts, ids, full_logits):
    engine = Engine(model, 3, window=4)
    engine.prefill(texts)
    start = torch.zeros(3, dtype=torch.int64)
    engine.decode_window((ids[:, :4] + 1) % TINY.num_codes, start)  # wrong ids
    logits = engine.decode_window(ids[:, [0, 0, 1, 2]], start)
    torch.testing.assert_close(logits, full_logits[:, :4], atol=1e-5, rtol=1e-5)


def test_guidance_extrapolates_from_the_null_text():
    logits = torch.tensor([[1.0, 2.0], [0.0, 4.0]])  # with the text, with the null text
    assert apply_cfg(logits, torch.tensor(3.0)).tolist() == [[3.0, -2.0]]
    assert apply_cfg(logits, torch.tensor(1.0)).tolist() == [[1.0, 2.0]]
    assert apply_cfg(logits, torch.tensor(0.0)).tolist() == [[0.0, 4.0]]


@torch.inference_mode()
def test_each_position_has_its_own_guidance_scale(model, texts, ids, full_logits):
    null_logits = model(ids, texts.states, texts.mask & False)
    scale = torch.linspace(1, 4, N)
    expected = null_logits + scale[:, None] * (full_logits - null_logits)

    engine = Engine(model, 3, window=4, guidance_scale_N=scale)
    engine.prefill(texts)
    torch.testing.assert_close(decoded(engine, ids), expected, atol=1e-4, rtol=1e-4)

    engine.prefill(texts)
    for start in range(0, N, 4):
        previous = ids[:, [max(0, position - 1) for position in range(start, start + 4)]]
        logits = engine.decode_window(previous, torch.full((3,), start))
        torch.testing.assert_close(logits, expected[:, start : start + 4], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(("precision", "dtype"), [("int8", torch.float32), ("bfloat16", torch.bfloat16)])
def test_precision_rounds_every_layer_and_no_more(model, texts, ids, full_logits, precision, dtype):
    engine = Engine(model, 3, precision)
    engine.prefill(texts)
    logits = decoded(engine, ids)
    error = (logits - full_logits).norm() / full_logits.norm()
    assert 1e-4 < error < 0.05
    assert logits.dtype == torch.float32 and engine.kv_caches[0].keys.dtype == dtype

    x = torch.randn(3, TINY.width).to(dtype)
    hidden = torch.randn(3, TINY.hidden_width).to(dtype)
    plain, block = Engine(model, 3).blocks[0], engine.blocks[0]
    for name, given in {"qkv_proj": x, "o_proj": x, "gate_up_proj": x, "down_proj": hidden}.items():
        rounded, exact = getattr(block, name)(given), getattr(plain, name)(given.float())
        assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.02, name
    rounded, exact = engine.head(x), Engine(model, 3).head(x.float())
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.02


def test_l2_normalize_is_the_norm_of_the_model_but_for_a_factor():
    x = torch.randn(5, 48)
    torch.testing.assert_close(l2_normalize(x) * math.sqrt(48), rms_norm(x), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("window", [1, 2, 5, 8, 16, 30])
def test_predictable_tokens_are_accepted_a_whole_window_at_a_time(model, texts, window, monkeypatch):
    """The first pass verifies one token, as nothing is drafted yet; its last logits draft the next window."""
    passes, decode_window = [], Engine.decode_window
    monkeypatch.setattr(Engine, "decode_window", lambda *args: passes.append(1) or decode_window(*args))
    engine = Engine(model, 3, window=window)
    engine.prefill(texts)

    def sample_tokens(logits, position):
        return torch.full(logits.shape[:1] + position.shape[1:], 7)

    ids, known = torch.zeros(3, N, dtype=torch.int64), torch.zeros(3, N, dtype=torch.bool)
    assert list(speculative_decode(engine, sample_tokens, ids, known)) == [0, 1, 2, 3]
    assert (ids == 7).all()
    assert len(passes) == 1 + math.ceil((N - 1) / window)


@torch.inference_mode()
def test_positions_behind_the_window_are_guessed_from_its_last_logits(model, texts):
    engine = Engine(model, 3, window=4)
    engine.prefill(texts)
    calls = []

    def sample_tokens(logits, position):
        calls.append((logits, position))
        return logits.argmax(-1).expand_as(position)

    ids, known = torch.zeros(3, N, dtype=torch.int64), torch.zeros(3, N, dtype=torch.bool)
    list(speculative_decode(engine, sample_tokens, ids, known))
    for (logits, position), (guess_logits, guessed) in zip(calls[::2], calls[1::2], strict=True):
        assert torch.equal(guess_logits, logits[:, -1:]) and torch.equal(guessed, position + 4)


@torch.inference_mode()
def test_a_draft_is_rejected_with_all_drafts_after_it(model, texts):
    """A token says its position and the token before it, so any draft after a wrong one is wrong as well."""
    engine = Engine(model, 3, window=6)
    engine.prefill(texts)
    seen, decode_window = [], engine.decode_window

    def remember(previous, first):
        seen.append(previous)
        return decode_window(previous, first)

    engine.decode_window = remember

    def sample_tokens(logits, position):
        previous = seen[-1] if logits.shape[1] > 1 else seen[-1][:, -1:].expand_as(position)
        return torch.where(position == 0, 1, (3 * previous + position) % TINY.num_codes)

    ids, known = torch.zeros(3, N, dtype=torch.int64), torch.zeros(3, N, dtype=torch.bool)
    list(speculative_decode(engine, sample_tokens, ids, known))
    expected = [1]
    for position in range(1, N):
        expected.append((3 * expected[-1] + position) % TINY.num_codes)
    assert ids.tolist() == [expected] * 3


@torch.inference_mode()
@pytest.mark.parametrize("window", [2, 5])
def test_speculative_decoding_gives_ids_and_rows_of_autoregressive_decoding(model, texts, window):
    noise = torch.randn(3, N, TINY.num_codes, generator=torch.Generator().manual_seed(2))
    image = torch.arange(3)[:, None]

    def sample_tokens(logits, position):
        if isinstance(position, int):
            return (logits + noise[:, position]).argmax(-1)
        return (logits + noise[image, position.clamp_max(N - 1)]).argmax(-1)

    known = torch.rand(3, N, generator=torch.Generator().manual_seed(5)) < torch.tensor([[0], [0.5], [1]])
    given = torch.where(known, 9, 0)
    results = []
    for decode, size in ((autoregressive_decode, 1), (speculative_decode, window)):
        engine = Engine(model, 3, window=size)
        engine.prefill(texts)
        ids = given.clone()
        rows = []
        for row in decode(engine, sample_tokens, ids, known):
            rows.append(ids[:, : 4 * (row + 1)].clone())  # whatever lies behind is not promised
        results.append((ids, rows))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert (results[0][0][known] == 9).all() and (results[0][0][~known] != 9).any()
