"""The generator: a decoder that reads a text prefix and predicts image ids in raster order.

Legend: B rows, K codes, N = h*w image tokens, T text slots, L positions of a forward pass, S positions in all
(T + N), D model width, E text width, h heads, d head width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.training.checkpoint import Checkpointed

from .attention import Attention, attend


@dataclasses.dataclass(frozen=True)
class GeneratorShape:
    """Size of the generator, and the text that it reads."""

    width: int = 256
    num_layers: int = 5
    num_heads: int = 4
    hidden_width: int = 704
    """Of the gated feed-forward layer."""
    max_text_tokens: int = 32
    """T; every text takes so many slots, whatever its length, so that other prompts never matter."""
    dropout: float = 0.1
    attention: Attention = "auto"
    """auto, sdpa, or xformers (CUDA)."""
    text_encoder: str = "minilm"
    """minilm, or a directory or hub id of a transformers text model."""

    def __post_init__(self) -> None:
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"width is {self.width} with {self.num_heads} heads; expected a multiple of "
                f"{4 * self.num_heads}, as each head turns pairs of numbers by row and by column"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected 0 <= dropout < 1")


@dataclasses.dataclass(frozen=True)
class GeneratorConfig(GeneratorShape):
    """Everything that a generator is built from: its shape, its tokens and what it was trained with."""

    num_codes: int = 1024
    """Codes of the tokenizer (K)."""
    grid_size: tuple[int, int] = (8, 8)
    """(h, w) of the token grid."""
    text_dim: int = 384
    """E; width of the text encoder's token states."""
    text_encoder_hash: str = ""
    codebook_hash: str = ""
    """Of the tokenizer whose ids it learned."""
    provenance: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, shape: GeneratorShape, **known: Any) -> Self:
        """A generator of `shape`, with the fields that data and text encoder decide."""
        return cls(**vars(shape), **known)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def length(self) -> int:
        """S; positions of a whole sequence."""
        return self.max_text_tokens + self.num_tokens


PRESETS: dict[str, GeneratorShape] = {
    "flickr8k": GeneratorShape(),
    "tiny": GeneratorShape(width=32, num_layers=2, num_heads=2, hidden_width=64),
    "base": GeneratorShape(width=768, num_layers=14, num_heads=12, hidden_width=2048, max_text_tokens=64),
}


