"""The baseline LG-VQ: three losses that guide the codes of an image by one caption.

Liang et al. 2024, "LG-VQ: Language-Guided Codebook Learning", NeurIPS, sec. 3; sizes and weights are those of
the released code (CelebA-HQ and TextCaps). Two departures: words are hidden before the text encoder reads the
caption, whereas the release masks the encoder's output, whose other positions have already seen them; and
start and end tokens take no part in the relation loss. As in the release the quantised map is
straight-through, so these losses move the encoder, and the codebook only through the quantiser's own loss.

Legend: B batch, E code width, N image tokens, T text tokens, D text width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.data.text_encoder import TextEncoder

from .blocks import AttentionBlock, to_sequence


@dataclasses.dataclass(frozen=True)
class LGVQConfig:
    """The three losses with the weights published for CelebA-HQ and TextCaps (CUB-200: 1e-3 each)."""

    global_weight: float = 1e-3
    """Of the caption found among those of the batch by the image's summary."""
    word_weight: float = 1e-2
    """Of the hidden words guessed from the image."""
    relation_weight: float = 1e-4
    """Of the likeness of two words beside that of the codes they fall on."""
    width: int = 256
    """Of the transformer that reads the quantised map."""
    layers: int = 2
    """Of that transformer, and of the one that guesses words."""
    max_text_tokens: int = 30
    """Captions with more are left out of training, as in the release."""
    mask_mean: float = 0.5
    mask_deviation: float = 0.1
    mask_range: tuple[float, float] = (0.1, 0.3)
    """The share of hidden words is normal(mean, deviation) restricted to this range (0.26 on average)."""
    label_smoothing: float = 0.1
    """Of the guessed words."""


@dataclasses.dataclass(frozen=True)
class Captions:
    """One caption an image, read whole and read with hidden words."""

    ids: Tensor
    """(B, T) int64."""
    words: Tensor
    """(B, T) bool, True on tokens of the caption, False on start, end and padding."""
    hidden: Tensor
    """(B, T) bool, True on the words to guess; at least one a caption."""
    present: Tensor
    """(B, T) bool, True on all tokens but padding."""
    states: Tensor
    """(B, T, D) float32, of the whole caption."""
    hidden_states: Tensor
    """(B, T, D) float32, of the caption as read without its hidden words; zero in their place."""
    sentences: Tensor
    """(B, D) float32, of the whole caption, unit length."""


class CaptionReader:
    """Draws a caption for each image, hides some of its words, and has a frozen encoder read both.

    Args:
        encoder: its token states and its sentence vectors must be equally wide.
        captions: those of each training image, at least one short enough an image.
    """

    def __init__(self, encoder: TextEncoder, captions: Sequence[Sequence[str]], config: LGVQConfig):
        if encoder.dim != encoder.token_dim:
            raise ValueError(
                f"{encoder.name} has sentences {encoder.dim} wide and tokens {encoder.token_dim} wide, "
                "lgvq expects one width; choose another --text-encoder"
            )
        self.encoder, self.config = encoder, config
        tokens = iter(encoder.token_ids([text for texts in captions for text in texts]))
        self.tokens = [
            [ids for ids in (next(tokens) for _ in texts) if len(ids) <= config.max_text_tokens]
            for texts in captions
        ]
        without = [number for number, found in enumerate(self.tokens) if not found]
        if without:
            raise ValueError(
                f"{len(without)} images (first: number {without[0]}) have no caption of at most "
                f"{config.max_text_tokens} tokens; raise --lgvq.max-text-tokens"
            )

    def read(self, indices: Sequence[int], generator: torch.Generator) -> Captions:
        """Read one caption, drawn at random, of each of these images."""
        drawn = [self._draw(self.tokens[index], generator) for index in indices]
        ids = torch.zeros(len(drawn), self.config.max_text_tokens, dtype=torch.int64)
        present = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens in enumerate(drawn):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            present[row, : len(tokens)] = True
        words = present & ~torch.isin(ids, torch.tensor(self.encoder.special_ids))
        hidden = hide_words(words, self.config, generator)
        whole = self.encoder.read(ids, present)
        partly = self.encoder.read(ids.masked_fill(hidden, 0), present & ~hidden)
        return Captions(ids, words, hidden, present, whole.states, partly.states, whole.pooled)

    def _draw(self, captions: list[list[int]], generator: torch.Generator) -> list[int]:
        return captions[int(torch.randint(len(captions), (), generator=generator))]


def hide_words(words: Tensor, config: LGVQConfig, generator: torch.Generator) -> Tensor:
    """Choose the words to guess: (B, T) bool -> (B, T) bool, at least one of each row that has any."""
    low, high = (
        torch.special.ndtr(torch.tensor((bound - config.mask_mean) / config.mask_deviation).double())
        for bound in config.mask_range
    )
    drawn = low + (high - low) * torch.rand(len(words), generator=generator, dtype=torch.float64)
    ratio = config.mask_mean + config.mask_deviation * torch.special.ndtri(drawn)
    count = (ratio * words.sum(dim=1)).ceil()
    keys = torch.rand(words.shape, generator=generator).masked_fill(~words, 2.0)
    return (keys.argsort(dim=1).argsort(dim=1) < count[:, None]) & words


