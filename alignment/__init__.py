"""Align the codes of any VQ model with text: `from tavq.alignment import TextAligner, adapt`."""

from .adapters import Adapter, Captured, adapt
from .aligner import Alignment, AlignmentConfig, TextAligner
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
