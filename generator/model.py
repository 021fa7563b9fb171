"""The generator: a decoder-only transformer that reads a text and predicts image ids in raster order.

A sequence has T text slots, then N image slots. The first image slot holds a start embedding, each other one
the token before it, so that slot T + i predicts token i:

    text_0 ... text_T-1 | BOS     token_0 ... token_N-2
                        | token_0 token_1 ... token_N-1    (predicted)

Shapes: B batch, K codes, E code width, N = h*w image tokens, T text tokens, M text width, L sequence length
(T + N for a whole sequence), D model width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.base.bounds import check_bounds
from tavq.training.checkpoint import Checkpointed
from tavq.training.provenance import TokenProvenance

from .attention import attend
from .config import Attention, GeneratorShape


@dataclasses.dataclass(frozen=True)
class GeneratorConfig(GeneratorShape):
    """Everything that a generator is built from: its shape, its tokens and what it was trained with."""

    num_codes: int = 1024
    """Codes of the tokenizer (K)."""
    grid_size: tuple[int, int] = (8, 8)
    """Height and width of the token grid (h, w)."""
    text_dim: int = 384
    """Width of the text encoder's token states (M)."""
    text_encoder_hash: str = ""
    codebook_hash: str = ""
    """Hash of the codebook of the tokenizer whose ids it learned."""
    provenance: TokenProvenance = TokenProvenance()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, num_codes=(1, 2**24), grid_size=(1, 1024), text_dim=(1, 2**16))

    @classmethod
    def of(cls, shape: GeneratorShape, **known: Any) -> Self:
        """Return the configuration of `shape` with the fields that data and text encoder decide."""
        return cls(**vars(shape), **known)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image (N)."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def sequence_length(self) -> int:
        """Slots of a whole sequence (T + N)."""
        return self.max_text_tokens + self.num_tokens


