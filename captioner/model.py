"""The captioner: image tokens, read by bidirectional blocks, then a causal language model of `transformers`.

Legend: B batch, N image tokens, C captions an image, T positions a caption, D width of the language model,
    E code width, K codes, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from tavq.training.checkpoint import Checkpointed, local_directory

from .vocabulary import PretrainedVocabulary, Vocabulary, WordVocabulary

TEXT_TOKENIZER_FOLDER = "text_tokenizer"
Style = Literal["short", "long"]


@dataclasses.dataclass(frozen=True)
class CaptionerShape:
    """Size of the captioner."""

    decoder: str | None = None
    """Causal language model of transformers to start from (hub id or directory); None: a small own GPT-2."""
    width: int = 192
    """Of the image blocks and of our own decoder."""
    num_heads: int = 6
    encoder_layers: int = 2
    """Bidirectional blocks over the image tokens."""
    decoder_layers: int = 3
    """Of our own decoder."""
    max_words: int = 20
    """The longest caption; sub-words with a pretrained decoder."""
    long_words: int = 0
    """The longest long description, a second style for data with dense text; 0: captions alone."""
    quality_buckets: int = 0
    """Degrees of agreement that training pairs are marked with; the best one is asked for. 0: none."""
    dropout: float = 0.1
    token_dropout: float = 0.1
    """Share of the image tokens that are hidden in training."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}; take a divisor")
        if self.max_words < 1:
            raise ValueError(f"max_words is {self.max_words}, expected 1 or more")


PRESETS: dict[str, CaptionerShape] = {
    "flickr8k": CaptionerShape(),
    "tiny": CaptionerShape(width=32, num_heads=2, encoder_layers=1, decoder_layers=1, max_words=16),
    "base": CaptionerShape(width=768, num_heads=12, encoder_layers=4, decoder_layers=12, max_words=40),
}


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
    """Everything that a captioner is built from: its shape, the tokens it reads and the words it writes."""

    shape: CaptionerShape
    num_codes: int
    code_dim: int
    grid_size: tuple[int, int]
    codebook_hash: str
    """Names the codebook whose ids this captioner reads."""
    words: tuple[str, ...] = ()
    """Our own vocabulary, most frequent first; empty with a pretrained decoder."""
    decoder_config: dict[str, Any] | None = None
    """The pretrained decoder's configuration, so that a checkpoint loads without its source."""
    provenance: dict[str, str] = dataclasses.field(default_factory=dict)
    """What shaped these weights: data, stage of training, tokenizer."""


