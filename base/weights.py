"""Where checkpoints lie: the weights that come with the package, directories, the Hugging Face hub."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

from .files import file_hash
from .hub import directory_of

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CARD_FILE = "README.md"
FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    DIFFUSERS_WEIGHTS_FILE,
    CARD_FILE,
    "text_tokenizer/*.json",
    "text_tokenizer/*.txt",
)
SHIPPED = "flickr8k"
PARTS = ("tokenizer", "generator", "captioner", "lexicon")


def shipped_checkpoint() -> Path:
    """Return the directory of the weights that come with the package: tokenizer/, generator/, captioner/.

    It is `checkpoints/flickr8k` in a checkout, and lies in site-packages otherwise.
    """
    return Path(str(importlib.resources.files("tavq.checkpoints").joinpath(SHIPPED)))


def local_directory(source: str | Path, **hub: Any) -> Path:
    """Return the directory of the checkpoint `source`: a path, or `hf:OWNER/NAME[@REVISION]`, downloaded.

    Args:
        source: of one model, or of tokenizer/, generator/ and captioner/.
        hub: options of `base.hub.directory_of`: revision, token, cache_dir, local_files_only, force_download.

    Raises:
        FileNotFoundError: no such directory, or no such repository.
    """
    return directory_of(source, [pattern for file in FILES for pattern in (file, f"*/{file}")], **hub)


def weights_file(directory: Path) -> Path:
    """Return the file of a model's weights, of this project or, where that is absent, of diffusers."""
    own, diffusers = directory / WEIGHTS_FILE, directory / DIFFUSERS_WEIGHTS_FILE
    return own if own.is_file() or not diffusers.is_file() else diffusers


def part_hashes(directory: Path) -> dict[str, str]:
    """Return the first digits of the SHA-256 of the weights of each part that a checkpoint holds."""
    files = {part: weights_file(directory / part) for part in PARTS}
    return {part: file_hash(path) for part, path in files.items() if path.is_file()}


CHECKPOINT = str(shipped_checkpoint())
"""The checkpoint that a command takes where none is named."""
