"""Dense descriptions beside a dataset: long_text.jsonl, a ShareGPT4V json, or .long.txt side-cars."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .dataset import Example
from .layouts_json import read_json

_SHAREGPT4V = ("sharegpt4v*.json", "share-captioner*.json", "long_text.json")


def attach_long_text(examples: list[Example], folder: Path) -> list[Example]:
    """Give each example the description that names it, by id or by file name; others keep what they have.

    Raises:
        ValueError: a file of descriptions is malformed, or names none of the examples.
    """
    file = next(
        (
            file
            for pattern in ("long_text.jsonl", *_SHAREGPT4V)
            for file in sorted(folder.glob(pattern))
            if file.is_file()
        ),
        None,
    )
    texts = _read(file) if file else {}
    with_text = [replace(example, long_text=_text_of(example, texts)) for example in examples]
    if texts and not any(example.long_text for example in with_text):
        raise ValueError(
            f"{file} describes {len(texts)} images, none of them in the dataset (first: "
            f"{next(iter(texts))}, the dataset has {examples[0].id}); use its ids or file names"
        )
    return with_text


def _text_of(example: Example, texts: dict[str, str]) -> str | None:
    if not isinstance(example.image, Path):  # in a shard
        return texts.get(example.id) or example.long_text
    sidecar = example.image.with_suffix(".long.txt")
    if sidecar.is_file():
        return " ".join(sidecar.read_text(encoding="utf-8").split()) or example.long_text
    return texts.get(example.id) or texts.get(example.image.stem) or example.long_text


def _read(file: Path) -> dict[str, str]:
    if file.suffix == ".jsonl":
        return dict(_jsonl_pair(line, f"{file}, line {n}") for n, line in _numbered(file))
    return dict(_sharegpt4v_pair(entry, file) for entry in read_json(file))


def _numbered(file: Path) -> Iterable[tuple[int, str]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _jsonl_pair(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        name = str(row["id"]) if "id" in row else Path(row["image"]).stem
        return name, " ".join(row["text"].split())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{where} cannot be read ({error}); expected {{"id" or "image", "text"}}') from None


def _sharegpt4v_pair(entry: Any, file: Path) -> tuple[str, str]:
    try:
        answer = next(turn["value"] for turn in entry["conversations"] if turn["from"] == "gpt")
        return Path(entry["image"]).stem, " ".join(answer.split())
    except (KeyError, TypeError, StopIteration) as error:
        raise ValueError(
            f"{file}: an entry cannot be read ({error}); expected ShareGPT4V's image and conversations "
            "with a value from gpt"
        ) from None
