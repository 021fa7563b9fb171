"""The engine: decode image ids with a KV cache, one token per forward pass or several.

`Engine` is a `GeneratorModel` laid out for decoding. `prefill` fills the KV cache with the texts,
`decode_one_token` computes the logits of one token, `decode_window` those of several drafted tokens at once.

Speculative decoding lives here: `speculative_decode` drafts J tokens ahead and verifies them in one pass of
`decode_window` (speculative Jacobi decoding, after Teng et al. 2024, arXiv:2410.01699; there is no second
model). It is exact. The Gumbel noise of every position is fixed beforehand, so a token is a function of its
logits, argmax(logits + noise), and its logits are a function of the tokens before it. A drafted token thus
stands if all drafts before it stand and argmax(logits + noise), computed anew, is still that token. The ids
are those of `autoregressive_decode` at every temperature, up to the rounding of kernels.

This module computes logits and decides which tokens are final. How logits become ids is decided by the
`SampleTokens` that is handed in (see `sampling.py`).

Shapes: B images decoded together, R rows of a forward pass (B, or 2B with classifier-free guidance), J tokens
of a window, K codes, N = h*w image tokens, T text tokens, L sequence length, D model width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tavq.data.text_encoder import TokenStates

from .attention import attend
from .config import Precision
from .linear import prepared_linear
from .model import Block, GeneratorConfig, GeneratorModel

SampleTokens = Callable[[Tensor, int | Tensor], Tensor]
"""Logits (B, K) of one position, or (B, J, K) of positions (B, J), and the position(s) -> ids (B,) or (B, J).

