"""One token after the other, with a preallocated key-value cache.

A step computes what `Block` computes in fewer operations, which at this size cost as much as the arithmetic:
norms have no weights, so their constant factors go into the matrices behind them; one complex product turns
queries and keys.

Legend: R rows, W positions of a window, T text slots, S positions in all, D model width, K codes, h heads,
d head width.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tavq.data.text_encoder import TokenStates

from .attention import attend
from .linear import Precision, prepared_linear
from .model import Block, GeneratorModel


class Decoder:
    """A generator ready to decode a fixed number of rows; all memory is taken here.

    Args:
        model: in float32; later changes of its weights are not seen.
        rows: R.
        precision: of the weights in `step` and `window`; texts are read in float32.
        width: W of `window`.
        compiled: compile `window` when it is first called.
    """

    def __init__(
        self,
        model: GeneratorModel,
        rows: int,
        precision: Precision = "float32",
        width: int = 1,
        *,
        compiled: bool = False,
    ):
        config, device = model.config, model.start.device
        self.model, self.dtype = model, torch.bfloat16 if precision == "bfloat16" else torch.float32
        head_width, slots = config.width // config.num_heads, config.length + width
        shape = (config.num_layers, 2, rows, config.num_heads, slots, head_width)  # a head's keys in a row
        self.cache = torch.zeros(shape, device=device, dtype=self.dtype).transpose(3, 4)
        self.bias = torch.zeros(rows, 1, slots, device=device, dtype=self.dtype)
        self.rows, self.columns, self.slots = (torch.arange(n, device=device) for n in (rows, width, slots))
        self.start, self.tokens, self.places = (
            weights.detach().to(self.dtype) for weights in (model.start, model.tokens.weight, model.places)
        )
        self.turns = torch.view_as_complex(model.turns) * head_width**0.5
        self.layers = [
            Layer(block, cache, precision, width, plain=compiled)
            for block, cache in zip(model.blocks, self.cache, strict=True)
        ]
        head = model.head.weight.detach() * config.width**0.5
        self.head = prepared_linear(head, rows * width, precision, plain=compiled)
        if compiled:
            self.window = torch.compile(self.window, dynamic=False)

    def read(self, texts: TokenStates) -> None:
        """Fill the cache with the texts of all R rows, each by itself, so that no other text matters."""
        model, device = self.model, self.model.start.device
        embedded, seen = model.prefix(texts.states.to(device), texts.mask.to(device))
        bias_R1S = model.key_bias(seen)
        self.bias[..., : bias_R1S.shape[-1]] = bias_R1S
        lengths = (seen * torch.arange(1, seen.shape[1] + 1, device=device)).amax(1).tolist()
        for row, length in enumerate(lengths):
            x, bias = embedded[row : row + 1, :length], bias_R1S[row : row + 1, :, :length]
            for block, cache in zip(model.blocks, self.cache[:, :, row : row + 1], strict=True):
                x = block(x, model.turns[:length], bias, cache)

    def step(self, ids_R: Tensor | None, position: int) -> Tensor:
        """Logits (R, K) of the token at `position`, given `ids_R` at the one before (None at the first)."""
        before = self.start.expand(len(self.bias), -1) if ids_R is None else F.embedding(ids_R, self.tokens)
        x, at = before + self.places[position], self.model.config.max_text_tokens + position
        turn, bias = self.turns[at], self.bias[..., : at + 1]
        for layer in self.layers:
            x = layer(x, turn, bias, (slice(None), slice(at, at + 1)), slice(at + 1))
        return self.head(unit(x)).float()

    def window(self, ids_RW: Tensor, first_R: Tensor) -> Tensor:
        """Logits (R, W, K) of the tokens at `first_R` and the W - 1 after it, given the ones before each.

        Args:
            ids_RW: the ids at the positions from `first_R - 1` on.
            first_R: positions, of each row its own; those past the last one compute nothing of use.
        """
        position_RW = first_R[:, None] + self.columns
        at_RW = self.model.config.max_text_tokens + position_RW
        place_RW = position_RW.clamp_max(len(self.places) - 1)
        before = torch.where(position_RW[..., None] == 0, self.start, F.embedding(ids_RW, self.tokens))
        x = (before + self.places[place_RW]).flatten(0, 1)
        turn = self.turns[self.model.config.max_text_tokens + place_RW][:, :, None, None]
        bias = self.bias.masked_fill(self.slots > at_RW[..., None], -math.inf)
        for layer in self.layers:
            x = layer(x, turn, bias, (self.rows[:, None], at_RW), slice(None))
        return self.head(unit(x)).float().view(*ids_RW.shape, -1)


class Layer:
    """A block of the generator, one window of positions at a time."""

    def __init__(
        self, block: Block, cache_2RShd: Tensor, precision: Precision, width: int, *, plain: bool = False
    ):
        self.keys, self.values = cache_2RShd
        self.attention, gain = block.attention, block.qkv.in_features**0.5
        rows = len(self.keys) * width
        prepared = functools.partial(prepared_linear, rows=rows, precision=precision, plain=plain)
        self.qkv, self.out = prepared(block.qkv.weight.detach() * gain), prepared(block.out.weight.detach())
        self.gate_up = prepared(block.gate_up.weight.detach() * gain)
        self.down = prepared(block.down.weight.detach())

    def __call__(self, x: Tensor, turn: Tensor, bias_RWS: Tensor, write: tuple, seen: slice) -> Tensor:
        """Pass (R * W, D) through; keys and values go to the slots `write`, queries see the slots `seen`."""
        rows, _, heads, width = self.keys.shape
        qkv = self.qkv(unit(x)).view(rows, -1, 3, heads, width)
        turned = torch.view_as_complex(unit(qkv[:, :, :2].float()).unflatten(-1, (-1, 2))) * turn
        q, k = torch.view_as_real(turned).flatten(-2).unbind(2)
        self.keys[write], self.values[write] = k.to(x.dtype), qkv[:, :, 2]
        attended = attend(q.to(x.dtype), self.keys[:, seen], self.values[:, seen], bias_RWS, self.attention)
        x = self.out(attended.reshape(x.shape)).add_(x)
        gate, up = self.gate_up(unit(x)).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up)).add_(x)


def unit(x: Tensor) -> Tensor:
    """Scale the last dimension to length 1."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
