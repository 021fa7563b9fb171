"""Anybody's VQ model as the tokenizer of a chain: its ids are what generator and captioner learn."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor, nn

from tavq.alignment.adapters import Adapter, adapt
from tavq.base.weights import CONFIG_FILE, local_directory
from tavq.training.checkpoint import tensor_hash

from .model import TAVQTokenizer
from .provenance import TokenizerProvenance

BASES = ("diffusers:", "call:")
DEFAULT_IMAGE_SIZE_PX = 128


class ForeignTokenizer(nn.Module):
    """What generator, captioner and `Pipeline` need of a tokenizer, from a model of another library.

    Its codes have no place in the text encoder's space, so what needs alignment refuses it: `tavq align`
    keeps the projections to text in a file of its own.

    Args:
        adapter: around the model.
    """

    def __init__(self, adapter: Adapter):
        super().__init__()
        self.adapter = adapter.eval().requires_grad_(False)
        self.image_size_px = adapter.image_size_px
        self.decode_size_px = adapter.decode_size_px
        self.num_codes = len(adapter.codebook)
        self.aligned_levels: dict[int, int] = {}
        # Where a tokenizer of this project says how it was aligned: by nothing.
        self.config = SimpleNamespace(provenance=TokenizerProvenance())
        size = self.image_size_px
        _, h, w = self.encode(torch.zeros(1, 3, size, size)).shape
        self.grid_size = (h, w)

    @property
    def codebook(self) -> Tensor:
        """(K, E)."""
        return self.adapter.codebook.detach()

    @property
    def codebook_hash(self) -> str:
        """Names this codebook; generator and captioner record it and refuse another."""
        return tensor_hash(self.codebook)

    @property
    def weights_hash(self) -> str:
        """Names all weights of the model."""
        tensors = self.adapter.base.state_dict().values()
        return tensor_hash(torch.cat([tensor.detach().float().flatten().cpu() for tensor in tensors]))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> ids (B, h, w) int64 in [0, K)."""
        # The decoder runs for nothing: libraries agree on forward() alone.
        _, captured = self.adapter.reconstruct(images)
        return captured.ids

    def encode_levels(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> ids of the only level (B, 1, h, w)."""
        return self.encode(images)[:, None]

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """ids (B, h, w) or (B, N) int64 in [0, K) -> images (B, 3, H, W) in [-1, 1]."""
        codes = self.codebook[ids.reshape(len(ids), *self.grid_size)]
        return self.adapter.decode_codes(codes.movedim(-1, 1)).clamp(-1, 1)


def open_base(source: str) -> nn.Module:
    """Open the model that `--base` names.

    Raises:
        ValueError: the kind is unknown, or MODULE:FUNCTION returns no model.
        FileNotFoundError: there is no model at PATH.
    """
    kind, _, path = source.partition(":")
    if kind == "diffusers" and path:
        return _open_diffusers(path)
    if kind == "tavq" and path:
        return TAVQTokenizer.from_pretrained(path)

    module, _, function = path.rpartition(":")
    if kind != "call" or not module:
        raise ValueError(f"--base is {source!r}, expected diffusers:PATH, tavq:PATH or call:MODULE:FUNCTION")
    try:
        model = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--base {source}: {error}; check that the module lies on PYTHONPATH") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--base {source} returned a {type(model).__name__}, expected a torch module")
    return model


def _open_diffusers(path: str) -> nn.Module:
    try:
        from diffusers import VQModel
    except ImportError as error:
        raise ValueError("--base diffusers:PATH needs the package: pip install diffusers") from error
    try:
        # No hub and no pickles: diffusers would else look for `path` there, and read .bin.
        return VQModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"no VQModel with safetensors at {path} ({reason}); name a directory that "
            "VQModel.save_pretrained wrote"
        ) from error


def open_tokenizer(source: str | Path, image_size_px: int | None = None) -> TAVQTokenizer:
    """Open a tokenizer of this project, or a VQ model of another library.

    The latter is a `ForeignTokenizer`, typed as what it stands in for: callers need not tell them apart,
    since whatever needs alignment asks for `aligned_levels` anyway.

    Args:
        source: a directory or hf:OWNER/NAME of this project's; a directory that `diffusers.VQModel` saved,
            with or without `diffusers:` before it; or call:MODULE:FUNCTION, which returns a model.
        image_size_px: side that a model of another library shall read. By default the `sample_size` of
            diffusers, and 128 for others.

    Raises:
        ValueError: the source is none of these, or an image size was given for a tokenizer of this project.
        FileNotFoundError: nothing lies there.
    """
    source = str(source)
    if not source.startswith(BASES):
        directory = local_directory(source)
        if not _saved_by_diffusers(directory):
            if image_size_px is not None:
                raise ValueError("a tokenizer of this project knows its size; leave --image-size-px out")
            return TAVQTokenizer.from_pretrained(directory)
        source = f"diffusers:{directory}"
    base = open_base(source)
    known = getattr(getattr(base, "config", None), "sample_size", None)
    adapter = adapt(base, image_size_px or known or DEFAULT_IMAGE_SIZE_PX)
    return cast(TAVQTokenizer, ForeignTokenizer(adapter))


def _saved_by_diffusers(directory: Path) -> bool:
    config = directory / CONFIG_FILE
    return config.is_file() and "_class_name" in json.loads(config.read_text())
