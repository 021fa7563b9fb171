"""How ids are drawn from the generator."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from .linear import Precision


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How ids are drawn."""

    guidance: float = 4.5
    """Weight of the text: logits = null + guidance * (text - null). 1 means none."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How guidance rises from 1 at the first token to its value at the last."""
    temperature: float = 1.0
    """0 takes the likeliest code each time."""
    top_k: int = 100
    """Draw among so many likeliest codes; 0 means all."""
    top_p: float = 1.0
    """Draw among the likeliest codes that hold this much probability."""
    precision: Precision = "float32"
    """Of the weights while decoding. Other than float32 draws a slightly different image, faster: int8 on the
    CPU (the inputs of each layer too), bfloat16 on CUDA."""
    micro_batch: int = 1
    """Images decoded together; fewer are padded to it, so that every image is computed alike."""
    draft_tokens: int = 8
    """Tokens guessed ahead and checked in one forward pass (speculative Jacobi decoding); 1 guesses none. The
    tokens stay the same. 8 with micro_batch 1 is fast for one image, 1 with micro_batch 4 for many."""
    compile: bool = False
    """Compile the forward pass with torch.compile: costs half a minute at the start. For CUDA; on the CPU
    the decoder's own layouts are faster (docs/experiments.md)."""

    def __post_init__(self) -> None:
        limits = {
            "guidance": (self.guidance >= 0, "0 or more"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "micro_batch": (self.micro_batch >= 1, "1 or more"),
            "draft_tokens": (self.draft_tokens >= 1, "1 (no drafts) or more"),
        }
        for name, (holds, expected) in limits.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}; change it")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is {self.precision!r}; choose {', '.join(get_args(Precision))}")
        if self.guidance_schedule not in ("constant", "linear", "cosine"):
            raise ValueError(
                f"guidance_schedule is {self.guidance_schedule!r}; choose constant, linear or cosine"
            )

    @property
    def branches(self) -> int:
        """Rows an image takes: one with its text and, with guidance, one with the null text."""
        return 1 if self.guidance == 1 else 2

    def guidance_at(self, position: int, num_tokens: int) -> float:
        """Guidance of the token at `position`."""
        share = position / max(1, num_tokens - 1)
        rise = {"constant": 1.0, "linear": share, "cosine": (1 - math.cos(math.pi * share)) / 2}
        return 1 + (self.guidance - 1) * rise[self.guidance_schedule]
