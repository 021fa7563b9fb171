"""Splits and encodes the texts of a split, once, into files that may be larger than memory.

Shapes: n examples, m distinct texts, M text width.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import itertools
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tavq.base.arrays import ArrayWriter, RaggedWriter, build_once
from tavq.base.cache import cache_directory
from tavq.base.progress import Progress
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.text_encoder import TextEncoder

from . import units
from .units import units_of

KINDS = ("captions", "words", "phrases", "sentences")  # the index is the level; 0 is no level of the encoder
EXAMPLES_AT_ONCE = 1000
_QUERY_SIZE = 500  # SQLite limits the number of variables in a query

Texts = tuple[tuple[str, ...], str | None]
"""Captions of an image, and its long text."""


def build_units(texts: Sequence[Texts], encoder: TextEncoder | EmbeddingCache) -> Path:
    """Split and encode all texts, unless that was done before; other processes wait for it.

    Vectors are kept by `EmbeddingCache`, too, so that a run that was killed encodes nothing twice.

    Args:
        texts: those of n examples.
        encoder: the frozen text encoder.

    Returns:
        Folder with `texts` (m rows), `vectors` (m, M) float16, and for each of `KINDS` the rows of each
        example's units among them.
    """
    # With the code that splits texts: a change of it must never be missed.
    libraries = [importlib.metadata.version(name) for name in ("textblob", "nltk")]
    kind = type(encoder).__name__  # vectors of the cache are rounded
    digest = hashlib.sha256(f"{kind} {encoder.hash} {libraries} {inspect.getsource(units)}".encode())
    for row in texts:
        digest.update(repr(row).encode())
    folder = cache_directory("text_units") / digest.hexdigest()[:24]
    build_once(folder / "complete", lambda marker: _write(folder, texts, encoder))
    return folder


def _write(folder: Path, texts: Sequence[Texts], encoder: TextEncoder | EmbeddingCache) -> None:
    with contextlib.ExitStack() as stack, _DistinctTexts(folder) as distinct:
        files = {
            name: stack.enter_context((folder / f"{name}.safetensors").open("wb"))
            for name in (*KINDS, "texts", "vectors")
        }
        kinds = [RaggedWriter(files[kind], "rows") for kind in KINDS]
        text_writer = RaggedWriter(files["texts"], "texts")
        vector_writer = ArrayWriter(files["vectors"], "vectors")

        for group in _groups(texts):
            of_examples = [units_of(captions, long_text) for captions, long_text in group]
            rows, new = distinct.rows(unit for levels in of_examples for level in levels for unit in level)
            for level, writer in enumerate(kinds):
                members = [rows[unit] for levels in of_examples for unit in levels[level]]
                writer.append(np.array(members, np.int64), np.array([len(e[level]) for e in of_examples]))
            if new:
                encoded = [text.encode() for text in new]
                lengths = np.array([len(content) for content in encoded])
                text_writer.append(np.frombuffer(b"".join(encoded), np.uint8), lengths)
                vector_writer.append(encoder.encode(new).half().numpy())

        for ragged_writer in (*kinds, text_writer):
            ragged_writer.finish()
        vector_writer.finish()


def _groups(texts: Sequence[Texts]) -> Iterator[list[Texts]]:
    rest = iter(texts)
    hidden = True if len(texts) < 10 * EXAMPLES_AT_ONCE else None
    with Progress(total=len(texts), desc="splitting texts", unit="image", disable=hidden) as bar:
        while group := list(itertools.islice(rest, EXAMPLES_AT_ONCE)):
            yield group
            bar.update(len(group))


class _DistinctTexts:
    """Numbers distinct texts in the order of their first occurrence, in a temporary file."""

    def __init__(self, folder: Path):
        self._folder = tempfile.TemporaryDirectory(dir=folder)
        self._table = sqlite3.connect(Path(self._folder.name) / "texts.sqlite")
        self._table.execute("PRAGMA journal_mode=OFF")
        self._table.execute("PRAGMA synchronous=OFF")
        self._table.execute("CREATE TABLE texts (key BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        self._count = 0

    def __enter__(self) -> _DistinctTexts:
        return self

    def __exit__(self, *error: object) -> None:
        self._table.close()
        self._folder.cleanup()

    def rows(self, texts: Iterator[str]) -> tuple[dict[str, int], list[str]]:
        """Return the number of each text, and those texts that no earlier call has seen."""
        keys = {text: hashlib.sha256(text.encode()).digest()[:16] for text in dict.fromkeys(texts)}
        known = dict(self._known(list(keys.values())))
        new = [text for text, key in keys.items() if key not in known]
        for text in new:
            known[keys[text]] = self._count
            self._count += 1
        self._table.executemany("INSERT INTO texts VALUES (?, ?)", [(keys[t], known[keys[t]]) for t in new])
        return {text: known[key] for text, key in keys.items()}, new

    def _known(self, keys: list[bytes]) -> Iterator[tuple[bytes, int]]:
        for start in range(0, len(keys), _QUERY_SIZE):
            part = keys[start : start + _QUERY_SIZE]
            variables = ",".join("?" * len(part))
            yield from self._table.execute(f"SELECT key, row FROM texts WHERE key IN ({variables})", part)
