"""Text vectors on disk, by content: encoded once, shared by every run and process."""

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

_COMMIT_EVERY = 2048
_QUERY_SIZE = 500
_ATTEMPTS = 8


class EmbeddingCache:
    """`TextEncoder.encode` with a memory on disk.

    Vectors lie as float16 in one SQLite file under SHA-256(encoder hash, text), so another encoder, or the
    same with other weights, never answers. Processes share the file (write-ahead log: on a local disk). New
    and stored vectors pass through the same float16, so a first and a second call give the same bits; the
    cosine to the float32 vector is above 0.999999.
    """

    def __init__(self, encoder: TextEncoder, directory: str | Path | None = None):
        self.encoder = encoder
        self.file = Path(directory or cache_directory("text_vectors")) / "vectors.sqlite"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(_ATTEMPTS):  # the mode's change waits for no lock of another process
            try:
                self._create()
                break
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
                if not busy or attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(0.05 * 2**attempt)

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
            known = dict(_fetch(connection, list(dict.fromkeys(keys))))
            missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
            for stored in self._encode_missing(missing):
                known.update(stored)
                with connection:
                    connection.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", stored)
        vectors = np.frombuffer(b"".join(known[key] for key in keys), dtype=np.float16).reshape(len(keys), -1)
        return normalize(torch.from_numpy(vectors.astype(np.float32)), dim=-1)

    def _encode_missing(self, missing: dict[bytes, str]) -> Iterator[list[tuple[bytes, bytes]]]:
        keys = sorted(missing, key=lambda key: len(missing[key]))  # like lengths share a batch
        with tqdm(
            total=len(keys), desc="encoding texts", unit="text", disable=None if len(keys) > 500 else True
        ) as bar:
            for start in range(0, len(keys), _COMMIT_EVERY):
                part = keys[start : start + _COMMIT_EVERY]
                vectors = self.encoder.encode([missing[key] for key in part]).numpy().astype(np.float16)
                yield [(key, vector.tobytes()) for key, vector in zip(part, vectors, strict=True)]
                bar.update(len(part))

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.encoder.hash}\n{text}".encode()).digest()

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
        marks = ",".join("?" * len(part))
        yield from connection.execute(f"SELECT key, value FROM vectors WHERE key IN ({marks})", part)
