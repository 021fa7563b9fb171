"""Draw ids from the generator: guidance, temperature, top-k, top-p, completion, streaming.

An image depends on its prompt, its own seed and the settings alone: noise is keyed by seed and position, and
micro-batches have a fixed size, since kernels round differently by batch.

Legend: B images, M a micro-batch of them, R rows of a forward pass (M, or 2 M with guidance), N image tokens,
T text slots, K codes, (h, w) the grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tavq.data.text_encoder import TokenStates

from .decoding import Decoder
from .drawing import draw_rows, draw_speculatively
from .model import GeneratorModel
from .settings import SamplingConfig


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
    model: GeneratorModel,
    texts: TokenStates,
    seeds: Sequence[int],
    settings: SamplingConfig,
    *,
    given_ids: Tensor | None = None,
    given_mask: Tensor | None = None,
) -> Tensor:
    """Draw one image a text.

    Args:
        model: the generator.
        texts: B texts; for results that do not depend on the other prompts, encode each by itself.
        seeds: B seeds.
        settings: how to draw.
        given_ids: (B, N) or (N,) ids to keep where `given_mask`, same shape, is True; the rest is drawn.

    Returns:
        (B, N) int64 on the device of the generator.
    """
    *_, last = stream(model, texts, seeds, settings, given_ids=given_ids, given_mask=given_mask)
    return last.ids


@torch.inference_mode()
def stream(
    model: GeneratorModel,
    texts: TokenStates,
    seeds: Sequence[int],
    settings: SamplingConfig,
    *,
    given_ids: Tensor | None = None,
    given_mask: Tensor | None = None,
    every_rows: int | None = None,
) -> Iterator[Partial]:
    """Like `sample`, but yield the images so far after every `every_rows` grid rows (None: whole images).

    Nothing is checked or computed before the first iteration. Micro-batches come one after the other; stop
    iterating to cancel.
    """
    if len(seeds) != len(texts.mask) or not seeds:
        raise ValueError(f"got {len(texts.mask)} texts and {len(seeds)} seeds, expected one seed a text")
    if every_rows is not None and every_rows < 1:
        raise ValueError(f"every_rows is {every_rows}, expected 1 or more, or None for whole images")
    if model.training:
        raise ValueError(
            "the generator is in training mode, where dropout disturbs every draw; call model.eval()"
        )
    ids, known = _given(model, len(seeds), given_ids, given_mask)
    rows = settings.micro_batch * settings.branches
    decoder = Decoder(model, rows, settings.precision, settings.draft_tokens, compiled=settings.compile)
    plainly = settings.draft_tokens == 1 and not settings.compile
    draw = draw_rows if plainly else draw_speculatively
    for images in torch.arange(len(seeds)).split(settings.micro_batch):
        padded = torch.cat([images, images[:1].expand(settings.micro_batch - len(images))])
        decoder.read(_branches(texts, padded, settings))
        drawn, kept = ids[padded], known[padded]
        for row in draw(decoder, [int(seeds[i]) for i in padded], settings, drawn, kept):
            done = (row + 1) * model.config.grid_size[1]
            ids[images, :done], known[images, :done] = drawn[: len(images), :done], True
            if done == model.config.num_tokens or (every_rows is not None and (row + 1) % every_rows == 0):
                yield Partial(ids.clone(), known.clone())


def _branches(texts: TokenStates, images: Tensor, settings: SamplingConfig) -> TokenStates:
    """The texts of a micro-batch and, with guidance, as many null texts."""
    states, mask = texts.states[images], texts.mask[images]
    if settings.branches == 1:
        return TokenStates(states, mask)
    return TokenStates(
        torch.cat([states, torch.zeros_like(states)]), torch.cat([mask, torch.zeros_like(mask)])
    )


def _given(
    model: GeneratorModel, images: int, ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B, N) ids and mask of what is given, checked; nothing by default."""
    config, device, shape = model.config, model.start.device, (images, model.config.num_tokens)
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
            "give ids of the tokenizer that the generator was trained with"
        )
    return kept, known
