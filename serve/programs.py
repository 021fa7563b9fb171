"""Models as programs of `torch.export`, for servers that do not know this project.

`tavq export --format pt2` writes them. Each takes a batch of any size. `torch.export.load(path).module()`
runs one in Python.

Shapes: B images, T text tokens, M text width, N = h*w image tokens, K codes, n blocks, L slots, G heads, d
width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tavq.base.files import atomic_write
from tavq.generator.model import Block, GeneratorModel, rms_norm
from tavq.tokenizer.blocks import to_map
from tavq.tokenizer.model import TAVQTokenizer

MAX_BATCH = 1024


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> ids (B, h, w) int64."""

    def __init__(self, tokenizer: TAVQTokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer._ids(self.tokenizer.encoder(images)[-1])


class Decoder(nn.Module):
    """ids (B, h, w) int64 -> images (B, 3, H, W) in [-1, 1]. Ids outside the codebook are not refused."""

    def __init__(self, tokenizer: TAVQTokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, ids: Tensor) -> Tensor:
        codes = self.tokenizer.quantizer.lookup(ids.flatten(1))
        return self.tokenizer.decoder(to_map(codes, self.tokenizer.grid_size)).clamp(-1, 1)


class Prefill(nn.Module):
    """Token states of texts (B, T, M) and their mask (B, T) -> keys, values (n, B, L, G, d), seen (B, T).

    A mask of False alone is the null text, of which classifier-free guidance needs the logits, too.
    """

    def __init__(self, generator: GeneratorModel):
        super().__init__()
        self.generator = generator

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = self.generator
        num_text = model.config.max_text_tokens
        x, seen = model.embed_text(states, mask)
        bias = model.padding_bias(seen)[:, :, :num_text]

        heads = model.config.num_heads
        shape = (mask.shape[0], model.config.sequence_length, heads, model.config.width // heads)
        caches = []
        for block in model.blocks:
            cache = (x.new_zeros(shape), x.new_zeros(shape))
            x = block(x, model.rope_cache[:num_text], bias, cache)
            caches.append(cache)
        keys, values = (torch.stack(parts) for parts in zip(*caches, strict=True))
        return keys, values, seen


class Step(nn.Module):
    """Compute the logits (B, K) of one token, and the keys and values with it.

    Takes the token before it (B,), its position (1,) from 0 to N - 1, keys, values and seen. At position 0
    the token before it does not matter.
    """

    def __init__(self, generator: GeneratorModel):
        super().__init__()
        self.generator = generator

    def forward(
        self, previous: Tensor, position: Tensor, keys: Tensor, values: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        model = self.generator
        slot = position + model.config.max_text_tokens
        later = torch.arange(model.config.sequence_length, device=seen.device) > slot
        bias = model.padding_bias(seen).masked_fill(later, -math.inf)

        token = torch.where(position == 0, model.bos_embedding, model.token_embedding(previous))
        x = (token + model.position_embedding[position])[:, None]
        rope = model.rope_cache[slot]
        grown = []
        for number, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            x, *cache = block.step(x, rope, bias, keys[number], values[number], slot)
            grown.append(cache)
        keys, values = (torch.stack(parts) for parts in zip(*grown, strict=True))
        return model.head(rms_norm(x[:, 0])).float(), keys, values


def programs(model: TAVQTokenizer | GeneratorModel) -> Iterator[tuple[str, torch.export.ExportedProgram]]:
    """Yield the programs of a model and their names: encoder and decoder, or prefill and step."""
    model = model.eval()
    if isinstance(model, TAVQTokenizer):
        size = model.image_size_px
        yield "encoder", _exported(Encoder(model), (torch.zeros(2, 3, size, size),), (0,))
        yield (
            "decoder",
            _exported(Decoder(model), (torch.zeros(2, *model.grid_size, dtype=torch.int64),), (0,)),
        )
        return
    config = model.config
    states = torch.zeros(2, config.max_text_tokens, config.text_dim)
    mask = torch.ones(2, config.max_text_tokens, dtype=torch.bool)
    prefill = Prefill(model)
    yield "prefill", _exported(prefill, (states, mask), (0, 0))
    with torch.no_grad():
        keys, values, seen = prefill(states, mask)
    previous = torch.zeros(2, dtype=torch.int64)
    arguments = (previous, torch.ones(1, dtype=torch.int64), keys, values, seen)
    yield "step", _exported(Step(model), arguments, (0, None, 1, 1, 0))


def write_programs(model: TAVQTokenizer | GeneratorModel, out: Path) -> list[Path]:
    """Write the programs of a model as OUT/NAME.pt2, and return the files."""
    paths = []
    for name, program in programs(model):
        paths.append(out / f"{name}.pt2")
        with atomic_write(paths[-1]) as aside, aside.open("wb") as file:
            torch.export.save(program, file)
    return paths


def _exported(
    module: nn.Module, arguments: tuple[Tensor, ...], batch_dimension: tuple[int | None, ...]
) -> torch.export.ExportedProgram:
    """Export a module whose arguments have their batch in these dimensions; None is an argument without."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes = tuple({} if dimension is None else {dimension: batch} for dimension in batch_dimension)
    with torch.no_grad():
        return torch.export.export(module, arguments, dynamic_shapes=shapes)
