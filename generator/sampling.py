"""Draw ids from the prior: guidance, temperature, top-k, top-p, completion, streaming.

An image depends on its prompt, its own seed and the settings alone: noise is keyed by seed and position, and
micro-batches have a fixed size, since kernels round differently by batch.

Legend: B images, M a micro-batch of them, R rows of a forward pass (M, or 2 M with guidance), N image tokens,
T text slots, K codes, (h, w) the grid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from tavq.data.text_encoder import TokenStates

from .decoding import Decoder
from .linear import Precision
from .model import Prior
from .noise import gumbel_rows


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How ids are drawn."""

    guidance: float = 3.0
    """Weight of the text: logits = null + guidance * (text - null). 1 means none."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How guidance rises from 1 at the first token to its value at the last."""
    temperature: float = 1.0
    """0 takes the likeliest code each time."""
    top_k: int = 0
    """Draw among so many likeliest codes; 0 means all."""
    top_p: float = 1.0
    """Draw among the likeliest codes that hold this much probability."""
    precision: Precision = "float32"
    """Of the weights while decoding. Other than float32 draws a slightly different image, faster: int8 on the
    CPU (the inputs of each layer too), bfloat16 on CUDA."""
    micro_batch: int = 4
    """Images decoded together; fewer are padded to it, so that every image is computed alike."""

    def __post_init__(self) -> None:
        limits = {
            "guidance": (self.guidance >= 0, "0 or more"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "micro_batch": (self.micro_batch >= 1, "1 or more"),
        }
        for name, (holds, expected) in limits.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}; change it")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is {self.precision!r}; choose {', '.join(get_args(Precision))}")
        if self.guidance_schedule not in ("constant", "linear", "cosine"):
            raise ValueError(
                f"guidance_schedule is {self.guidance_schedule!r}; choose constant, linear or cosine"
            )

    def guidance_at(self, position: int, num_tokens: int) -> float:
        """Guidance of the token at `position`."""
        share = position / max(1, num_tokens - 1)
        rise = {"constant": 1.0, "linear": share, "cosine": (1 - math.cos(math.pi * share)) / 2}
        return 1 + (self.guidance - 1) * rise[self.guidance_schedule]


@dataclasses.dataclass(frozen=True)
class Partial:
    """Images so far.

    Attributes:
        ids: (B, N) int64; what is not yet known is 0.
        known: (B, N) bool.
    """

    ids: Tensor
    known: Tensor


def sample(
    prior: Prior,
    texts: TokenStates,
    seeds: Sequence[int],
    settings: SamplingConfig,
    *,
    given_ids: Tensor | None = None,
    given_mask: Tensor | None = None,
) -> Tensor:
    """Draw one image a text.

    Args:
        prior: the prior.
        texts: B texts; for results that do not depend on the other prompts, encode each by itself.
        seeds: B seeds.
        settings: how to draw.
        given_ids: (B, N) or (N,) ids to keep where `given_mask`, same shape, is True; the rest is drawn.

    Returns:
        (B, N) int64 on the device of the prior.
    """
    *_, last = stream(prior, texts, seeds, settings, given_ids=given_ids, given_mask=given_mask)
    return last.ids


@torch.inference_mode()
def stream(
    prior: Prior,
    texts: TokenStates,
    seeds: Sequence[int],
    settings: SamplingConfig,
    *,
    given_ids: Tensor | None = None,
    given_mask: Tensor | None = None,
    every_rows: int | None = None,
) -> Iterator[Partial]:
    """Like `sample`, but yield the images so far after every `every_rows` grid rows (None: whole images).

    One micro-batch after the other; stop iterating to cancel.
    """
    if len(seeds) != len(texts.mask) or not seeds:
        raise ValueError(f"got {len(texts.mask)} texts and {len(seeds)} seeds, expected one seed a text")
    ids, known = _given(prior, len(seeds), given_ids, given_mask)
    branches = 1 if settings.guidance == 1 else 2
    decoder = Decoder(prior, settings.micro_batch * branches, settings.precision)
    for images in torch.arange(len(seeds)).split(settings.micro_batch):
        padded = torch.cat([images, images[:1].expand(settings.micro_batch - len(images))])
        decoder.read(_branches(texts, padded, settings))
        drawn, kept = ids[padded], known[padded]
        rows = _draw_rows(decoder, [seeds[i] for i in padded], settings, drawn, kept)
        for row in rows:
            done = (row + 1) * prior.config.grid_size[1]
            ids[images, :done], known[images, :done] = drawn[: len(images), :done], True
            if done == prior.config.num_tokens or (every_rows is not None and (row + 1) % every_rows == 0):
                yield Partial(ids.clone(), known.clone())


