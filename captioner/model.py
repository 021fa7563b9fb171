"""The captioner: a bidirectional encoder of image tokens, and a causal language model of `transformers`.

The encoded image tokens are a prefix of the sentence, as in ClipCap (Mokady et al. 2021, arXiv:2111.09734).
There is no cross-attention, so that any causal language model fits.

Shapes: B images, N = h*w image tokens, G captions of each image (a group), T words of a caption,
L = N + G * (T + 1) length of the packed sequence, D width of the language model, E code width, K codes,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tavq.base.bounds import check_bounds
from tavq.base.hub import DATA_ONLY, TRANSFORMERS_FILES, directory_of
from tavq.base.processes import drawn_for_rows
from tavq.training.checkpoint import Checkpointed
from tavq.training.provenance import TokenProvenance

from .config import CaptionerShape, Style
from .vocabulary import PretrainedVocabulary, Vocabulary, WordVocabulary

TEXT_TOKENIZER_FOLDER = "text_tokenizer"


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
    """Everything that a captioner is built from: its size, its image tokens and its vocabulary."""

    shape: CaptionerShape
    num_codes: int
    code_dim: int
    grid_size: tuple[int, int]
    codebook_hash: str
    """Hash of the codebook that the image tokens come from."""
    words: tuple[str, ...] = ()
    """Words of the vocabulary, most frequent first; empty with a pretrained decoder, which brings its own."""
    decoder_config: dict[str, Any] | None = None
    """Configuration of the pretrained decoder, so that a checkpoint loads without its source."""
    provenance: TokenProvenance = TokenProvenance()
    """Data, tokenizer and stage of training that gave these weights."""

    def __post_init__(self) -> None:
        check_bounds(self, num_codes=(1, 2**24), code_dim=(1, 2**14), grid_size=(1, 1024))


class ImageEncoder(nn.Module):
    """Encode ids (B, N) in [0, K) as the prefix (B, N, D) of the language model, by bidirectional blocks."""

    def __init__(self, config: CaptionerConfig, prefix_dim: int):
        super().__init__()
        shape = config.shape
        h, w = config.grid_size

        self.code_embedding = nn.Embedding(config.num_codes, config.code_dim)
        self.in_proj = nn.Linear(config.code_dim, shape.width)
        self.mask_token = nn.Parameter(torch.randn(shape.width) * 0.02)
        self.row_embedding = nn.Parameter(torch.randn(h, 1, shape.width) * 0.02)
        self.column_embedding = nn.Parameter(torch.randn(1, w, shape.width) * 0.02)

        block = nn.TransformerEncoderLayer(
            shape.width,
            shape.num_heads,
            4 * shape.width,
            dropout=shape.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        # No dropout on attention weights: with it the CPU has no fused kernel, 1.7 s a step instead of 1.3 s.
        block.self_attn.dropout = 0.0
        self.blocks = nn.TransformerEncoder(block, shape.encoder_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(shape.width)
        self.out_proj = nn.Linear(shape.width, prefix_dim) if prefix_dim != shape.width else nn.Identity()
        self.token_dropout = shape.token_dropout

    def initialize_from(self, codebook: Tensor) -> None:
        """Set the code embeddings to `codebook` (K, E), scaled to a root mean square of 1.

        A fresh `nn.Embedding` has the same scale, so the layers behind it start as usual.
        """
        weight = self.code_embedding.weight
        if codebook.shape != weight.shape:
            raise ValueError(
                f"the codebook has shape {tuple(codebook.shape)}, expected {tuple(weight.shape)}; "
                "give the one of the tokenizer that made the tokens"
            )
        with torch.no_grad():
            weight.copy_(codebook / codebook.square().mean().sqrt())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.in_proj(self.code_embedding(ids))

        # The mask comes before the positions: a masked token is unknown, its place is not.
        if self.training and self.token_dropout:
            masked = drawn_for_rows(torch.rand, *ids.shape, device=ids.device) < self.token_dropout
            x = torch.where(masked[..., None], self.mask_token, x)
        x = x + (self.row_embedding + self.column_embedding).flatten(0, 1)

        return self.out_proj(self.norm(self.blocks(x)))


class Captioner(Checkpointed):
    """Image tokens -> logits of words. `decoding.decode_captions` turns them into captions."""

    config_class = CaptionerConfig
    kind = "ta-vq-captioner"
    renamed_weights: ClassVar[dict[str, str]] = {
        "image.codes.": "image_encoder.code_embedding.",
        "image.enter.": "image_encoder.in_proj.",
        "image.hidden": "image_encoder.mask_token",
        "image.rows": "image_encoder.row_embedding",
        "image.columns": "image_encoder.column_embedding",
        "image.leave.": "image_encoder.out_proj.",
        "image.": "image_encoder.",
        "language.": "language_model.",
        "starts.": "start_embedding.",
    }

    def __init__(self, config: CaptionerConfig, language_model: Any = None):
        """Build from `config`, around the pretrained decoder `language_model` or an untrained one."""
        super().__init__()
        self.config = config
        self.language_model = _untrained_language_model(config) if language_model is None else language_model
        # A pretrained decoder may bring generation settings of its own, which our checkpoints would not keep.
        self.language_model.generation_config = type(self.language_model.generation_config)()
        # With a padding id in the config, transformers warns about the padding that its own search has made.
        self.language_model.config.pad_token_id = None

        self._text: Vocabulary | None = WordVocabulary(config.words) if config.words else None
        dim = self.language_model.get_input_embeddings().embedding_dim
        self.image_encoder = ImageEncoder(config, dim)

        # One start token per quality bucket, and one more for the long style.
        num_starts = max(1, config.shape.quality_buckets) + bool(config.shape.long_words)
        self.start_embedding = nn.Embedding(num_starts, dim)
        nn.init.normal_(self.start_embedding.weight, std=0.02)

        # safetensors stores no tensor twice; these hooks leave out a tied output head and restore it.
        self.register_state_dict_post_hook(_drop_tied_head)
        self.register_load_state_dict_pre_hook(_restore_tied_head)

    @property
    def text(self) -> Vocabulary:
        """The vocabulary. That of a pretrained decoder is set once the decoder has been loaded."""
        if self._text is None:
            raise RuntimeError("the vocabulary of the pretrained decoder has not been loaded")
        return self._text

    @text.setter
    def text(self, vocabulary: Vocabulary) -> None:
        self._text = vocabulary

    @property
    def num_tokens(self) -> int:
        """N."""
        h, w = self.config.grid_size
        return h * w

    def start_id(self, style: Style = "short") -> int:
        """Return the start token of a style; for captions it is that of the best quality bucket."""
        if style == "short":
            return max(1, self.config.shape.quality_buckets) - 1
        if not self.config.shape.long_words:
            raise ValueError("this captioner was trained on captions alone; use --style short")
        return self.start_embedding.num_embeddings - 1

    def max_words(self, style: Style) -> int:
        """Return the maximum length of a text of `style`."""
        return self.config.shape.max_words if style == "short" else self.config.shape.long_words

    def check_codebook(self, codebook_hash: str) -> None:
        """Raise ValueError unless `codebook_hash` is that of the codebook this captioner was trained on."""
        if codebook_hash != self.config.codebook_hash:
            raise ValueError(
                f"the tokens are of codebook {codebook_hash}, the captioner was trained on "
                f"{self.config.codebook_hash}; use its tokenizer, or train a captioner on these tokens"
            )

    def prefix_embeddings(self, ids: Tensor, style: Style = "short") -> Tensor:
        """Embed what precedes the first word, image tokens and start token: ids (B, N) -> (B, N + 1, D)."""
        start = self.start_embedding.weight[self.start_id(style)].expand(len(ids), 1, -1)
        return torch.cat([self.image_encoder(self._checked(ids)), start], dim=1)

    def forward(self, ids: Tensor, words: Tensor, starts: Tensor | None = None) -> Tensor:
        """Compute the logits of G captions of each image, packed into one sequence behind one prefix.

        A caption attends to the image and to itself, never to another caption. So the image is encoded once
        for all of its captions.

        Args:
            ids: (B, N) int64 in [0, K).
            words: (B, G, T) int64, padded at the right with any id.
            starts: (B, G) int64 start tokens; `start_id()` by default.

        Returns:
            (B, G, T + 1, V): entry t predicts word t, and the last one what follows the last word.
        """
        return self._packed(ids, words, starts).logits.unflatten(1, (words.shape[1], -1))

    def attention_maps(self, ids: Tensor, words: Tensor, starts: Tensor | None = None) -> Tensor:
        """Compute how much each word's prediction attends to each image token, mean over layers and heads.

        Returns:
            (B, G, T + 1, N), non-negative; each row sums to 1.
        """
        with _eager_attention(self.language_model):
            layers = self._packed(ids, words, starts, output_attentions=True).attentions
        weights = torch.stack(layers).float().mean(dim=(0, 2))

        # What a word attends to among the words is left out; the rest is normalised to a distribution again.
        to_image = weights[:, self.num_tokens :, : self.num_tokens]
        return (to_image / to_image.sum(-1, keepdim=True)).unflatten(1, (words.shape[1], -1))

    def _packed(self, ids: Tensor, words: Tensor, starts: Tensor | None, **options: Any) -> Any:
        """Run the language model over image prefix and captions, packed into one sequence of length L."""
        B, G, T = words.shape
        if starts is None:
            starts = torch.full((B, G), self.start_id(), device=ids.device)
        starts_BG1D = self.start_embedding(starts)[:, :, None]
        words_BGTD = self.language_model.get_input_embeddings()(words)
        text = torch.cat([starts_BG1D, words_BGTD], dim=2).flatten(1, 2)

        return self.language_model(
            inputs_embeds=torch.cat([self.image_encoder(self._checked(ids)), text], dim=1),
            attention_mask=packed_mask(self.num_tokens, G, T + 1, text),
            position_ids=packed_positions(self.num_tokens, G, T + 1, ids.device),
            logits_to_keep=G * (T + 1),
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
        if isinstance(self._text, PretrainedVocabulary):
            self._text.save(Path(directory) / TEXT_TOKENIZER_FOLDER)

    def load_beside(self, directory: Path) -> None:
        """Load the sub-word tokenizer, where the vocabulary is a pretrained decoder's."""
        if self._text is None:
            self.text = PretrainedVocabulary.load(directory / TEXT_TOKENIZER_FOLDER)


