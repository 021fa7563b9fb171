"""Align the codes of any VQ model with text: `from tavq.alignment import TextAligner, adapt`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import AlignmentConfig

if TYPE_CHECKING:
    from .adapters import Adapter, Captured, adapt
    from .aligner import Alignment, TextAligner
    from .unit_index import SampledTexts, TextUnits, UnitIndex

__all__ = [
    "Adapter",
    "Alignment",
    "AlignmentConfig",
    "Captured",
    "SampledTexts",
    "TextAligner",
    "TextUnits",
    "UnitIndex",
    "adapt",
]

_MODULES = {
    "Adapter": "adapters",
    "Captured": "adapters",
    "adapt": "adapters",
    "Alignment": "aligner",
    "TextAligner": "aligner",
    "SampledTexts": "unit_index",
    "TextUnits": "unit_index",
    "UnitIndex": "unit_index",
}


def __getattr__(name: str) -> Any:
    """Load the public names on first use, so that `tavq.alignment.config` can be read without torch."""
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
