"""Where the weights of a model that trains on tokens come from, as its checkpoint records it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TokenProvenance:
    """The tokens that a generator or captioner was trained on."""

    data: str = ""
    """Name of the dataset."""
    tokenizer: str = ""
    """Hash of the tokenizer's weights."""
    stage: str = ""
    """Last stage of training, where there are several."""