def create_captioner(config: CaptionerConfig) -> Captioner:
    """Create an untrained captioner; with `shape.decoder`, around that language model and its tokenizer.

    Raises:
        FileNotFoundError: there is no directory or repository of that name.
        ValueError: it holds no language model in safetensors.
    """
    if config.shape.decoder is None:
        return Captioner.from_config(config)

    from transformers import AutoModelForCausalLM

    directory = directory_of(config.shape.decoder, TRANSFORMERS_FILES)
    try:
        language_model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, **DATA_ONLY
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"no causal language model of transformers in {directory} ({reason}); check --model.decoder"
        ) from error

    config = dataclasses.replace(config, words=(), decoder_config=language_model.config.to_dict())
    captioner = Captioner(config, language_model)
    captioner.text = PretrainedVocabulary.load(directory)
    return captioner


def packed_positions(num_tokens: int, captions: int, length: int, device: torch.device) -> Tensor:
    """Number the positions of a packed sequence, each caption from N on: (1, N + captions * length)."""
    image = torch.arange(num_tokens, device=device)
    text = torch.arange(num_tokens, num_tokens + length, device=device).repeat(captions)
    return torch.cat([image, text])[None]


def packed_mask(num_tokens: int, captions: int, length: int, like: Tensor) -> Tensor:
    """Make the additive attention mask (1, 1, L, L) of a packed sequence: causal, captions apart."""
    caption = torch.arange(captions, device=like.device).repeat_interleave(length)
    segment = torch.cat([caption.new_full((num_tokens,), -1), caption])  # -1 is the image prefix

    allowed = (segment[None] == -1) | (segment[None] == segment[:, None])
    allowed &= torch.ones_like(allowed).tril()

    # transformers masks with the lowest finite number, not with -inf
    lowest = torch.finfo(like.dtype).min
    mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(~allowed, lowest)
    return mask[None, None]


