"""A cache of text vectors on disk: each text is encoded once, for all runs and processes."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from tavq.base.cache import cache_directory

from .text_encoder import TextEncoder

_COMMIT_EVERY = 2048  # texts; what a killed run has encoded by then is not lost
_QUERY_SIZE = 500  # keys; SQLite limits the number of variables in a query
_ATTEMPTS = 8


class EmbeddingCache:
    """`TextEncoder.encode` with a cache on disk.

    Vectors are stored as float16 in one SQLite file, with SHA-256(encoder hash, text) as key, so vectors of
    another encoder are never returned. New vectors are rounded to float16, too: a first and a second call
    return the same bits. The cosine to the float32 vector is above 0.999999.

    Several processes may share the file, which must lie on a local disk (it uses a write-ahead log).

    Args:
        encoder: the frozen text encoder.
        directory: of the file; by default that of the cache `text_vectors`.
    """

    def __init__(self, encoder: TextEncoder, directory: str | Path | None = None):
        self.encoder = encoder
        self.file = Path(directory or cache_directory("text_vectors")) / "vectors.sqlite"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._create_with_retries()

    @property
    def dim(self) -> int:
        return self.encoder.dim

    @property
    def hash(self) -> str:
        return self.encoder.hash

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors of `texts`, encoding those that no earlier call has seen.

        Returns:
            (n, D) float32 on the CPU, unit length.
        """
        keys = [self._key(text) for text in texts]
        with closing(self._connect()) as connection:
            stored = dict(_fetch(connection, list(dict.fromkeys(keys))))
            missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in stored}
            for rows in self._encode_missing(missing):
                stored.update(rows)
                with connection:  # commits
                    connection.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)

        buffer = b"".join(stored[key] for key in keys)
        vectors = np.frombuffer(buffer, dtype=np.float16).reshape(len(keys), -1)
        return normalize(torch.from_numpy(vectors.astype(np.float32)), dim=-1)

    def _encode_missing(self, missing: dict[bytes, str]) -> Iterator[list[tuple[bytes, bytes]]]:
        """Yield rows (key, vector) of the texts in `missing`, some at a time."""
        keys = sorted(missing, key=lambda key: len(missing[key]))  # texts of like length share a batch
        hide_bar = True if len(keys) <= 500 else None  # None shows it on a terminal alone
        with tqdm(total=len(keys), desc="encoding texts", unit="text", disable=hide_bar) as bar:
            for start in range(0, len(keys), _COMMIT_EVERY):
                part = keys[start : start + _COMMIT_EVERY]
                vectors = self.encoder.encode([missing[key] for key in part]).numpy().astype(np.float16)
                yield [(key, vector.tobytes()) for key, vector in zip(part, vectors, strict=True)]
                bar.update(len(part))

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.encoder.hash}\n{text}".encode()).digest()

    def _create_with_retries(self) -> None:
        """Create the table; SQLite changes the journal's mode without waiting for a lock, so try again."""
        for attempt in range(_ATTEMPTS):
            try:
                self._create()
                return
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
                if not busy or attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(0.05 * 2**attempt)

    def _create(self) -> None:
        with closing(self._connect()) as connection, connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID"
            )

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.file, timeout=120)


def _fetch(connection: sqlite3.Connection, keys: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    for start in range(0, len(keys), _QUERY_SIZE):
        part = keys[start : start + _QUERY_SIZE]
        variables = ",".join("?" * len(part))
        yield from connection.execute(f"SELECT key, value FROM vectors WHERE key IN ({variables})", part)