It must be a function of its arguments alone: speculative decoding asks it again for the same position.
"""


class Engine:
    """A generator ready to decode a fixed number of images; all memory is allocated here.

    Args:
        model: in float32; later changes of its weights are not seen.
        batch_size: images decoded together (B).
        precision: of the weights while decoding; `prefill` always computes in float32.
        window: tokens of a `decode_window` (J).
        guidance_scale_N: (N,) scale of classifier-free guidance at each position. None decodes without, at
            half the cost.
        compiled: compile `decode_window` when it is first called.
    """

    def __init__(
        self,
        model: GeneratorModel,
        batch_size: int,
        precision: Precision = "float32",
        *,
        window: int = 1,
        guidance_scale_N: Tensor | None = None,
        compiled: bool = False,
    ):
        config = model.config
        self.model = model
        self.config = config
        self.device = model.bos_embedding.device
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.window = window
        self.guidance_scale_N = None if guidance_scale_N is None else guidance_scale_N.to(self.device)
        self.cfg_branches = 1 if guidance_scale_N is None else 2
        self.rows = batch_size * self.cfg_branches

        # A window may begin at the last token and then runs past the end of the sequence.
        num_slots = config.sequence_length + window
        self.attention_bias = torch.zeros(self.rows, 1, num_slots, device=self.device, dtype=self.dtype)
        self.kv_caches = [
            KVCache(config, self.rows, num_slots, self.dtype, self.device) for _ in range(config.num_layers)
        ]

        self.row_R1 = torch.arange(self.rows, device=self.device)[:, None]
        self.offset_J = torch.arange(window, device=self.device)
        self.slot_L = torch.arange(num_slots, device=self.device)

        self.bos_embedding = model.bos_embedding.detach().to(self.dtype)
        self.token_embedding = model.token_embedding.weight.detach().to(self.dtype)
        self.position_embedding = model.position_embedding.detach().to(self.dtype)
        # Complex, so that one product rotates a pair. The factor makes an RMSNorm of l2_normalize.
        head_width = config.width // config.num_heads
        self.rope_cache = torch.view_as_complex(model.rope_cache) * head_width**0.5

        # Layers that are laid out for the number of inputs they get in one pass.
        num_inputs = self.rows * window
        self.blocks = []
        for block, kv_cache in zip(model.blocks, self.kv_caches, strict=True):
            assert isinstance(block, Block)
            self.blocks.append(DecodeBlock(block, kv_cache, num_inputs, precision, compiled=compiled))
        head_weight = model.head.weight.detach() * config.width**0.5
        self.head = prepared_linear(head_weight, num_inputs, precision, compiled=compiled)

        self._forward_window = self._window_logits
        if compiled:
            self._forward_window = torch.compile(self._window_logits, dynamic=False)

    def prefill(self, texts: TokenStates, negative: TokenStates | None = None) -> None:
        """Fill the KV cache with B texts and, with guidance, as many others; the next token is the first.

        Each text goes through alone, so that no other prompt matters, and at its own length, to save time.

        Args:
            texts: B texts.
            negative: B texts that guidance leads away from; None takes the learned null text.
        """
        states = texts.states.to(self.device)
        mask = texts.mask.to(self.device)
        if self.cfg_branches == 2:
            if negative is None:
                negative = TokenStates(torch.zeros_like(states), torch.zeros_like(mask))
            states = torch.cat([states, negative.states.to(self.device)])
            mask = torch.cat([mask, negative.mask.to(self.device)])

        text_RTD, seen_RT = self.model.embed_text(states, mask)
        bias_R1L = self.model.padding_bias(seen_RT)
        self.attention_bias[..., : bias_R1L.shape[-1]] = bias_R1L

        slot_number_T = torch.arange(1, seen_RT.shape[1] + 1, device=self.device)
        lengths = (seen_RT * slot_number_T).amax(1).tolist()
        for row, length in enumerate(lengths):
            x = text_RTD[row : row + 1, :length]
            bias = bias_R1L[row : row + 1, :, :length]
            for block, kv_cache in zip(self.model.blocks, self.kv_caches, strict=True):
                x = block(x, self.model.rope_cache[:length], bias, kv_cache.row(row))

    def decode_one_token(self, ids_B: Tensor | None, position: int) -> Tensor:
        """Compute the guided logits (B, K) of the token at `position`.

        Args:
            ids_B: ids of the tokens before it; None at position 0.
            position: in raster order; all positions before it have been decoded.
        """
        if ids_B is None:
            previous_RD = self.bos_embedding.expand(self.rows, -1)
        else:
            previous_RD = F.embedding(ids_B.repeat(self.cfg_branches), self.token_embedding)
        x_RD = previous_RD + self.position_embedding[position]

        slot = self.config.max_text_tokens + position
        rope = self.rope_cache[slot]
        seen = slice(slot + 1)
        bias_R1L = self.attention_bias[..., seen]
        for block in self.blocks:
            x_RD = block(x_RD, rope, bias_R1L, (slice(None), slice(slot, slot + 1)), seen)

        logits_RK = self.head(l2_normalize(x_RD)).float()
        if self.guidance_scale_N is None:
            return logits_RK
        return apply_cfg(logits_RK, self.guidance_scale_N[position])

    def decode_window(self, ids_BJ: Tensor, first_B: Tensor) -> Tensor:
        """Compute the guided logits (B, J, K) of the tokens at `first_B` and the J - 1 after it.

        Keys and values of the window overwrite those of an earlier window at the same positions, so that
        rejected drafts need no clearing.

        Args:
            ids_BJ: ids of the token before each of these; drafts, but for the first.
            first_B: first position of each image's window. Logits of positions past the end mean nothing.
        """
        ids_RJ = ids_BJ.repeat(self.cfg_branches, 1)
        first_R = first_B.repeat(self.cfg_branches)
        logits_RJK = self._forward_window(ids_RJ, first_R)
        if self.guidance_scale_N is None:
            return logits_RJK
        position_BJ = (first_B[:, None] + self.offset_J).clamp_max(self.config.num_tokens - 1)
        return apply_cfg(logits_RJK, self.guidance_scale_N[position_BJ][..., None])

    def _window_logits(self, ids_RJ: Tensor, first_R: Tensor) -> Tensor:
        position_RJ = first_R[:, None] + self.offset_J
        slot_RJ = self.config.max_text_tokens + position_RJ
        # Positions past the end write to the spare slots, but have no embedding and no rotation.
        known_position_RJ = position_RJ.clamp_max(self.config.num_tokens - 1)

        token_RJD = F.embedding(ids_RJ, self.token_embedding)
        previous_RJD = torch.where(position_RJ[..., None] == 0, self.bos_embedding, token_RJD)
        x = (previous_RJD + self.position_embedding[known_position_RJ]).flatten(0, 1)

        rope = self.rope_cache[self.config.max_text_tokens + known_position_RJ][:, :, None, None]
        bias_RJL = self.attention_bias.masked_fill(self.slot_L > slot_RJ[..., None], -math.inf)
        for block in self.blocks:
            x = block(x, rope, bias_RJL, (self.row_R1, slot_RJ), slice(None))

        return self.head(l2_normalize(x)).float().view(*ids_RJ.shape, -1)


class KVCache:
    """Keys and values of one attention layer, for a fixed number of rows and slots.

    Attributes:
        keys: (R, L, heads, d).
        values: likewise.
    """

    def __init__(
        self, config: GeneratorConfig, rows: int, num_slots: int, dtype: torch.dtype, device: torch.device
    ):
        # Stored head by head: attention reads the keys of one head, which then lie side by side.
        shape = (rows, config.num_heads, num_slots, config.width // config.num_heads)
        self.keys = torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2)
        self.values = torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2)

    def row(self, row: int) -> tuple[Tensor, Tensor]:
        """Return keys and values (1, L, heads, d) of one row, to write to."""
        return self.keys[row : row + 1], self.values[row : row + 1]

    def update(self, rows_and_slots: tuple, keys: Tensor, values: Tensor) -> None:
        """Write keys and values of some slots, given as an index of the first two dimensions."""
        self.keys[rows_and_slots] = keys
        self.values[rows_and_slots] = values


class DecodeBlock:
    """A `Block` with its KV cache, computed in fewer operations.

    At this size the call of an operation costs as much as its arithmetic. The norms have no weights, so
    l2_normalize takes their place, and the factor between the two goes into the matrices behind them. Queries
    and keys are normalised and rotated together.
    """

    def __init__(
        self, block: Block, kv_cache: KVCache, num_inputs: int, precision: Precision, *, compiled: bool
    ):
        self.kv_cache = kv_cache
        self.attention = block.attention
        self.num_heads = block.num_heads

        prepare = functools.partial(prepared_linear, rows=num_inputs, precision=precision, compiled=compiled)
        rms_factor = block.qkv_proj.in_features**0.5
        self.qkv_proj = prepare(block.qkv_proj.weight.detach() * rms_factor)
        self.o_proj = prepare(block.o_proj.weight.detach())
        self.gate_up_proj = prepare(block.gate_up_proj.weight.detach() * rms_factor)
        self.down_proj = prepare(block.down_proj.weight.detach())

    def __call__(self, x: Tensor, rope: Tensor, bias: Tensor, slots: tuple, seen: slice) -> Tensor:
        """Pass one or J tokens of every row through.

        Args:
            x: (R * J, D) residual stream.
            rope: complex rotations, (d/2) for all or (R, J, 1, 1, d/2).
            bias: additive attention bias, (R, 1 or J, seen slots).
            slots: rows and slots of the KV cache that these tokens take.
            seen: slots of the KV cache to attend to.
        """
        rows = len(self.kv_cache.keys)
        qkv = self.qkv_proj(l2_normalize(x)).view(rows, -1, 3, self.num_heads, x.shape[1] // self.num_heads)
        qk = l2_normalize(qkv[:, :, :2].float())
        rotated = torch.view_as_complex(qk.unflatten(-1, (-1, 2))) * rope
        q, k = torch.view_as_real(rotated).flatten(-2).to(x.dtype).unbind(2)

        self.kv_cache.update(slots, k, qkv[:, :, 2])
        keys, values = self.kv_cache.keys[:, seen], self.kv_cache.values[:, seen]
        attended = attend(q, keys, values, bias, self.attention)

        # In place, as an allocation costs as much as the sum.
        x = self.o_proj(attended.reshape(x.shape)).add_(x)
        gate, up = self.gate_up_proj(l2_normalize(x)).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate).mul_(up)).add_(x)


def autoregressive_decode(
    engine: Engine, sample_tokens: SampleTokens, ids_BN: Tensor, known_BN: Tensor
) -> Iterator[int]:
    """Decode one token per forward pass; yield the number of each grid row when it is done.

    Args:
        engine: prefilled.
        sample_tokens: turns logits into ids.
        ids_BN: overwritten in place, but where they are known.
        known_BN: bool.
    """
    h, w = engine.config.grid_size
    ids_B = None
    for row in range(h):
        for position in range(row * w, (row + 1) * w):
            logits_BK = engine.decode_one_token(ids_B, position)
            sampled_B = sample_tokens(logits_BK, position)
            ids_B = torch.where(known_BN[:, position], ids_BN[:, position], sampled_B)
            ids_BN[:, position] = ids_B
        yield row


def speculative_decode(
    engine: Engine, sample_tokens: SampleTokens, ids_BN: Tensor, known_BN: Tensor
) -> Iterator[int]:
    """Decode like `autoregressive_decode`, with the same ids, several tokens per forward pass.

    The module's docstring says why this is exact. Arguments and results are those of `autoregressive_decode`.
    """
    h, w = engine.config.grid_size
    num_tokens = engine.config.num_tokens
    window = engine.window
    # An image that is finished early goes on past its end until the others are done.
    draft_BN = F.pad(ids_BN, (0, 2 * window))
    known_BN = F.pad(known_BN, (0, 2 * window))
    image_B1 = torch.arange(len(ids_BN), device=ids_BN.device)[:, None]
    num_decoded_B = torch.zeros_like(ids_BN[:, 0])

    def sample_unknown(logits_BJK: Tensor, position_BJ: Tensor) -> Tensor:
        sampled_BJ = sample_tokens(logits_BJK, position_BJ)
        return torch.where(known_BN[image_B1, position_BJ], draft_BN[image_B1, position_BJ], sampled_BJ)

    row = 0
    while row < h:
        position_BJ = num_decoded_B[:, None] + engine.offset_J
        previous_BJ = draft_BN[image_B1, (position_BJ - 1).clamp_min(0)]
        logits_BJK = engine.decode_window(previous_BJ, num_decoded_B)
        sampled_BJ = sample_unknown(logits_BJK, position_BJ)

        # The first token of a window has only right ones before it, so it is right. Each next one is right if
        # every draft before it was sampled as it stood.
        stands_BJ = (sampled_BJ == draft_BN[image_B1, position_BJ])[:, :-1].cumprod(1)
        num_right_B = 1 + stands_BJ.sum(1)

        # What was sampled replaces the drafts; behind a wrong draft it is a better guess, no more. The
        # positions behind the window have no logits yet, so its last logits give their first guess.
        draft_BN[image_B1, position_BJ] = sampled_BJ
        draft_BN[image_B1, position_BJ + window] = sample_unknown(logits_BJK[:, -1:], position_BJ + window)

        num_decoded_B = (num_decoded_B + num_right_B).clamp_max(num_tokens)
        while row < h and int(num_decoded_B.min()) >= (row + 1) * w:
            ids_BN.copy_(draft_BN[:, :num_tokens])
            yield row
            row += 1


def apply_cfg(logits_RK: Tensor, scale: Tensor) -> Tensor:
    """Apply classifier-free guidance: uncond + scale * (cond - uncond) (Ho, Salimans 2022,
    arXiv:2207.12598).

    Args:
        logits_RK: (2B, ..., K), first those with the text, then those with the null text.
        scale: scalar, or one that broadcasts to (B, ..., K).
    """
    cond, uncond = logits_RK.chunk(2)
    return torch.lerp(uncond, cond, scale)


def l2_normalize(x: Tensor) -> Tensor:
    """Scale the last dimension to length 1."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
