"""What is wrong with a description that a model wrote, as far as the text itself shows it."""

from __future__ import annotations

import re
from collections import Counter

FEWEST_WORDS = 5
REPEATED_WORDS = 4  # a run of so many words that occurs `REPEATED_TIMES` is a loop of the model
REPEATED_TIMES = 3
_REFUSAL = re.compile(
    r"\bas an ai\b|\bi('m| am) (sorry|unable|not able)\b|\bi (can't|cannot|can not) (see|view|help|describe|"
    r"assist|provide|process|identify)\b|\bno image\b.{0,20}\b(provided|attached|given|see)\b|"
    r"\b(provide|upload|attach) (an|the|your) image\b",
    flags=re.IGNORECASE,
)


def fault_of(text: str) -> str | None:
    """Return why a description is no use: "empty", "refusal" or "repetition"; None if nothing is wrong."""
    words = re.findall(r"[\w'-]+", text.lower())
    if len(words) < FEWEST_WORDS:
        return "empty"
    if _REFUSAL.search(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")):
        return "refusal"
    runs = Counter(zip(*(words[start:] for start in range(REPEATED_WORDS)), strict=False))
    if max(runs.values(), default=0) >= REPEATED_TIMES:
        return "repetition"
    return None


def whole_sentences(text: str) -> str:
    """Collapse white space, and cut off a last sentence that the limit of tokens left unfinished."""
    text = " ".join(text.split())
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1].rstrip() if end > 0 else text
