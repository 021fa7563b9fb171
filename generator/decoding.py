"""One token after the other, with a preallocated key-value cache.

A step computes what `Block` computes in fewer operations, which at this size cost as much as the arithmetic:
norms have no weights, so their constant factors go into the matrices behind them; one complex product turns
queries and keys.

Legend: R rows, T text slots, S positions in all, D model width, K codes, h heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tavq.data.text_encoder import TokenStates

from .attention import attend
from .linear import Precision, prepared_linear
from .model import Block, Prior


class Decoder:
    """A prior ready to decode a fixed number of rows; all memory is taken here.

    Args:
        prior: in float32; later changes of its weights are not seen.
        rows: R.
        precision: of the weights in `step`; texts are read in float32.
    """

    def __init__(self, prior: Prior, rows: int, precision: Precision = "float32"):
        config, device = prior.config, prior.start.device
        self.prior, self.dtype = prior, torch.bfloat16 if precision == "bfloat16" else torch.float32
        head_width = config.width // config.num_heads
        shape = (
            config.num_layers,
            2,
            rows,
            config.num_heads,
            config.length,
            head_width,
        )  # a head's keys in a row
        self.cache = torch.zeros(shape, device=device, dtype=self.dtype).transpose(3, 4)
        self.bias = torch.zeros(rows, 1, config.length, device=device, dtype=self.dtype)
        self.start, self.tokens, self.places = (
            weights.detach().to(self.dtype) for weights in (prior.start, prior.tokens.weight, prior.places)
        )
        self.turns = torch.view_as_complex(prior.turns) * head_width**0.5
        self.layers = [
            Layer(block, cache, precision) for block, cache in zip(prior.blocks, self.cache, strict=True)
        ]
        self.head = prepared_linear(prior.head.weight.detach() * config.width**0.5, rows, precision)

    def read(self, texts: TokenStates) -> None:
        """Fill the cache with the texts of all R rows, each by itself, so that no other text matters."""
        prior, device = self.prior, self.prior.start.device
        embedded, seen = prior.prefix(texts.states.to(device), texts.mask.to(device))
        bias_R1S = prior.key_bias(seen)
        self.bias.copy_(bias_R1S)
        lengths = (seen * torch.arange(1, seen.shape[1] + 1, device=device)).amax(1).tolist()
        for row, length in enumerate(lengths):
            x, bias = embedded[row : row + 1, :length], bias_R1S[row : row + 1, :, :length]
            for block, cache in zip(prior.blocks, self.cache[:, :, row : row + 1], strict=True):
                x = block(x, prior.turns[:length], bias, cache)

    def step(self, ids_R: Tensor | None, position: int) -> Tensor:
        """Logits (R, K) of the token at `position`, given `ids_R` at the one before (None at the first)."""
        before = self.start.expand(len(self.bias), -1) if ids_R is None else F.embedding(ids_R, self.tokens)
        x, at = before + self.places[position], self.prior.config.max_text_tokens + position
        turn, bias = self.turns[at], self.bias[..., : at + 1]
        for layer in self.layers:
            x = layer(x, turn, bias, at)
        return self.head(unit(x)).float()


class Layer:
    """A block of the prior, one position at a time."""

    def __init__(self, block: Block, cache_2RShd: Tensor, precision: Precision):
        self.keys, self.values = cache_2RShd
        self.attention, rows, gain = block.attention, len(self.keys), block.qkv.in_features**0.5
        self.qkv = prepared_linear(block.qkv.weight.detach() * gain, rows, precision)
        self.out = prepared_linear(block.out.weight.detach(), rows, precision)
        self.gate_up = prepared_linear(block.gate_up.weight.detach() * gain, rows, precision)
        self.down = prepared_linear(block.down.weight.detach(), rows, precision)

    def __call__(self, x_RD: Tensor, turn_d: Tensor, bias_R1S: Tensor, at: int) -> Tensor:
        rows, _, heads, width = self.keys.shape
        qkv = self.qkv(unit(x_RD)).view(rows, 3, heads, width)
        turned = torch.view_as_complex(unit(qkv[:, :2].float()).unflatten(-1, (-1, 2))) * turn_d
        q, k = torch.view_as_real(turned).view(rows, 2, heads, width).unbind(1)
        self.keys[:, at], self.values[:, at] = k, qkv[:, 2]
        seen = self.keys[:, : at + 1], self.values[:, : at + 1]
        attended = attend(q[:, None].to(x_RD.dtype), *seen, bias_R1S, self.attention)
        x_RD = self.out(attended.reshape(rows, -1)).add_(x_RD)
        gate, up = self.gate_up(unit(x_RD)).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up)).add_(x_RD)


def unit(x: Tensor) -> Tensor:
    """Scale the last dimension to length 1."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
