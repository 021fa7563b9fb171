"""Prompts as callers give them: one text or several.

Nothing here imports torch: the command line checks prompts before it loads a model.
"""

from __future__ import annotations

from collections.abc import Sequence


def texts_of(texts: str | Sequence[str], name: str) -> list[str]:
    """Return one text or several as a list; anything else is a TypeError that names the argument."""
    found = [texts] if isinstance(texts, str) else list(texts)
    for text in found:
        if not isinstance(text, str):
            raise TypeError(f"{name} is a {type(text).__name__}, expected a text or a list of texts")
    return found


def negatives_of(negative_prompt: str | Sequence[str] | None, count: int) -> list[str | None]:
    """Return the negative prompt of each prompt; None where there is none, or a blank one."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        negative_prompt = [negative_prompt or ""] * count
    return [text if text.strip() else None for text in texts_of(negative_prompt, "negative_prompt")]


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise ValueError if a prompt is empty."""
    texts_of(prompts, "prompt")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty; describe the image in a few words")
