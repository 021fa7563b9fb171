"""The two ways through an image: one token a forward pass, or some at once.

Legend: M images of a micro-batch, N = h*w image tokens, W drafts checked together, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoding import Decoder
from .noise import gumbel_rows
from .settings import SamplingConfig


def draw_rows(
    decoder: Decoder, seeds: Sequence[int], settings: SamplingConfig, ids_MN: Tensor, known_MN: Tensor
) -> Iterator[int]:
    """Draw what is not known into `ids_MN`, in place; yields the number of each grid row when it is done."""
    h, w = decoder.model.config.grid_size
    guidance, last = guidance_of(settings, h * w, ids_MN.device), None
    for row in range(h):
        noise = noise_of(decoder, seeds, range(row * w, (row + 1) * w), settings)
        for column, position in enumerate(range(row * w, (row + 1) * w)):
            logits = guided(decoder.step(last, position), guidance[position], settings)
            drawn = choose(logits, None if noise is None else noise[:, column], settings)
            ids_MN[:, position] = torch.where(known_MN[:, position], ids_MN[:, position], drawn)
            last = ids_MN[:, position].repeat(settings.branches)
        yield row


def draw_speculatively(
    decoder: Decoder, seeds: Sequence[int], settings: SamplingConfig, ids_MN: Tensor, known_MN: Tensor
) -> Iterator[int]:
    """Like `draw_rows`, some tokens a forward pass: speculative Jacobi decoding, exact.

    After Teng et al. 2024 (arXiv:2410.01699), but the noise of each position is fixed beforehand. A window of
    drafts is drawn again: its first token is right, and each next one if all drafts before it were drawn as
    they stood. So tokens are those of plain decoding at every temperature, up to the rounding of kernels.
    """
    (h, w), count = decoder.model.config.grid_size, settings.draft_tokens
    spare = 2 * count  # places past the end, where windows of finished images run
    guidance = F.pad(guidance_of(settings, h * w, ids_MN.device), (0, spare))
    noise = noise_of(decoder, seeds, range(h * w), settings)
    noise = None if noise is None else F.pad(noise, (0, 0, 0, spare))
    drafts, known = F.pad(ids_MN, (0, spare)), F.pad(known_MN, (0, spare))
    images, done, row = (
        torch.arange(len(seeds), device=ids_MN.device)[:, None],
        torch.zeros_like(ids_MN[:, 0]),
        0,
    )

    def draw(logits_MWK: Tensor, places_MW: Tensor) -> Tensor:
        drawn = choose(logits_MWK, None if noise is None else noise[images, places_MW], settings)
        return torch.where(known[images, places_MW], drafts[images, places_MW], drawn)

    while row < h:
        window = done[:, None] + decoder.columns
        before = drafts[images, (window - 1).clamp_min(0)]
        logits = decoder.window(before.repeat(settings.branches, 1), done.repeat(settings.branches))
        logits = guided(logits, guidance[window][..., None], settings)
        drawn = draw(logits, window)
        right = 1 + (drawn == drafts[images, window])[:, :-1].cumprod(1).sum(1)
        drafts[images, window] = drawn
        drafts[images, window + count] = draw(logits[:, -1:], window + count)  # first guesses
        done = (done + right).clamp_max(h * w)
        while row < h and int(done.min()) >= (row + 1) * w:
            ids_MN.copy_(drafts[:, : h * w])
            yield row
            row += 1


def guidance_of(settings: SamplingConfig, num_tokens: int, device: torch.device) -> Tensor:
    """(num_tokens,) weights of the text."""
    return torch.tensor([settings.guidance_at(p, num_tokens) for p in range(num_tokens)], device=device)


def noise_of(
    decoder: Decoder, seeds: Sequence[int], positions: Sequence[int], settings: SamplingConfig
) -> Tensor | None:
    """(M, positions, K) noise on the device of the decoder; None at temperature 0."""
    if not settings.temperature:
        return None
    noise = gumbel_rows(seeds, positions, decoder.model.config.num_codes)
    return noise.to(decoder.bias.device)


def guided(logits: Tensor, weight: Tensor, settings: SamplingConfig) -> Tensor:
    """Blend the rows with text and those with the null text, of which there are none without guidance."""
    if settings.branches == 1:
        return logits
    with_text, null = logits.chunk(2)
    return torch.lerp(null, with_text, weight)


def choose(logits_K: Tensor, noise_K: Tensor | None, settings: SamplingConfig) -> Tensor:
    """A code for each row of logits (..., K): the likeliest without noise, else a tempered and cut draw."""
    if noise_K is None:
        return logits_K.argmax(-1)
    tempered = logits_K / settings.temperature
    return (cut(tempered, settings.top_k, settings.top_p) + noise_K).argmax(-1)


def cut(logits_K: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all but the likeliest codes to -inf: exactly `top_k` of them, and the fewest that hold `top_p`.

    Among equals the lower code is kept.
    """
    if not top_k and top_p == 1:
        return logits_K
    ordered, codes = logits_K.sort(dim=-1, descending=True, stable=True)
    out = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k:
        out[..., top_k:] = True
    if top_p < 1:
        shares = ordered.masked_fill(out, -math.inf).softmax(-1)
        out |= shares.cumsum(-1) - shares >= top_p
    return logits_K.masked_fill(out.scatter(-1, codes, out), -math.inf)
