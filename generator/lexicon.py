"""Image as words: vectors in the generator's text slots that stand for an image, alone or beside a text.

After ViLex (Wang et al. 2024, arXiv:2412.06774): an attention pooler writes soft tokens, and the frozen
generator must find the image behind them. TailDrop leaves the last ones out at random, so that the first few
say the most and any number can be used. Ours reads an image's ids instead of a vision transformer's patches,
and the generator that judges them predicts ids.

Shapes: B images, N image tokens, W image words, K codes, M text width, T text slots, D lexicon width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from tavq.base.bounds import check_bounds
from tavq.data.text_encoder import TokenStates
from tavq.training.checkpoint import Checkpointed
from tavq.training.provenance import TokenProvenance

from .config import LexiconShape


@dataclasses.dataclass(frozen=True)
class LexiconConfig(LexiconShape):
    """Everything that a lexicon is built from: its shape, and the generator that it speaks to."""

    num_codes: int = 1024
    """Codes of the tokenizer (K)."""
    num_tokens: int = 64
    """Tokens of an image (N)."""
    text_dim: int = 384
    """Width of the generator's text states (M)."""
    codebook_hash: str = ""
    generator_hash: str = ""
    """First digits of the SHA-256 of the weights of the generator that it was trained with."""
    provenance: TokenProvenance = TokenProvenance()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, num_codes=(1, 2**24), num_tokens=(1, 2**20), text_dim=(1, 2**16))


class Lexicon(Checkpointed):
    """Ids of an image -> W vectors that a generator reads like the states of a text."""

    config_class = LexiconConfig
    kind = "ta-vq-lexicon"

    def __init__(self, config: LexiconConfig):
        super().__init__()
        self.config = config
        layer: dict[str, Any] = {
            "d_model": config.width,
            "nhead": config.num_heads,
            "dim_feedforward": 4 * config.width,
            "dropout": config.dropout,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        self.token_embedding = nn.Embedding(config.num_codes, config.width)
        self.position_embedding = nn.Parameter(torch.randn(config.num_tokens, config.width) * 0.5)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**layer), config.num_layers, enable_nested_tensor=False
        )
        self.queries = nn.Parameter(torch.randn(config.num_words, config.width))
        self.pooler = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), 1)
        self.to_text = nn.Linear(config.width, config.text_dim)

    def forward(self, ids_BN: Tensor) -> Tensor:
        """Return the words of images, most telling first: (B, W, M)."""
        context_BND = self.encoder(self.token_embedding(ids_BN) + self.position_embedding)
        queries_BWD = self.queries.expand(len(ids_BN), -1, -1)
        return self.to_text(self.pooler(queries_BWD, context_BND))

    def check_generator(self, generator_hash: str) -> None:
        """Raise ValueError for a generator other than the one that it was trained with."""
        if generator_hash != self.config.generator_hash:
            raise ValueError(
                f"the lexicon was trained for generator {self.config.generator_hash}, this one is "
                f"{generator_hash}; train another with tavq train lexicon"
            )


def with_words(words_BWM: Tensor, texts: TokenStates, seen_BW: Tensor | None = None) -> TokenStates:
    """Put words of images before the tokens of texts; the last tokens of a text that is too long are cut off.

    A text whose mask is False throughout leaves the words alone.

    Args:
        words_BWM: words of each image.
        texts: B texts, in T slots.
        seen_BW: bool, which of the words count; None takes all.

    Raises:
        ValueError: there are more words than slots.
    """
    num_words, num_slots = words_BWM.shape[1], texts.mask.shape[1]
    if num_words > num_slots:
        raise ValueError(
            f"{num_words} image words do not fit into the generator's {num_slots} slots; take fewer images, "
            "or fewer words of each"
        )
    if seen_BW is None:
        seen_BW = torch.ones(words_BWM.shape[:2], dtype=torch.bool, device=words_BWM.device)
    rest = num_slots - num_words
    states = torch.cat([words_BWM.to(texts.states.dtype), texts.states[:, :rest]], 1)
    return TokenStates(states, torch.cat([seen_BW, texts.mask[:, :rest]], 1))
