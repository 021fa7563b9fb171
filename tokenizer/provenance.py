"""What shaped a tokenizer's weights, as its checkpoint records it."""

from __future__ import annotations

import dataclasses
from typing import Any

TRANSPORT_METHODS = ("ot", "gaussian")
ALL_LEVELS = (1, 2, 3)
_FORMER_TEACHERS = ("perceptual", "distilled_from", "decoder_perceptual")


@dataclasses.dataclass(frozen=True)
class TokenizerProvenance:
    """Where a tokenizer comes from, and what its codes can be compared with."""

    data: str = ""
    """Name of the dataset."""
    align: str = "none"
    """How its codes were aligned with text: ot, gaussian, filip, lgvq or none."""
    aligned_levels: tuple[int, int, int] = (0, 0, 0)
    """Levels that words, phrases and sentences were aligned with; 0 for none."""
    probed: bool = False
    """Whether the projections were fitted to finished codes that were not aligned (tavq align
    --probe-only)."""
    text_encoder: str = ""
    """Name of the text encoder in whose space the projections end."""
    text_encoder_hash: str = ""
    taught_by: tuple[str, ...] = ()
    """Hashes of the networks whose features shaped the weights; none of them may measure them."""

    def taught_also_by(self, *hashes: str | None) -> TokenizerProvenance:
        """A copy that names further networks; None among them is left out."""
        named = {*self.taught_by, *(value for value in hashes if value)}
        return dataclasses.replace(self, taught_by=tuple(sorted(named)))


def migrate_provenance(stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of TokenizerProvenance from a record of any age; before 0.2 all values were strings."""
    fields = {name: value for name, value in stored.items() if name not in (*_FORMER_TEACHERS, "probe")}
    hashes = {value for name in _FORMER_TEACHERS for value in stored.get(name, "").split()}
    if hashes:
        fields["taught_by"] = sorted(hashes)
    if "probe" in stored:
        fields |= {"probed": True, "aligned_levels": ALL_LEVELS}
    elif isinstance(levels := stored.get("aligned_levels"), str):
        fields["aligned_levels"] = [0 if level == "-" else int(level) for level in levels.split()]
    elif levels is None and stored.get("align") in TRANSPORT_METHODS:
        fields["aligned_levels"] = ALL_LEVELS
    return fields
