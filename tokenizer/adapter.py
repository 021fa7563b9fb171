"""This project's own tokenizer behind the alignment's adapter interface."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tavq.alignment.adapters import Adapter, Captured
from tavq.alignment.projections import TextProjections

from .model import TAVQTokenizer


class TAVQAdapter(Adapter):
    """This project's own tokenizer, whose encoder gives the three levels itself."""

    base: TAVQTokenizer
    latent_module = "encoder"
    quantizer_module = "quantizer"

    def __init__(self, base: TAVQTokenizer, image_size_px: int, stages: tuple[str, ...] | None = None):
        nn.Module.__init__(self)
        self.base = base
        self.image_size_px = image_size_px
        self.heads = nn.ModuleList()
        self.check()
        if stages is not None or image_size_px != base.image_size_px:
            raise ValueError(
                f"got {image_size_px} px and stages {stages}, this tokenizer reads {base.image_size_px} px "
                f"and has its own stages; set --image-size-px {base.image_size_px} and no --stages"
            )

    @property
    def codebook(self) -> Tensor:
        return self.base.quantizer.codebook

    @property
    def decode_size_px(self) -> int:
        return self.base.decode_size_px

    @property
    def projections(self) -> TextProjections:
        return self.base.projections

    @contextlib.contextmanager
    def capture(self) -> Iterator[Captured]:
        captured = Captured()
        with self._outputs("encoder", "quantizer") as outputs:
            yield captured

        latents = outputs["encoder"]
        quantized = outputs["quantizer"]
        normalise = self.base.quantizer.normalise
        captured.features = [normalise(level.movedim(1, -1)).movedim(-1, 1) for level in latents]
        captured.ids = quantized.ids.view(len(latents[0]), *self.base.grid_size)
        captured.quantizer_loss = quantized.loss
        captured.shared_activations = latents

    def decoded_images(self, output: Any) -> Tensor:
        return output.images

    def save(self, directory: Path) -> None:
        self.base.save_pretrained(directory)
