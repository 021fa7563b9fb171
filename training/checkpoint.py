"""A checkpoint is a directory: `config.json`, `model.safetensors`, and a model card `README.md`.

`config.json` also holds the SHA-256 of the weights, which is compared when they are loaded. Each file is
written by `atomic_write`: a killed process leaves the old file or the new one, never half.

A checkpoint may come from a stranger. Nothing in it is code; a configuration that does not fit its weights
is refused before memory is taken for it (`building.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tavq.base.arguments import from_dict, to_plain
from tavq.base.files import atomic_write, file_sha256
from tavq.base.hub import HUB_PREFIX
from tavq.base.weights import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, local_directory

from .building import check_fits, check_memory

MAX_CONFIG_BYTES = 2**24  # the largest of ours, a captioner's with its vocabulary, has 2**15


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

        # both are complete before either takes its place: a kill hardly leaves a pair that does not fit
        with contextlib.ExitStack() as stack:
            weights = stack.enter_context(atomic_write(directory / WEIGHTS_FILE))
            description = stack.enter_context(atomic_write(directory / CONFIG_FILE))
            save_file(tensors, weights)
            config["weights_sha256"] = file_sha256(weights)
            description.write_text(json.dumps(config, indent=2) + "\n")

        if self.card or not (directory / CARD_FILE).exists():
            with atomic_write(directory / CARD_FILE) as path:
                path.write_text(
                    self.card or f"# {self.kind} of TA-VQ\n\nNo training is recorded for these weights.\n"
                )

    def _stored(self, name: str, tensor: Tensor, half: bool) -> Tensor:
        keep = not half or name in self.float32_weights or not tensor.is_floating_point()
        return tensor.detach().cpu().contiguous() if keep else tensor.detach().cpu().half().contiguous()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **changes: Any,
    ) -> Self:
        """Load from a directory, or from the Hugging Face hub.

        Args:
            source: a directory, or `hf:OWNER/NAME[@REVISION]`.
            revision: branch, tag or commit on the hub.
            token: of the hub; True takes the one that `hf auth login` stored.
            cache_dir: where downloads lie.
            local_files_only: download nothing.
            force_download: download what lies in the cache, too.
            changes: fields of the configuration to replace.

        Raises:
            FileNotFoundError: the directory holds no checkpoint, or the hub has no such repository.
            ValueError: the checkpoint is of another kind, its configuration has an unknown field or a value
                out of bounds, or its weights are damaged or do not fit.
        """
        directory = local_directory(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        stored = read_config(directory, cls.kind, cls.former_kinds)
        expected_hash = stored.pop("weights_sha256", None)
        values = cls.migrate_config(
            {cls.renamed_fields.get(name, name): value for name, value in stored.items()}
        )
        config: Any = from_dict(cls.config_class, values, source=str(directory))
        config = dataclasses.replace(config, **changes)

        weights = directory / WEIGHTS_FILE
        check_fits(cls, config, weights, cls._todays_name)
        if expected_hash is not None and file_sha256(weights) != expected_hash:
            raise ValueError(
                f"{weights} is not the file that {CONFIG_FILE} was saved with: its SHA-256 is another; "
                f"copy both anew"
            )
        model = cls(config)
        model.load_state_dict(
            {
                cls._todays_name(name): tensor.float() if tensor.is_floating_point() else tensor
                for name, tensor in load_file(weights).items()
            }
        )
        card = directory / CARD_FILE
        model.card = card.read_text(errors="replace") if card.is_file() else ""
        model.load_beside(directory)
        return model.eval()

    def load_beside(self, directory: Path) -> None:
        """Load what a subclass keeps in `directory` beside configuration and weights; nothing by default."""

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Build with random weights, to be trained.

        Raises:
            ValueError: training would need more memory than this machine has; none has been taken yet.
        """
        check_memory(cls, config)
        return cls(config)

    @classmethod
    def migrate_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The fields of `config_class` from those of an older checkpoint, where their values changed."""
        return config

    @classmethod
    def _todays_name(cls, key: str) -> str:
        for old, new in cls.renamed_weights.items():
            key = key.replace(old, new)
        return key

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload of a TA-VQ model",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Upload to the Hugging Face hub, making the repository when needed.

        Args:
            repo_id: OWNER/NAME, with or without `hf:`.
            commit_message: of the commit.
            private: whether a new repository is private; the account's default if None.
            token: of the hub; the one that `hf auth login` stored if None.
            branch: to commit to; the main branch if None.
            create_pr: open a pull request instead of committing to the branch.

        Returns:
            The address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = repo_id.removeprefix(HUB_PREFIX)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )
        return str(commit)


def read_config(directory: Path, kind: str, former_kinds: Sequence[str] = ()) -> dict[str, Any]:
    """Return the configuration in `directory`, checked to be of `kind`.

    Of the fields that describe the file itself, `weights_sha256` alone is left in, where there is one.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no {CONFIG_FILE}; a {kind} checkpoint holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    config = read_json(path)
    stored_kind = config.pop("kind", None)
    config.pop("weights", None)
    if stored_kind not in (kind, *former_kinds):
        raise ValueError(
            f"{directory} holds a {stored_kind or 'foreign checkpoint'}, expected a {kind}; "
            "name its directory"
        )
    if not (directory / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"{directory} has {CONFIG_FILE} but no {WEIGHTS_FILE}; copy or train the weights"
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of finite numbers. Raises ValueError, naming the file, for anything else."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it is larger than {MAX_CONFIG_BYTES} bytes")
        values = json.loads(path.read_text(), parse_constant=_refuse, parse_float=_finite)
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no configuration: {error}") from error
    return values


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no finite number")