class Block(nn.Module):
    """Attention and a gated feed-forward layer, each behind an RMSNorm without weights."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        width = config.width
        self.num_heads, self.attention = config.num_heads, config.attention
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * config.hidden_width, bias=False)
        self.down = nn.Linear(config.hidden_width, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BLD: Tensor, turns: Tensor, bias_BLS: Tensor, cache_2BShd: Tensor | None = None
    ) -> Tensor:
        """Pass the residual stream of the first L positions through.

        Args:
            x_BLD: residual stream.
            turns: (L, d/2, 2) of these positions, as in `rotary_turns`.
            bias_BLS: additive attention bias; here S is L.
            cache_2BShd: where to put their keys and values, if anywhere.
        """
        x_BLD = x_BLD + self.dropout(self._attention(rms_norm(x_BLD), turns, bias_BLS, cache_2BShd))
        gate, up = self.gate_up(rms_norm(x_BLD)).chunk(2, dim=-1)
        return x_BLD + self.dropout(self.down(F.silu(gate) * up))

    def _attention(self, x: Tensor, turns: Tensor, bias_BLS: Tensor, cache: Tensor | None) -> Tensor:
        rows, length, width = x.shape
        heads = self.qkv(x).view(rows, length, 3, self.num_heads, width // self.num_heads)
        q, k = rotate(rms_norm(heads[:, :, :2]), turns).unbind(2)
        v = heads[:, :, 2]
        if cache is not None:
            cache[0, :, :length], cache[1, :, :length] = k, v
        return self.out(attend(q, k, v, bias_BLS, self.attention).reshape(rows, length, width))


def rms_norm(x: Tensor) -> Tensor:
    """Norm over the last dimension by its root mean square (Zhang, Sennrich 2019, arXiv:1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x_BL2hd: Tensor, turns: Tensor) -> Tensor:
    """Turn neighbouring pairs of numbers by the angles whose (L, d/2, 2) cosines and sines are `turns`."""
    even, odd = x_BL2hd.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns[:, None, None].unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def rotary_turns(config: GeneratorConfig) -> Tensor:
    """(S, d/2, 2) cosines and sines: half of the pairs turn with the row, half with the column, from 1 on.

    Text slots and the start token do not turn (Su et al. 2021, arXiv:2104.09864, in two dimensions). The slot
    that predicts token i holds token i - 1 and turns by the place of that one.
    """
    quarter = config.width // config.num_heads // 4
    frequencies = 100.0 ** (-torch.arange(quarter) / quarter)
    place = torch.arange(config.num_tokens - 1)
    columns = config.grid_size[1]
    rows_and_columns = torch.stack([place // columns + 1, place % columns + 1], 1)
    still = torch.zeros(config.max_text_tokens + 1, 2)
    angles = torch.cat([still, rows_and_columns])[..., None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], -1).flatten(1, 2)


class GeneratorModel(Checkpointed):
    """Text -> ids. A text whose mask is False throughout is the learned null text."""

    config_class = GeneratorConfig
    kind = "ta-vq-generator"
    former_kinds = ("prior", "ta-vq-prior")

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.text = nn.Linear(config.text_dim, config.width)
        self.null_text = nn.Parameter(torch.empty(config.width))
        self.start = nn.Parameter(torch.empty(config.width))
        self.tokens = nn.Embedding(config.num_codes, config.width)
        self.places = nn.Parameter(torch.empty(config.num_tokens, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = nn.Linear(config.width, config.num_codes, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("turns", rotary_turns(config), persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self, codebook: Tensor | None = None) -> None:
        """Set all weights; residual branches start at zero, so that the first loss is log K.

        Args:
            codebook: (K, E') of the tokenizer; token embeddings then start as its random isometric image.
        """
        for block in self.blocks:
            nn.init.normal_(block.qkv.weight, std=self.config.width**-0.5)
            nn.init.normal_(block.gate_up.weight, std=self.config.width**-0.5)
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.down.weight)
        nn.init.normal_(self.text.weight, std=self.config.text_dim**-0.5)
        nn.init.zeros_(self.text.bias)
        nn.init.zeros_(self.head.weight)
        for vectors in (self.null_text, self.start, self.places, self.tokens.weight):
            nn.init.normal_(vectors, std=1.0 if vectors is self.null_text else 0.5)
        if codebook is not None:
            self.tokens.weight.copy_(self._isometric_image(codebook))

    def _isometric_image(self, codebook: Tensor) -> Tensor:
        if codebook.shape[0] != self.config.num_codes:
            raise ValueError(
                f"the codebook has {codebook.shape[0]} codes, the generator {self.config.num_codes}; "
                "give the tokenizer that made the tokens"
            )
        basis = nn.init.orthogonal_(torch.empty(self.config.width, codebook.shape[1]))
        image = codebook.float().cpu() @ basis.T
        return image * (0.5 / image.square().mean().sqrt())

    def forward(self, ids_BN: Tensor, states_BTE: Tensor, mask_BT: Tensor) -> Tensor:
        """Predict every token from the text and the tokens before it.

        Args:
            ids_BN: (B, N) int64; the last one is not read.
            states_BTE: (B, T, E) token states of the text encoder.
            mask_BT: (B, T) bool; a row of False alone means the null text.

        Returns:
            (B, N, K) logits in float32.
        """
        prefix, seen = self.prefix(states_BTE, mask_BT)
        image = (
            torch.cat([self.start.expand(len(ids_BN), 1, -1), self.tokens(ids_BN[:, :-1])], 1) + self.places
        )
        bias = self._training_bias(seen)
        x = self.dropout(torch.cat([prefix, image], 1))
        for block in self.blocks:
            x = block(x, self.turns, bias)
        return self.logits(x[:, self.config.max_text_tokens :])

    def prefix(self, states_BTE: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) embeddings of the text slots and the (B, T) mask of those that may be seen."""
        expected = (self.config.max_text_tokens, self.config.text_dim)
        if tuple(states_BTE.shape[1:]) != expected:
            raise ValueError(
                f"text states are {tuple(states_BTE.shape[1:])}, expected {expected} (tokens, width); "
                f"encode with max_tokens={expected[0]} by {self.config.text_encoder!r}"
            )
        null = ~mask_BT.any(1)
        embedded = rms_norm(self.text(states_BTE.to(self.text.weight.dtype)))
        first = torch.where(null[:, None], self.null_text, embedded[:, 0])
        seen = mask_BT.clone()
        seen[:, 0] |= null
        return torch.cat([first[:, None], embedded[:, 1:]], 1), seen

    def key_bias(self, seen_BT: Tensor) -> Tensor:
        """(B, 1, S) additive bias that hides the empty text slots."""
        bias = torch.zeros(
            len(seen_BT), 1, self.config.length, device=seen_BT.device, dtype=self.text.weight.dtype
        )
        bias[:, 0, : seen_BT.shape[1]].masked_fill_(~seen_BT, -math.inf)
        return bias

    def _training_bias(self, seen_BT: Tensor) -> Tensor:
        """(B, S, S): text slots see one another, image slots the text and what came before."""
        slot = torch.arange(self.config.length, device=seen_BT.device)
        last_seen = slot.clamp_min(self.config.max_text_tokens - 1)
        return self.key_bias(seen_BT).masked_fill(slot[None, :] > last_seen[:, None], -math.inf)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(rms_norm(x)).float()

    def check_codebook(self, codebook_hash: str) -> None:
        """Refuse a tokenizer other than the one whose ids were learned."""
        if codebook_hash != self.config.codebook_hash:
            raise ValueError(
                f"the tokenizer's codebook is {codebook_hash}, the generator learned ids of "
                f"{self.config.codebook_hash}; load that tokenizer, or train a generator on this one's tokens"
            )
