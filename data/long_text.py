"""Dense descriptions beside a dataset: long_text.jsonl, a ShareGPT4V json, or .long.txt side-cars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .annotations import check_string, clean_caption, numbered_lines, parse_json, parse_object, read_text
from .contained import LinkCheck
from .dataset import Example

_FILES = ("long_text.jsonl", "sharegpt4v*.json", "share-captioner*.json", "long_text.json")


def attach_long_text(examples: Iterable[Example], folder: Path, links: LinkCheck) -> Iterator[Example]:
    """Give each example the description that names it, by id or by file name; others keep what they have.

    Raises:
        ValueError: a file of descriptions is malformed, or names none of the examples.
    """
    file = _find_file(folder)
    texts = _read(file) if file else {}
    first = ""
    described = False
    for example in examples:
        long_text = _text_of(example, texts, links)
        first = first or example.id
        described = described or bool(long_text)
        yield replace(example, long_text=long_text)
    if texts and not described:
        raise ValueError(
            f"{file} describes {len(texts)} images, none of them in the dataset (first: "
            f"{next(iter(texts))}, the dataset has {first}); use its ids or file names"
        )


def _find_file(folder: Path) -> Path | None:
    for pattern in _FILES:
        for file in sorted(folder.glob(pattern)):
            if file.is_file():
                return file
    return None


def _text_of(example: Example, texts: dict[str, str], links: LinkCheck) -> str | None:
    if not isinstance(example.image, Path):  # in a shard, which has no files beside it
        return texts.get(example.id) or example.long_text
    sidecar = example.image.with_suffix(".long.txt")
    if sidecar.is_file():
        links.check(sidecar)
        return clean_caption(read_text(sidecar), str(sidecar)) or example.long_text
    return texts.get(example.id) or texts.get(example.image.stem) or example.long_text


def _read(file: Path) -> dict[str, str]:
    """Return id or file stem -> description."""
    if file.suffix == ".jsonl":
        return dict(_jsonl_pair(line, where) for where, line in numbered_lines(file))
    entries = parse_json(read_text(file), str(file))
    if not isinstance(entries, list):
        raise ValueError(f"{file} holds a {type(entries).__name__}, expected ShareGPT4V's list of entries")
    return dict(_sharegpt4v_pair(entry, f"{file}, entry {n}") for n, entry in enumerate(entries))


def _jsonl_pair(line: str, where: str) -> tuple[str, str]:
    row = parse_object(line, where)
    if "text" not in row or not ("id" in row or "image" in row):
        raise ValueError(f'{where} has keys {", ".join(row)}; expected {{"id" or "image", "text"}}')
    name = str(row["id"]) if "id" in row else Path(check_string(row["image"], where)).stem
    return name, clean_caption(row["text"], where)


def _sharegpt4v_pair(entry: Any, where: str) -> tuple[str, str]:
    try:
        answer = next(turn["value"] for turn in entry["conversations"] if turn["from"] == "gpt")
        image = entry["image"]
    except (KeyError, TypeError, StopIteration) as error:
        raise ValueError(
            f"{where} cannot be read ({error!r}); expected ShareGPT4V's image and conversations with a value "
            "from gpt"
        ) from None
    return Path(check_string(image, where)).stem, clean_caption(answer, where)