class LanguageGuidance(nn.Module):
    """The networks and losses of LG-VQ; used in training alone.

    Args:
        config: weights and sizes.
        code_dim: width E of the quantised map.
        num_tokens: its positions, N.
        vocabulary: (V, D) frozen token embeddings of the text encoder, to which the guesses are compared.
    """

    def __init__(self, config: LGVQConfig, code_dim: int, num_tokens: int, vocabulary: Tensor):
        super().__init__()
        self.config, text_dim = config, vocabulary.shape[1]
        self.enter = nn.Linear(code_dim, config.width)
        self.summary = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + num_tokens, config.width) * 0.02)
        self.image_blocks = nn.Sequential(*(AttentionBlock(config.width, 1) for _ in range(config.layers)))
        self.leave = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, text_dim))
        self.hidden_words = nn.Parameter(torch.randn(config.max_text_tokens, text_dim) * 0.02)
        self.text_blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(text_dim, 1, 512, dropout=0.1, batch_first=True)
            for _ in range(config.layers)
        )
        self.guess = nn.Sequential(nn.Linear(text_dim, text_dim), nn.GELU(), nn.LayerNorm(text_dim))
        self.guess_bias = nn.Parameter(torch.zeros(len(vocabulary)))
        self.relate = nn.Sequential(nn.Linear(code_dim, text_dim), nn.GELU(), nn.LayerNorm(text_dim))
        self.register_buffer("vocabulary", vocabulary, persistent=False)

    def forward(self, codes: Tensor, captions: Captions) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the three losses, and each of them.

        Args:
            codes: (B, E, h, w), the quantised map, straight-through.
            captions: caption i belongs to image i.
        """
        tokens = to_sequence(codes)
        summary, read = self.read_image(tokens)
        found = self.global_loss(summary, captions.sentences)
        guessed, accuracy = self.word_loss(torch.cat([summary.unsqueeze(1), read], dim=1), captions)
        related = self.relation_loss(tokens, read, captions)
        config = self.config
        loss = config.global_weight * found + config.word_weight * guessed + config.relation_weight * related
        report = {"global": found, "words": guessed, "relation": related, "word_accuracy": accuracy}
        return loss, {f"lgvq/{name}": value.detach() for name, value in report.items()}

    def read_image(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The small vision transformer: tokens (B, N, E) -> summary (B, D), tokens read again (B, N, D)."""
        x = torch.cat([self.summary.expand(len(tokens), -1, -1), self.enter(tokens)], dim=1)
        x = self.leave(self.image_blocks(x + self.positions))
        return x[:, 0], x[:, 1:]

    def scores(self, codes: Tensor, sentences: Tensor) -> Tensor:
        """Fit of n images to m texts: codes (n, E, h, w), unit sentences (m, D) -> cosines (n, m)."""
        summary, _ = self.read_image(to_sequence(codes))
        return F.normalize(summary, dim=-1) @ sentences.T

    def global_loss(self, summary: Tensor, sentences: Tensor) -> Tensor:
        """Each image finds its caption among the batch's: no temperature, this direction only (eq. of
        L_gsa)."""
        cosines = F.normalize(summary, dim=-1) @ F.normalize(sentences, dim=-1).T
        return F.cross_entropy(cosines, torch.arange(len(cosines), device=cosines.device))

    def word_loss(self, memory: Tensor, captions: Captions) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy of the hidden words, guessed from image and visible words (L_mtp)."""
        x = torch.where(captions.hidden.unsqueeze(-1), self.hidden_words, captions.hidden_states)
        for block in self.text_blocks:
            x = block(x, memory, tgt_key_padding_mask=~captions.present)
        logits = F.linear(self.guess(x[captions.hidden]), self.vocabulary, self.guess_bias)
        wanted = captions.ids[captions.hidden]
        loss = F.cross_entropy(logits, wanted, label_smoothing=self.config.label_smoothing)
        return loss, (logits.argmax(dim=1) == wanted).float().mean()

    def relation_loss(self, tokens: Tensor, read: Tensor, captions: Captions) -> Tensor:
        """Squared difference of the word-word and code-code cosines, averaged over all T x T places (L_ras).

        The code of a word is found among the tokens read again, and taken from the quantised map itself.
        """
        words = F.normalize(captions.states, dim=-1)
        places = (words @ F.normalize(read, dim=-1).transpose(1, 2)).argmax(dim=2, keepdim=True)
        codes = tokens.gather(1, places.expand(-1, -1, tokens.shape[-1]))
        codes = F.normalize(self.relate(codes), dim=-1)
        difference = codes @ codes.transpose(1, 2) - words @ words.transpose(1, 2)
        pairs = captions.words.unsqueeze(1) & captions.words.unsqueeze(2)
        return (difference.square() * pairs).mean()
