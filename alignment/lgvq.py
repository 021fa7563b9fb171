"""The baseline LG-VQ: three losses that guide the codes of an image by one caption.

Liang et al. 2024, "LG-VQ: Language-Guided Codebook Learning", NeurIPS, sec. 3; sizes and weights are those of
the released code (CelebA-HQ and TextCaps). Two departures: words are masked before the text encoder sees the
caption, whereas the release masks the encoder's output, whose other positions have already seen them; and
start and end tokens take no part in the relation loss. As in the release the quantised map is
straight-through, so these losses move the encoder, and the codebook only through the quantiser's own loss.

Shapes: B batch, E code width, N image tokens, T text tokens, M text width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.base.processes import of_all_processes, part_of_mean, process_index
from tavq.data.text_encoder import TextEncoder

from .config import LGVQConfig


@dataclasses.dataclass(frozen=True)
class MaskedCaptions:
    """One caption an image, encoded whole and encoded with masked words."""

    ids: Tensor
    """(B, T) int64."""
    words: Tensor
    """(B, T) bool, True on tokens of the caption, False on start, end and padding."""
    masked: Tensor
    """(B, T) bool, True on the words to predict; at least one a caption."""
    present: Tensor
    """(B, T) bool, True on all tokens but padding."""
    states: Tensor
    """(B, T, M) float32, of the whole caption."""
    masked_states: Tensor
    """(B, T, M) float32, of the caption without its masked words; zero in their place."""
    sentences: Tensor
    """(B, M) float32, of the whole caption, unit length."""


class CaptionMasker:
    """Draws a caption for each image, masks some of its words, and has a frozen encoder encode both.

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
        self.encoder = encoder
        self.config = config
        tokens = iter(encoder.token_ids([text for texts in captions for text in texts]))
        self.tokens = [
            [ids for ids in (next(tokens) for _ in texts) if len(ids) <= config.max_text_tokens]
            for texts in captions
        ]
        without = [number for number, short in enumerate(self.tokens) if not short]
        if without:
            raise ValueError(
                f"{len(without)} images (first: number {without[0]}) have no caption of at most "
                f"{config.max_text_tokens} tokens; raise --lgvq.max-text-tokens"
            )

    def sample(
        self, indices: Sequence[int], rng: torch.Generator, wanted: slice = slice(None)
    ) -> MaskedCaptions:
        """Encode one caption, drawn at random, of each of these images; `wanted` as in `UnitIndex.sample`."""
        captions = [self._draw(self.tokens[index], rng) for index in indices]
        ids = torch.zeros(len(captions), self.config.max_text_tokens, dtype=torch.int64)
        present = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens in enumerate(captions):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            present[row, : len(tokens)] = True
        words = present & ~torch.isin(ids, torch.tensor(self.encoder.special_ids))
        masked = mask_words(words, self.config, rng)
        ids, words, masked, present = (tensor[wanted] for tensor in (ids, words, masked, present))
        whole = self.encoder.encode_ids(ids, present)
        partly = self.encoder.encode_ids(ids.masked_fill(masked, 0), present & ~masked)
        return MaskedCaptions(ids, words, masked, present, whole.states, partly.states, whole.pooled)

    def _draw(self, captions: list[list[int]], rng: torch.Generator) -> list[int]:
        return captions[int(torch.randint(len(captions), (), generator=rng))]


def mask_words(words: Tensor, config: LGVQConfig, rng: torch.Generator) -> Tensor:
    """Choose the words to predict: (B, T) bool -> (B, T) bool, at least one of each row that has any."""
    # The normal distribution restricted to a range, by inverting its distribution function within it.
    low, high = (
        torch.special.ndtr(torch.tensor((bound - config.mask_mean) / config.mask_deviation).double())
        for bound in config.mask_range
    )
    quantiles = low + (high - low) * torch.rand(len(words), generator=rng, dtype=torch.float64)
    ratio = config.mask_mean + config.mask_deviation * torch.special.ndtri(quantiles)
    count = (ratio * words.sum(dim=1)).ceil()

    # The `count` words of the smallest random keys; places without a word come last.
    keys = torch.rand(words.shape, generator=rng).masked_fill(~words, 2.0)
    return (keys.argsort(dim=1).argsort(dim=1) < count[:, None]) & words