def _branches(texts: TokenStates, images: Tensor, settings: SamplingConfig) -> TokenStates:
    """The texts of a micro-batch and, with guidance, as many null texts."""
    states, mask = texts.states[images], texts.mask[images]
    if settings.guidance == 1:
        return TokenStates(states, mask)
    return TokenStates(
        torch.cat([states, torch.zeros_like(states)]), torch.cat([mask, torch.zeros_like(mask)])
    )


def _draw_rows(
    decoder: Decoder, seeds: Sequence[int], settings: SamplingConfig, ids_MN: Tensor, known_MN: Tensor
) -> Iterator[int]:
    """Draw what is not known into `ids_MN`, in place; yields the number of each grid row when it is done."""
    (h, w), num_codes = decoder.prior.config.grid_size, decoder.prior.config.num_codes
    branches, last = (1 if settings.guidance == 1 else 2), None
    for row in range(h):
        positions = range(row * w, (row + 1) * w)
        noise = gumbel_rows(seeds, positions, num_codes).to(ids_MN.device) if settings.temperature else None
        for column, position in enumerate(positions):
            logits = decoder.step(last, position)
            if branches == 2:
                with_text, null = logits.chunk(2)
                logits = torch.lerp(null, with_text, settings.guidance_at(position, h * w))
            drawn = choose(logits, None if noise is None else noise[column], settings)
            torch.where(known_MN[:, position], ids_MN[:, position], drawn, out=drawn)
            ids_MN[:, position] = drawn
            last = drawn.repeat(branches)
        yield row


def choose(logits_MK: Tensor, noise_MK: Tensor | None, settings: SamplingConfig) -> Tensor:
    """(M,) codes: the likeliest without noise, else a draw from the tempered and cut distribution."""
    if noise_MK is None:
        return logits_MK.argmax(-1)
    return (cut(logits_MK / settings.temperature, settings.top_k, settings.top_p) + noise_MK).argmax(-1)


def cut(logits_MK: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all but the likeliest codes to -inf: exactly `top_k` of them, and the fewest that hold `top_p`.

    Among equals the lower code is kept.
    """
    if not top_k and top_p == 1:
        return logits_MK
    ordered, codes = logits_MK.sort(dim=-1, descending=True, stable=True)
    out = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k:
        out[:, top_k:] = True
    if top_p < 1:
        shares = ordered.masked_fill(out, -math.inf).softmax(-1)
        out |= shares.cumsum(-1) - shares >= top_p
    return logits_MK.masked_fill(out.scatter(-1, codes, out), -math.inf)


def _given(prior: Prior, images: int, ids: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, N) ids and mask of what is given, checked; nothing by default."""
    config, device, shape = prior.config, prior.start.device, (images, prior.config.num_tokens)
    if (ids is None) != (mask is None):
        raise ValueError("got one of given_ids and given_mask, expected both or neither; give the other too")
    if ids is None or mask is None:
        ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    if ids.shape not in (shape, shape[1:]) or mask.shape not in (shape, shape[1:]):
        raise ValueError(
            f"given_ids are {tuple(ids.shape)}, given_mask is {tuple(mask.shape)}; "
            f"expected {shape} or {shape[1:]} for each; reshape them"
        )
    known = mask.to(device, torch.bool).expand(shape).clone()
    kept = ids.to(device, torch.int64).expand(shape).clone().masked_fill_(~known, 0)
    if kept.min() < 0 or kept.max() >= config.num_codes:
        raise ValueError(
            f"given_ids reach from {kept.min()} to {kept.max()}, expected 0 to {config.num_codes - 1}; "
            "give ids of the tokenizer that the prior was trained with"
        )
    return kept, known