def _untrained_language_model(config: CaptionerConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    if config.decoder_config is not None:
        decoder = AutoConfig.for_model(**config.decoder_config)
        return AutoModelForCausalLM.from_config(decoder, trust_remote_code=False)

    shape = config.shape
    h, w = config.grid_size
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
            attn_pdrop=0.0,  # as in the image encoder
            bos_token_id=vocabulary.end_id,
            eos_token_id=vocabulary.end_id,
        )
    )


@contextlib.contextmanager
def _eager_attention(language_model: Any) -> Iterator[None]:
    """Switch to the eager attention, the only implementation that returns its weights."""
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)


def _tied_head(captioner: Captioner, prefix: str) -> tuple[str, str] | None:
    """Return the keys of the output head and of the input embeddings where they are one tensor, else None."""
    head = captioner.language_model.get_output_embeddings()
    embeddings = captioner.language_model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return None
    names = {module: name for name, module in captioner.named_modules()}
    return f"{prefix}{names[head]}.weight", f"{prefix}{names[embeddings]}.weight"


def _drop_tied_head(captioner: Captioner, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    keys = _tied_head(captioner, prefix)
    if keys is not None:
        head, _ = keys
        state.pop(head)


def _restore_tied_head(captioner: Captioner, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    keys = _tied_head(captioner, prefix)
    if keys is None:
        return
    head, embeddings = keys
    if embeddings in state:
        state[head] = state[embeddings]
