"""A checkpoint is a directory: `config.json`, `model.safetensors`, and a model card `README.md`.

Each file is written by `atomic_write`: a killed process leaves the old file or the new one, never half.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tavq.base.arguments import from_dict, to_plain
from tavq.base.files import atomic_write

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"


def tensor_hash(tensor: Tensor) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a tensor's values, as float32 in row order."""
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


class Checkpointed(nn.Module):
    """A module that saves to a checkpoint directory and loads from one, or from a repository of the Hugging
    Face hub.

    A subclass has a frozen dataclass `config`, the class of it in `config_class`, is built from it alone, and
    names in `float32_weights` the tensors that stay in full precision when the rest is saved in half.
    """

    config_class: ClassVar[type]
    kind: ClassVar[str]
    former_kinds: ClassVar[tuple[str, ...]] = ()
    """What `config.json` called this kind in earlier versions; such checkpoints still load."""
    renamed_weights: ClassVar[dict[str, str]] = {}
    """Old part of a state-dict key -> its name today; checkpoints written before a renaming still load."""
    renamed_fields: ClassVar[dict[str, str]] = {}
    """Old field of `config.json` -> its name today, likewise."""
    float32_weights: ClassVar[tuple[str, ...]] = ()
    card: str = ""

    def save_pretrained(self, directory: str | Path, *, half: bool = False) -> None:
        """Write `config.json`, `model.safetensors` and the model card into `directory`.

        Args:
            directory: made when it does not exist; other files in it are left alone.
            half: store float16, except the tensors named in `float32_weights`. Loading always gives float32.
        """
        directory = Path(directory)
        config = {"kind": self.kind, "weights": "float16" if half else "float32", **to_plain(self.config)}
        tensors = {name: self._stored(name, tensor, half) for name, tensor in self.state_dict().items()}
        with atomic_write(directory / WEIGHTS_FILE) as path:
            save_file(tensors, path)
        with atomic_write(directory / CONFIG_FILE) as path:
            path.write_text(json.dumps(config, indent=2) + "\n")
        if self.card or not (directory / CARD_FILE).exists():
            with atomic_write(directory / CARD_FILE) as path:
                path.write_text(
                    self.card or f"# {self.kind} of TA-VQ\n\nNo training is recorded for these weights.\n"
                )

    def _stored(self, name: str, tensor: Tensor, half: bool) -> Tensor:
        keep = not half or name in self.float32_weights or not tensor.is_floating_point()
        return tensor.detach().cpu().contiguous() if keep else tensor.detach().cpu().half().contiguous()

    @classmethod
    def from_pretrained(cls, source: str | Path, **changes: Any) -> Self:
        """Load from a directory or a hub id; `changes` replace fields of the configuration.

        Raises:
            FileNotFoundError: the directory holds no checkpoint, or the hub has no such repository.
            ValueError: the checkpoint is of another kind, or its configuration has an unknown field.
        """
        directory = local_directory(source)
        stored = read_config(directory, cls.kind, cls.former_kinds)
        config = {cls.renamed_fields.get(name, name): value for name, value in stored.items()}
        model = cls(
            dataclasses.replace(from_dict(cls.config_class, config, source=str(directory)), **changes)
        )
        tensors = load_file(directory / WEIGHTS_FILE)
        model.load_state_dict(
            {cls._todays_name(name): t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        )
        card = directory / CARD_FILE
        model.card = card.read_text() if card.exists() else ""
        return model.eval()

    @classmethod
    def _todays_name(cls, key: str) -> str:
        for old, new in cls.renamed_weights.items():
            key = key.replace(old, new)
        return key

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload to the Hugging Face hub, making the repository when needed. Returns the address of the
        commit."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return str(api.upload_folder(repo_id=repo_id, folder_path=directory))


def local_directory(source: str | Path) -> Path:
    """The directory that `source` names: a path as it is, or a hub id (`owner/name`) downloaded to the
    cache."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise FileNotFoundError(
            f"no directory {source}; give a checkpoint directory or a hub id such as owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{source} is neither a directory here nor on the hub ({reason}); check the name"
        ) from error


def read_config(directory: Path, kind: str, former_kinds: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration in `directory`, checked to be of `kind`, without the fields that describe the file
    itself."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no {CONFIG_FILE}; a {kind} checkpoint holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    config = json.loads(path.read_text())
    found = config.pop("kind", None)
    config.pop("weights", None)
    if found not in (kind, *former_kinds):
        raise ValueError(
            f"{directory} holds a {found or 'foreign checkpoint'}, expected a {kind}; name its directory"
        )
    if not (directory / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"{directory} has {CONFIG_FILE} but no {WEIGHTS_FILE}; copy or train the weights"
        )
    return config
