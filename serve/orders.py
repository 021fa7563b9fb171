"""What the gateway asks the models for, and what they give back. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from tavq.generator.config import SamplingConfig
from tavq.ranking import RankBy


@dataclasses.dataclass(frozen=True)
class Order:
    """One image that a client asks for."""

    prompt: str
    seed: int
    settings: SamplingConfig
    """`micro_batch` is chosen here."""
    negative_prompt: str = ""
    best_of: int = 1
    rank_by: RankBy = "sum"
    every_rows: int = 1
    """Rows between previews, where it is streamed."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A generated image, or a preview of one."""

    png: bytes
    rows: int
    """Rows of tokens that are sampled."""
    ids: list[list[int]]
    recipe: dict[str, Any]
    batch: int
    """Orders that were decoded together."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """Why a request is not answered, in one line."""

    reason: str
