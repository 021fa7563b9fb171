"""What is computed once and kept on disk: where it lies, and tensors that are computed at the first call."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CACHES = {
    "token_index": "where each image of a token set lies in its shards",
    "remote_shards": "what remote shards of images hold, and where",
    "parquet_images": "images of parquet files, of the hub and local, as far as they were read",
    "text_vectors": "one vector for each caption and text unit, from the text encoder",
    "text_units": "words, phrases and sentences of the captions that a tokenizer is aligned with",
    "token_states": "one state for each token of the captions that a generator trains on",
    "caption_words": "word ids of the captions that a captioner trains on",
    "teacher_maps": "feature maps of the training images, from the network that is distilled",
    "classes": "semantic classes of the positions of training images (tavq train tokenizer --classes)",
    "image_features": "features of the images that an evaluation compares with",
}
"""Name, which is also that of the folder -> what it holds."""


def cache_directory(name: str) -> Path:
    """Return the folder of one of the `CACHES`; it may not exist yet.

    They lie below `$TAVQ_CACHE`, or `tavq` in the cache directory of the platform.
    """
    if name not in CACHES:
        raise ValueError(f"unknown cache {name!r}; choose one of {', '.join(CACHES)}")
    return cache_root() / name


def cache_root() -> Path:
    """Return `$TAVQ_CACHE`, or `tavq` in the cache directory of the platform."""
    if root := os.environ.get("TAVQ_CACHE"):
        return Path(root)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tavq"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "tavq"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tavq"


def cached_tensors(directory: Path, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what `compute` returned at the first call with this `key`; other processes wait for that.

    Args:
        directory: of the cache, see `cache_directory`.
        key: hash of all that the tensors depend on; it becomes the name of a file.
        compute: makes the tensors, by name.
    """
    from safetensors.torch import load_file, save_file

    from .arrays import build_once

    def build(path: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in compute().items()}, path)

    path = build_once(directory / f"{key}.safetensors", build)
    # Also read after writing, so that a first and a second call return the same bits.
    return load_file(path)
