"""Parsing of annotation files, which may be damaged or come from a stranger: each error names the place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_text(file: Path) -> str:
    """Read a text file, which must be UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}); convert it") from None


def numbered_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (place for error messages, line) of the lines that are not empty."""
    # Not splitlines(): a JSON string may hold U+2028, which would cut its line in two.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            yield f"{file}, line {number}", line


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse JSON; `where` is the place that errors name."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no valid json ({error}); correct it or download it again") from None


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse JSON that must be an object."""
    row = parse_json(text, where)
    if not isinstance(row, dict):
        raise ValueError(f"{where} holds a {type(row).__name__}, expected a json object")
    return row


def check_string(value: Any, where: str) -> str:
    """Return `value` if it is a string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{where} has {value!r:.80}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} has a string with half a character: {value!r:.80}; correct it") from None
    return value


def clean_caption(caption: Any, where: str) -> str:
    """Collapse white space; a stray line separator would shift every later caption in the PTB tokenizer."""
    return " ".join(check_string(caption, where).split())


def clean_captions(captions: Any, where: str) -> tuple[str, ...]:
    """Clean a list of captions and drop empty ones."""
    if not isinstance(captions, list | tuple):
        raise ValueError(f"{where} has captions {captions!r:.80}, expected a list of strings")
    cleaned = (clean_caption(caption, where) for caption in captions)
    return tuple(caption for caption in cleaned if caption)
