"""Images of many clients decoded together, each as if it were alone.

An image depends on its prompt, its seed and the settings, never on its company. Two things keep it so: only
orders of equal settings share a batch, and a batch has a size at which the kernels of this machine round as
they do for a single image. `batch_sizes` measures which sizes these are; where some do not agree, every batch
is padded to the largest.

Shapes: B images, N image tokens, K codes.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tavq.data.text_encoder import TokenStates
from tavq.generator.config import Precision
from tavq.generator.engine import Engine
from tavq.generator.model import GeneratorModel
from tavq.pipeline import Generated, Pipeline

from .orders import Drawn, Order

Sizes = Mapping[bool, Sequence[int]]
"""With guidance (True) and without (False): sizes of batches whose images equal one another."""
PROBE_SCALE = 7.0
"""Guidance while the sizes are measured."""
PROBED_POSITIONS = 24
"""Positions, spread over the image, whose logits are compared."""


def draw(pipeline: Pipeline, orders: Sequence[Order], sizes: Sizes) -> list[Drawn]:
    """Generate the images of all orders; orders of equal settings are decoded together.

    Args:
        pipeline: does the work.
        orders: in any mixture.
        sizes: what `batch_sizes` returned.
    """
    drawn: list[Drawn | None] = [None] * len(orders)
    for places in groups(orders):
        group = [orders[place] for place in places]
        first = group[0]
        allowed = sizes_of(first, sizes)
        size = size_for(len(group) * first.best_of, allowed)
        images = pipeline.generate_each(
            [order.prompt for order in group],
            [order.seed for order in group],
            dataclasses.replace(first.settings, micro_batch=size),
            negative_prompt=[order.negative_prompt for order in group],
            best_of=first.best_of,
            rank_by=first.rank_by,
        )
        for place, image in zip(places, images, strict=True):
            drawn[place] = _drawn(image, allowed, batch=len(group), rows=len(image.ids))
    return [image for image in drawn if image is not None]


def draw_in_steps(pipeline: Pipeline, orders: Sequence[Order], sizes: Sizes) -> Iterator[list[Drawn | None]]:
    """Like `draw`, but yield previews: at each step one for some of the orders, and None for the others.

    Candidates are not ranked: `best_of` is 1.
    """
    num_rows = pipeline.tokenizer.grid_size[0]
    for places in groups(orders):
        group = [orders[place] for place in places]
        first = group[0]
        allowed = sizes_of(first, sizes)
        steps = pipeline.stream_together(
            [order.prompt for order in group],
            [order.seed for order in group],
            dataclasses.replace(first.settings, micro_batch=size_for(len(group), allowed)),
            [order.negative_prompt for order in group],
            every_rows=first.every_rows,
        )
        for step, images in enumerate(steps, start=1):
            shown: list[Drawn | None] = [None] * len(orders)
            rows = min(step * first.every_rows, num_rows)
            for place, image in zip(places, images, strict=True):
                shown[place] = _drawn(image, allowed, batch=len(group), rows=rows)
            yield shown


def groups(orders: Sequence[Order]) -> list[list[int]]:
    """Return the places of the orders that may be decoded together: those of equal settings."""
    found: dict[tuple, list[int]] = {}
    for place, order in enumerate(orders):
        key = (order.settings, order.best_of, order.rank_by, order.every_rows)
        found.setdefault(key, []).append(place)
    return list(found.values())


def sizes_of(order: Order, sizes: Sizes) -> Sequence[int]:
    """Return the sizes for an order's settings."""
    return sizes[order.settings.guidance_scale != 1]


def size_for(images: int, sizes: Sequence[int]) -> int:
    """Return the smallest size that holds so many images, or the largest, of which several are needed."""
    return next((size for size in sizes if size >= images), sizes[-1])


def _drawn(image: Generated, sizes: Sequence[int], *, batch: int, rows: int) -> Drawn:
    # The size of the batch does not change the image, so the recipe names one size, whatever the company.
    settings = image.recipe["settings"] | {"micro_batch": sizes[0]}
    image = dataclasses.replace(image, recipe=image.recipe | {"settings": settings})
    file = io.BytesIO()
    image.image.save(file, format="PNG", pnginfo=image.png_fields())
    return Drawn(file.getvalue(), rows, image.ids.tolist(), image.recipe, batch)


@torch.inference_mode()
def batch_sizes(model: GeneratorModel, precision: Precision, largest: int) -> Sizes:
    """Measure which batch sizes give the same logits as the largest, bit for bit, on this machine.

    A kernel that sums in another order changes the last digits of nearly all logits, so a few positions of
    random tokens show it.

    Args:
        model: in eval mode.
        precision: of decoding.
        largest: size of the largest batch.

    Returns:
        With guidance (True) and without (False): rising sizes, `largest` the last.
    """
    sizes = [size for size in (2**power for power in range(20)) if size < largest]
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(largest, model.config.max_text_tokens, model.config.text_dim, generator=rng)
    texts = TokenStates(states, torch.ones(states.shape[:2], dtype=torch.bool))
    ids_BN = torch.randint(model.config.num_codes, (largest, model.config.num_tokens), generator=rng)

    agreeing: dict[bool, list[int]] = {}
    for guided in (True, False):
        full_BPK = _logits(model, texts, ids_BN, precision, guided=guided)
        agreeing[guided] = []
        for size in sizes:
            # Rows of the middle, which take other places in the small batch than in the large one.
            rows = torch.arange(size) + (largest - size) // 2
            logits_BPK = _logits(model, texts.rows(rows), ids_BN[rows], precision, guided=guided)
            if torch.equal(logits_BPK, full_BPK[rows]):
                agreeing[guided].append(size)
        agreeing[guided].append(largest)
    return agreeing


def _logits(
    model: GeneratorModel, texts: TokenStates, ids_BN: Tensor, precision: Precision, *, guided: bool
) -> Tensor:
    """Compute the logits (B, P, K) of given tokens at P positions, as decoding does."""
    num_tokens = model.config.num_tokens
    scales = torch.full((num_tokens,), PROBE_SCALE) if guided else None
    engine = Engine(model, len(ids_BN), precision, guidance_scale_N=scales)
    engine.prefill(texts)

    ids_BN = ids_BN.to(engine.device)
    steps = []
    for position in range(0, num_tokens, max(1, num_tokens // PROBED_POSITIONS)):
        previous_B = ids_BN[:, position - 1] if position else None
        steps.append(engine.decode_one_token(previous_B, position).cpu())
    return torch.stack(steps, dim=1)