class ImageReader(nn.Module):
    """ids (B, N) in [0, K) -> prefix (B, N, D) of the language model."""

    def __init__(self, config: CaptionerConfig, prefix_dim: int):
        super().__init__()
        shape, (h, w) = config.shape, config.grid_size
        self.codes = nn.Embedding(config.num_codes, config.code_dim)
        self.enter = nn.Linear(config.code_dim, shape.width)
        self.hidden = nn.Parameter(torch.randn(shape.width) * 0.02)
        self.rows = nn.Parameter(torch.randn(h, 1, shape.width) * 0.02)
        self.columns = nn.Parameter(torch.randn(1, w, shape.width) * 0.02)
        block = nn.TransformerEncoderLayer(
            shape.width,
            shape.num_heads,
            4 * shape.width,
            dropout=shape.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        block.self_attn.dropout = (
            0.0  # the CPU's fast attention has none: 1.7 s a step with it, 1.3 s without
        )
        self.blocks = nn.TransformerEncoder(block, shape.encoder_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(shape.width)
        self.leave = nn.Linear(shape.width, prefix_dim) if prefix_dim != shape.width else nn.Identity()
        self.token_dropout = shape.token_dropout

    def start_from(self, codebook: Tensor) -> None:
        """Take `codebook` (K, E) as the first embeddings, scaled to a root mean square of 1."""
        if codebook.shape != self.codes.weight.shape:
            raise ValueError(
                f"the codebook has shape {tuple(codebook.shape)}, expected {tuple(self.codes.weight.shape)}; "
                "give the one of the tokenizer that made the tokens"
            )
        with torch.no_grad():
            self.codes.weight.copy_(codebook / codebook.square().mean().sqrt())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.enter(self.codes(ids))
        if self.training and self.token_dropout:
            dropped = torch.rand(ids.shape, device=ids.device) < self.token_dropout
            x = torch.where(dropped[..., None], self.hidden, x)
        x = self.blocks(x + (self.rows + self.columns).flatten(0, 1))
        return self.leave(self.norm(x))


class Captioner(Checkpointed):
    """Image tokens -> sentences. Captions are made by `decoding.caption_ids`; this class only computes."""

    config_class = CaptionerConfig
    kind = "ta-vq-captioner"

    def __init__(self, config: CaptionerConfig, language: nn.Module | None = None):
        """Build from `config`; `language` is the pretrained decoder, or None to build an untrained one."""
        super().__init__()
        self.config = config
        self.language = _untrained_language(config) if language is None else language
        # a pretrained decoder may bring settings of its own, which no checkpoint of ours would keep
        self.language.generation_config = type(self.language.generation_config)()
        self.language.config.pad_token_id = (
            None  # else transformers warns of padding that its own search made
        )
        self.text: Vocabulary | None = WordVocabulary(config.words) if config.words else None
        dim = self.language.get_input_embeddings().embedding_dim
        self.image = ImageReader(config, dim)
        self.starts = nn.Embedding(max(1, config.shape.quality_buckets) + bool(config.shape.long_words), dim)
        nn.init.normal_(self.starts.weight, std=0.02)
        self.register_state_dict_post_hook(_drop_tied_head)
        self.register_load_state_dict_pre_hook(_restore_tied_head)

    @property
    def num_tokens(self) -> int:
        """N."""
        h, w = self.config.grid_size
        return h * w

    def start_id(self, style: Style = "short") -> int:
        """The start that asks for a text of `style`; for captions, the one of the best agreement."""
        if style == "short":
            return max(1, self.config.shape.quality_buckets) - 1
        if not self.config.shape.long_words:
            raise ValueError("this captioner was trained on captions alone; use --style short")
        return self.starts.num_embeddings - 1

    def longest(self, style: Style) -> int:
        """Words of the longest text of `style`."""
        return self.config.shape.max_words if style == "short" else self.config.shape.long_words

    def check_codebook(self, codebook_hash: str) -> None:
        """Refuse tokens of another codebook than the one this captioner was trained on."""
        if codebook_hash != self.config.codebook_hash:
            raise ValueError(
                f"the tokens are of codebook {codebook_hash}, the captioner was trained on "
                f"{self.config.codebook_hash}; use its tokenizer, or train a captioner on these tokens"
            )

    def prompt(self, ids: Tensor, style: Style = "short") -> Tensor:
        """What stands before the first word: ids (B, N) -> (B, N + 1, D)."""
        start = self.starts.weight[self.start_id(style)].expand(len(ids), 1, -1)
        return torch.cat([self.image(self._checked(ids)), start], dim=1)

    def forward(self, ids: Tensor, words: Tensor, starts: Tensor | None = None) -> Tensor:
        """Logits of C captions of each image, all in one sequence behind one image prefix.

        A caption sees the image and itself. Five captions thus cost one prefix.

        Args:
            ids: (B, N) int64 in [0, K).
            words: (B, C, T) int64, padded at the right with any id.
            starts: (B, C) int64, what each caption is marked with; `start_id()` by default.

        Returns:
            (B, C, T + 1, V): entry t predicts word t, and the last one what follows the last word.
        """
        return self._run(ids, words, starts).logits.unflatten(1, (words.shape[1], -1))

    def attention(self, ids: Tensor, words: Tensor, starts: Tensor | None = None) -> Tensor:
        """How much each word's prediction looks at each image token, mean over layers and heads.

        Returns:
            (B, C, T + 1, N), non-negative, each row sums to 1.
        """
        with _eager(self.language):
            layers = self._run(ids, words, starts, output_attentions=True).attentions
        seen = torch.stack(layers).float().mean(dim=(0, 2))[:, self.num_tokens :, : self.num_tokens]
        return (seen / seen.sum(-1, keepdim=True)).unflatten(1, (words.shape[1], -1))

    def _run(self, ids: Tensor, words: Tensor, starts: Tensor | None, **options: Any) -> Any:
        B, C, T = words.shape
        if starts is None:
            starts = torch.full((B, C), self.start_id(), device=ids.device)
        starts_BC1D = self.starts(starts)[:, :, None]
        words_BCTD = self.language.get_input_embeddings()(words)
        text = torch.cat([starts_BC1D, words_BCTD], dim=2).flatten(1, 2)
        return self.language(
            inputs_embeds=torch.cat([self.image(self._checked(ids)), text], dim=1),
            attention_mask=packed_mask(self.num_tokens, C, T + 1, text),
            position_ids=packed_positions(self.num_tokens, C, T + 1, ids.device),
            logits_to_keep=C * (T + 1),
            use_cache=False,
            **options,
        )

    def _checked(self, ids: Tensor) -> Tensor:
        if ids.ndim != 2 or ids.shape[1] != self.num_tokens:
            raise ValueError(
                f"tokens have shape {tuple(ids.shape)}, expected (B, {self.num_tokens}); flatten the grid"
            )
        return ids

    def save_pretrained(self, directory: str | Path, *, half: bool = False) -> None:
        super().save_pretrained(directory, half=half)
        if isinstance(self.text, PretrainedVocabulary):
            self.text.save(Path(directory) / TEXT_TOKENIZER_FOLDER)

    @classmethod
    def from_pretrained(cls, source: str | Path, **changes: Any) -> Self:
        captioner = super().from_pretrained(source, **changes)
        if captioner.text is None:
            captioner.text = PretrainedVocabulary.load(local_directory(source) / TEXT_TOKENIZER_FOLDER)
        return captioner


def start_captioner(config: CaptionerConfig) -> Captioner:
    """An untrained captioner; with `shape.decoder`, that language model and its tokenizer inside."""
    if config.shape.decoder is None:
        return Captioner(config)
    from transformers import AutoModelForCausalLM

    try:
        language = AutoModelForCausalLM.from_pretrained(config.shape.decoder, dtype=torch.float32)
    except OSError as error:
        raise FileNotFoundError(
            f"no causal language model {config.shape.decoder!r} here or on the hub; check --model.decoder"
        ) from error
    config = dataclasses.replace(config, words=(), decoder_config=language.config.to_dict())
    captioner = Captioner(config, language)
    captioner.text = PretrainedVocabulary.load(config.shape.decoder)
    return captioner


def packed_positions(num_tokens: int, captions: int, length: int, device: torch.device) -> Tensor:
    """Each caption counts on from the image prefix: (1, N + C * length)."""
    image = torch.arange(num_tokens, device=device)
    text = torch.arange(num_tokens, num_tokens + length, device=device).repeat(captions)
    return torch.cat([image, text])[None]


def packed_mask(num_tokens: int, captions: int, length: int, like: Tensor) -> Tensor:
    """Additive mask (1, 1, L, L), L = N + C * length: causal, and no caption sees another one."""
    caption = torch.arange(captions, device=like.device).repeat_interleave(length)
    group = torch.cat([caption.new_full((num_tokens,), -1), caption])
    seen = (group[None] == -1) | (group[None] == group[:, None])
    seen &= torch.ones_like(seen).tril()
    lowest = torch.finfo(like.dtype).min
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, lowest)[
        None, None
    ]


def _untrained_language(config: CaptionerConfig) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    if config.decoder_config is not None:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.decoder_config))
    shape, (h, w) = config.shape, config.grid_size
    vocabulary = WordVocabulary(config.words)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(vocabulary),
            n_positions=h * w + 1 + max(shape.max_words, shape.long_words),
            n_embd=shape.width,
            n_layer=shape.decoder_layers,
            n_head=shape.num_heads,
            resid_pdrop=shape.dropout,
            embd_pdrop=shape.dropout,
            attn_pdrop=0.0,
            bos_token_id=vocabulary.end_id,
            eos_token_id=vocabulary.end_id,
        )
    )


@contextlib.contextmanager
def _eager(language: nn.Module) -> Iterator[None]:
    """Attention weights exist in the eager implementation only."""
    before = language.config._attn_implementation
    language.set_attn_implementation("eager")
    try:
        yield
    finally:
        language.set_attn_implementation(before)


def _tied_head(captioner: Captioner, prefix: str) -> tuple[str, str] | None:
    """Names of output and input embeddings where they are one tensor: safetensors stores no tensor twice."""
    head, table = captioner.language.get_output_embeddings(), captioner.language.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        return None
    names = {module: name for name, module in captioner.named_modules()}
    return f"{prefix}{names[head]}.weight", f"{prefix}{names[table]}.weight"


def _drop_tied_head(captioner: Captioner, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    tied = _tied_head(captioner, prefix)
    if tied is not None:
        state.pop(tied[0])


def _restore_tied_head(captioner: Captioner, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    tied = _tied_head(captioner, prefix)
    if tied is not None and tied[1] in state:
        state[tied[0]] = state[tied[1]]