class LanguageGuidance(nn.Module):
    """The networks and losses of LG-VQ; used in training alone.

    Args:
        config: weights and sizes.
        code_dim: width E of the quantised map.
        num_tokens: its positions, N.
        vocabulary: (V, M) frozen token embeddings of the text encoder, tied to the prediction head.
    """

    vocabulary: Tensor

    def __init__(self, config: LGVQConfig, code_dim: int, num_tokens: int, vocabulary: Tensor):
        super().__init__()
        self.config = config
        width = config.width
        text_dim = vocabulary.shape[1]

        # The small vision transformer over the quantised map.
        self.proj_in = nn.Linear(code_dim, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positional_embedding = nn.Parameter(torch.randn(1, 1 + num_tokens, width) * 0.02)
        image_blocks = [
            nn.TransformerEncoderLayer(
                width, 1, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.layers)
        ]
        for block in image_blocks:  # near the identity at first: the codes themselves are read
            nn.init.normal_(block.self_attn.out_proj.weight, std=0.02)
            nn.init.normal_(block.linear2.weight, std=0.02)
        self.image_blocks = nn.ModuleList(image_blocks)
        self.proj_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, text_dim))

        # Masked text prediction.
        self.mask_embeddings = nn.Parameter(torch.randn(config.max_text_tokens, text_dim) * 0.02)
        self.text_blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(text_dim, 1, 512, dropout=0.1, batch_first=True)
            for _ in range(config.layers)
        )
        self.word_head = nn.Sequential(nn.Linear(text_dim, text_dim), nn.GELU(), nn.LayerNorm(text_dim))
        self.word_bias = nn.Parameter(torch.zeros(len(vocabulary)))

        self.relation_head = nn.Sequential(nn.Linear(code_dim, text_dim), nn.GELU(), nn.LayerNorm(text_dim))
        self.register_buffer("vocabulary", vocabulary, persistent=False)

    def forward(self, codes: Tensor, captions: MaskedCaptions) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the three losses, and each of them.

        Args:
            codes: (B, E, h, w), the quantised map, straight-through.
            captions: caption i belongs to image i.
        """
        config = self.config
        tokens = codes.flatten(2).transpose(1, 2)
        cls, encoded = self.encode_image(tokens)
        global_loss = self.global_loss(cls, captions.sentences)
        memory = torch.cat([cls.unsqueeze(1), encoded], dim=1)
        word_loss, accuracy = self.word_loss(memory, captions)
        relation_loss = self.relation_loss(tokens, encoded, captions)

        loss = config.global_weight * global_loss
        loss = loss + config.word_weight * word_loss
        loss = loss + config.relation_weight * relation_loss
        report = {
            "global": global_loss,
            "words": word_loss,
            "relation": relation_loss,
            "word_accuracy": accuracy,
        }
        return loss, {f"lgvq/{name}": value.detach() for name, value in report.items()}

    def encode_image(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The small vision transformer: tokens (B, N, E) -> its class token (B, M) and the others (B, N,
        M)."""
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), self.proj_in(tokens)], dim=1)
        x = x + self.positional_embedding
        for block in self.image_blocks:
            x = block(x)
        x = self.proj_out(x)
        return x[:, 0], x[:, 1:]

    def scores(self, codes: Tensor, sentences: Tensor) -> Tensor:
        """Fit of n images to m texts: codes (n, E, h, w), unit sentences (m, M) -> cosines (n, m)."""
        cls, _ = self.encode_image(codes.flatten(2).transpose(1, 2))
        return F.normalize(cls, dim=-1) @ sentences.T

    def global_loss(self, cls: Tensor, sentences: Tensor) -> Tensor:
        """Each image finds its caption among those of all processes: no temperature, this direction only
        (L_gsa)."""
        cosines = F.normalize(cls, dim=-1) @ F.normalize(of_all_processes(sentences), dim=-1).T
        own = torch.arange(len(cosines), device=cosines.device) + process_index() * len(cosines)
        return F.cross_entropy(cosines, own)

    def word_loss(self, memory: Tensor, captions: MaskedCaptions) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy of the masked words, given image and visible words (L_mtp)."""
        x = torch.where(captions.masked.unsqueeze(-1), self.mask_embeddings, captions.masked_states)
        for block in self.text_blocks:
            x = block(x, memory, tgt_key_padding_mask=~captions.present)
        logits = F.linear(self.word_head(x[captions.masked]), self.vocabulary, self.word_bias)
        targets = captions.ids[captions.masked]
        loss = F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
        loss = part_of_mean(loss, len(targets))
        return loss, (logits.argmax(dim=1) == targets).float().mean()

    def relation_loss(self, tokens: Tensor, encoded: Tensor, captions: MaskedCaptions) -> Tensor:
        """Squared difference of the word-word and code-code cosines, a mean over all T x T pairs (L_ras).

        The code of a word is found among the encoded tokens, and taken from the quantised map itself.
        """
        words = F.normalize(captions.states, dim=-1)
        nearest = (words @ F.normalize(encoded, dim=-1).transpose(1, 2)).argmax(dim=2, keepdim=True)
        codes = tokens.gather(1, nearest.expand(-1, -1, tokens.shape[-1]))
        codes = F.normalize(self.relation_head(codes), dim=-1)
        difference = codes @ codes.transpose(1, 2) - words @ words.transpose(1, 2)
        pairs = captions.words.unsqueeze(1) & captions.words.unsqueeze(2)
        return (difference.square() * pairs).mean()