class GeneratorModel(Checkpointed):
    """Text -> logits of image ids. A text whose mask is False throughout is the learned null text."""

    config_class = GeneratorConfig
    kind = "ta-vq-generator"
    former_kinds = ("prior", "ta-vq-prior")
    renamed_weights: ClassVar[dict[str, str]] = {
        "null_text": "null_embedding",
        "text.": "text_proj.",
        "start": "bos_embedding",
        "tokens.": "token_embedding.",
        "places": "position_embedding",
        ".qkv.": ".qkv_proj.",
        ".out.": ".o_proj.",
        ".gate_up.": ".gate_up_proj.",
        ".down.": ".down_proj.",
    }

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.text_proj = nn.Linear(config.text_dim, config.width)
        self.null_embedding = nn.Parameter(torch.empty(config.width))
        self.bos_embedding = nn.Parameter(torch.empty(config.width))
        self.token_embedding = nn.Embedding(config.num_codes, config.width)
        self.position_embedding = nn.Parameter(torch.empty(config.num_tokens, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = nn.Linear(config.width, config.num_codes, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.rope_cache: Tensor
        self.register_buffer("rope_cache", precompute_rope_cache(config), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, codebook: Tensor | None = None) -> None:
        """Set all weights.

        Args:
            codebook: (K, E) of the tokenizer; the token embeddings then start as its random isometric image.

        Raises:
            ValueError: `codebook` has another number of codes.
        """
        # Residual branches and the head start at zero, so that the first loss is log K.
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.qkv_proj.weight, std=self.config.width**-0.5)
            nn.init.normal_(block.gate_up_proj.weight, std=self.config.width**-0.5)
            nn.init.zeros_(block.o_proj.weight)
            nn.init.zeros_(block.down_proj.weight)
        nn.init.zeros_(self.head.weight)

        nn.init.normal_(self.text_proj.weight, std=self.config.text_dim**-0.5)
        nn.init.zeros_(self.text_proj.bias)
        nn.init.normal_(self.null_embedding)  # as long as a text embedding, which leaves an RMSNorm
        nn.init.normal_(self.bos_embedding, std=0.5)
        nn.init.normal_(self.position_embedding, std=0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.5)

        if codebook is not None:
            self.token_embedding.weight.copy_(self._project_codebook(codebook))

    def _project_codebook(self, codebook_KE: Tensor) -> Tensor:
        """Return token embeddings (K, D) with the angles of the codes and the usual size."""
        if codebook_KE.shape[0] != self.config.num_codes:
            raise ValueError(
                f"the codebook has {codebook_KE.shape[0]} codes, the generator {self.config.num_codes}; "
                "give the tokenizer that made the tokens"
            )
        basis_DE = nn.init.orthogonal_(torch.empty(self.config.width, codebook_KE.shape[1]))
        embedding_KD = codebook_KE.float().cpu() @ basis_DE.T
        return embedding_KD * (0.5 / embedding_KD.square().mean().sqrt())

    def forward(
        self, ids_BN: Tensor, states_BTM: Tensor, mask_BT: Tensor, order_BN: Tensor | None = None
    ) -> Tensor:
        """Predict every token from the text and the tokens before it.

        Args:
            ids_BN: (B, N) int64 in raster order.
            states_BTM: (B, T, M) token states of the text encoder.
            mask_BT: (B, T) bool; a row of False alone means the null text.
            order_BN: (B, N) int64, for each image the places in the order in which they are predicted; None
                is raster order.

        Returns:
            (B, N, K) logits in float32, those of place i at index i whatever the order.
        """
        text_BTD, seen_BT = self.embed_text(states_BTM, mask_BT)
        place_BN = torch.arange(self.config.num_tokens, device=ids_BN.device)[None]
        if order_BN is not None:
            place_BN = order_BN

        # Shift right: each slot holds the token before the one that it predicts, and knows both places: the
        # one that it predicts by its embedding, that of the token that it holds by its rotation.
        bos_B1D = self.bos_embedding.expand(len(ids_BN), 1, -1)
        token_BND = self.token_embedding(ids_BN.gather(1, place_BN.expand_as(ids_BN))[:, :-1])
        image_BND = torch.cat([bos_B1D, token_BND], 1) + self.position_embedding[place_BN]

        x_BLD = self.dropout(torch.cat([text_BTD, image_BND], 1))
        bias_BLL = self._prefix_causal_bias(seen_BT)
        rope = self._rope_of(place_BN) if order_BN is not None else self.rope_cache[: x_BLD.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD, rope, bias_BLL)

        logits_BNK = self.head(rms_norm(x_BLD[:, self.config.max_text_tokens :])).float()
        if order_BN is None:
            return logits_BNK
        return logits_BNK.gather(1, order_BN.argsort(1)[..., None].expand_as(logits_BNK))

    def _rope_of(self, place_BN: Tensor) -> Tensor:
        """Return the rotations (B, L, d/2, 2) of all slots, where images have orders of their own."""
        num_fixed = self.config.max_text_tokens + 1  # the text's slots and the first image slot
        fixed = self.rope_cache[:num_fixed].expand(len(place_BN), -1, -1, -1)
        return torch.cat([fixed, self.rope_cache[num_fixed + place_BN[:, :-1]]], 1)

    def embed_text(self, states_BTM: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Embed texts, the null text among them.

        Returns:
            (B, T, D) embeddings of the text slots, and (B, T) bool, which of them may be seen.

        Raises:
            ValueError: the states have another length or width.
        """
        expected = (self.config.max_text_tokens, self.config.text_dim)
        if tuple(states_BTM.shape[1:]) != expected:
            raise ValueError(
                f"text states are {tuple(states_BTM.shape[1:])}, expected {expected} (tokens, width); "
                f"encode with max_tokens={expected[0]} by {self.config.text_encoder!r}"
            )
        text_BTD = rms_norm(self.text_proj(states_BTM.to(self.text_proj.weight.dtype)))

        # The null text is one learned vector in the first slot, and nothing else is seen.
        null_B = ~mask_BT.any(1)
        first_BD = torch.where(null_B[:, None], self.null_embedding, text_BTD[:, 0])
        seen_BT = mask_BT.clone()
        seen_BT[:, 0] |= null_B
        return torch.cat([first_BD[:, None], text_BTD[:, 1:]], 1), seen_BT

    def padding_bias(self, seen_BT: Tensor) -> Tensor:
        """Return the additive attention bias (B, 1, L) that hides empty text slots."""
        shape = (seen_BT.shape[0], 1, self.config.sequence_length)  # `len` would fix it in torch.export
        bias_B1L = torch.zeros(shape, device=seen_BT.device, dtype=self.text_proj.weight.dtype)
        bias_B1L[:, 0, : seen_BT.shape[1]].masked_fill_(~seen_BT, -math.inf)
        return bias_B1L

    def _prefix_causal_bias(self, seen_BT: Tensor) -> Tensor:
        """Return the bias (B, L, L) of a prefix language model: text slots see one another, image slots the
        text and what comes before them."""
        slot_L = torch.arange(self.config.sequence_length, device=seen_BT.device)
        last_seen_L = slot_L.clamp_min(self.config.max_text_tokens - 1)
        later_LL = slot_L[None, :] > last_seen_L[:, None]
        return self.padding_bias(seen_BT).masked_fill(later_LL, -math.inf)

    def check_codebook(self, codebook_hash: str) -> None:
        """Raise ValueError for a tokenizer other than the one whose ids were learned."""
        if codebook_hash != self.config.codebook_hash:
            raise ValueError(
                f"the tokenizer's codebook is {codebook_hash}, the generator learned ids of "
                f"{self.config.codebook_hash}; load that tokenizer, or train a generator on this one's tokens"
            )


class Block(nn.Module):
    """Attention with query-key norm, then a gated feed-forward layer (SwiGLU), each behind an RMSNorm.

    The norms have no weights, so that `engine.DecodeBlock` can fold them into the matrices behind them.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.attention: Attention = config.attention
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate_up_proj = nn.Linear(width, 2 * config.hidden_width, bias=False)
        self.down_proj = nn.Linear(config.hidden_width, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BLD: Tensor, rope: Tensor, bias_BLL: Tensor, kv_cache: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Pass the residual stream of the first L slots through.

        Args:
            x_BLD: residual stream.
            rope: the rope cache of these slots, (L, d/2, 2) with heads of width d, or (B, L, d/2, 2).
            bias_BLL: additive attention bias.
            kv_cache: keys and values, each (B, L or more, heads, d), into whose first L slots those of this
                pass are written.
        """
        x_BLD = x_BLD + self.dropout(self._self_attention(rms_norm(x_BLD), rope, bias_BLL, kv_cache))
        gate, up = self.gate_up_proj(rms_norm(x_BLD)).chunk(2, dim=-1)
        return x_BLD + self.dropout(self.down_proj(F.silu(gate) * up))

    def _self_attention(
        self, x_BLD: Tensor, rope: Tensor, bias_BLL: Tensor, kv_cache: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        batch, length, width = x_BLD.shape
        q, k, v = self._qkv(x_BLD, rope)

        if kv_cache is not None:
            keys, values = kv_cache
            keys[:, :length] = k
            values[:, :length] = v

        attended = attend(q, k, v, bias_BLL, self.attention)
        return self.o_proj(attended.reshape(batch, length, width))

    def _qkv(self, x_BLD: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, L, heads, d)."""
        batch, length, width = x_BLD.shape
        qkv = self.qkv_proj(x_BLD).view(batch, length, 3, self.num_heads, width // self.num_heads)
        # Under autocast norm and rotation give float32; attention wants one type for all three.
        q, k = apply_rotary_emb(rms_norm(qkv[:, :, :2]), rope).to(qkv.dtype).unbind(2)
        return q, k, qkv[:, :, 2]

    def step(
        self, x_B1D: Tensor, rope: Tensor, bias_B1L: Tensor, keys: Tensor, values: Tensor, slot: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pass one token through, with the keys and values (B, L, heads, d) of the slots before it.

        Nothing is written in place, so that `torch.export` takes it; `engine.DecodeBlock` is the fast way.

        Args:
            x_B1D: residual stream of the token.
            rope: of its slot, (1, d/2, 2).
            bias_B1L: hides empty text slots, and the slots behind this one.
            keys, values: of the slots before it.
            slot: (1,) int64, the token's slot.

        Returns:
            The residual stream, keys and values.
        """
        q, k, v = self._qkv(rms_norm(x_B1D), rope)
        keys = keys.index_copy(1, slot, k)
        values = values.index_copy(1, slot, v)
        x_B1D = x_B1D + self.o_proj(attend(q, keys, values, bias_B1L, "sdpa").flatten(2))
        gate, up = self.gate_up_proj(rms_norm(x_B1D)).chunk(2, dim=-1)
        return x_B1D + self.down_proj(F.silu(gate) * up), keys, values


def rms_norm(x: Tensor) -> Tensor:
    """Divide the last dimension by its root mean square (Zhang, Sennrich 2019, arXiv:1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],))


def apply_rotary_emb(qk: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring pairs of numbers in queries and keys (B, L, 2, heads, d) by the angles of their
    slots, whose cosines and sines are `rope` (L, d/2, 2) or (B, L, d/2, 2)."""
    even, odd = qk.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[..., None, None, :, :].unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def precompute_rope_cache(config: GeneratorConfig) -> Tensor:
    """Compute the cosines and sines (L + 1, d/2, 2) of rotary embeddings in two dimensions.

    Half of the pairs rotate with the row of the grid, half with the column, both counted from 1 (after Su et
    al. 2021, arXiv:2104.09864). Text slots and the start slot do not rotate. A slot rotates by the place of
    the token that it holds, which is the one before the token that it predicts. In raster order no slot holds
    the last token, whose rotation is behind all others.
    """
    quarter = config.width // config.num_heads // 4
    frequencies = 100.0 ** (-torch.arange(quarter) / quarter)

    token = torch.arange(config.num_tokens)
    num_columns = config.grid_size[1]
    row_and_column = torch.stack([token // num_columns + 1, token % num_columns + 1], 1)
    no_rotation = torch.zeros(config.max_text_tokens + 1, 2)

    angles = torch.cat([no_rotation, row_and_column])[..., None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], -1).flatten(1, 2)
