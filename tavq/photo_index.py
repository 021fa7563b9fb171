"""Search in a folder of photos: by words, by a photo, or by both.

An index is a directory. `photos.sqlite` holds the ids of each photo; it grows as photos are encoded, so a
build that is stopped goes on. `vectors.faiss` holds one vector a photo, made from the ids. A search takes
candidates from faiss and scores them exactly, from their ids.

Shapes: n photos, C candidates, N tokens a photo, K codes, M text width.
"""

from __future__ import annotations

import dataclasses
import itertools
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from tavq.base.files import atomic_write
from tavq.data.images import UnreadableImageError, load_image, to_tensor
from tavq.data.layouts_folder import IMAGE_SUFFIXES
from tavq.ranking import combine_scores
from tavq.tokenizer.heatmaps import check_aligned
from tavq.tokenizer.model import TAVQTokenizer
from tavq.tokenizer.retrieval import alignment_scores

CANDIDATES = 1000
"""Photos that are scored exactly; the more, the less is lost to the approximation."""
COMMIT_EVERY = 32  # photos that a killed build encodes again, at most
EXACT_UP_TO = 200_000  # photos; more are divided into cells, of which a search visits some
CELLS_VISITED = 32
VECTORS_AT_ONCE = 20_000
SAMPLE = 2000  # photos that mean and spread are taken from
_TABLES = """
CREATE TABLE IF NOT EXISTS photos (
    id INTEGER PRIMARY KEY, name TEXT UNIQUE, modified INTEGER, size INTEGER, ids BLOB);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
"""


EncodedPhoto = tuple[str, np.ndarray | str]
"""Name of a photo, and its ids (N,), or why it cannot be read."""
EncodePhotos = Callable[[Path, Mapping[str, tuple[int, int]]], Iterable[EncodedPhoto]]
"""Folder, and name -> time of change and size of the photos in it -> these photos encoded, in order."""


@dataclasses.dataclass(frozen=True)
class Changes:
    """What an update did."""

    added: int
    removed: int
    unchanged: int
    unreadable: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Hit:
    """A photo that was found."""

    path: Path
    score: float


class PhotoIndex:
    """The photos of one folder, encoded by one tokenizer.

    Args:
        directory: of the index; made by the first `update`.
        tokenizer: aligned with text.
        weights: hash of the tokenizer's weights; an index made with other weights is refused.
    """

    def __init__(self, directory: Path, tokenizer: TAVQTokenizer, weights: str):
        check_aligned(tokenizer)
        self.directory = directory
        self.tokenizer = tokenizer
        self.weights = weights
        self.vector_file = directory / "vectors.faiss"
        every_code = torch.arange(tokenizer.num_codes, device=tokenizer.codebook.device)
        self.projected = tokenizer.project(every_code).detach().cpu()

    def update(self, folder: Path, encode: EncodePhotos | None = None) -> Changes:
        """Bring the index in line with the images in `folder` and below; new and changed ones are encoded.

        Args:
            folder: of the photos.
            encode: encodes them elsewhere; by default this process does. It may yield others, too.

        Raises:
            FileNotFoundError: no such folder, or no image in it.
            ValueError: the index belongs to another folder or to other weights.
        """
        files = _image_files(folder)
        self.directory.mkdir(parents=True, exist_ok=True)
        database = _connect(self.directory)
        facts = {"folder": str(folder.resolve()), "weights": self.weights}
        _check_facts(database, facts, self.directory)

        stored = {row[0]: row[1:] for row in database.execute("SELECT name, modified, size FROM photos")}
        gone = [name for name in stored if stored[name] != files.get(name)]
        new = [name for name in files if stored.get(name) != files[name]]
        if gone or new:
            self.vector_file.unlink(missing_ok=True)  # a search shall not use it if this is stopped
        with database:
            database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())
            database.executemany("DELETE FROM photos WHERE name = ?", ((name,) for name in gone))

        states = {name: files[name] for name in new}
        unreadable: list[str] = []
        rows = _rows((encode or self.encode_photos)(folder, states), states, unreadable)
        while batch := list(itertools.islice(rows, COMMIT_EVERY)):
            with database:
                database.executemany(
                    "INSERT INTO photos (name, modified, size, ids) VALUES (?, ?, ?, ?)", batch
                )
        if not self.vector_file.exists():
            self._write_vectors(database)
        removed = sum(name not in files for name in gone)
        added = len(new) - len(unreadable)
        return Changes(added, removed, len(files) - len(new), tuple(unreadable))

    def encode_photos(self, folder: Path, names: Iterable[str]) -> Iterator[EncodedPhoto]:
        """Encode photos of a folder one by one."""
        for name in names:
            try:
                image = load_image(folder / name)
            except (UnreadableImageError, FileNotFoundError) as error:
                yield name, str(error)
            else:
                yield name, self._ids(image).numpy()

    def _ids(self, image: Image.Image) -> Tensor:
        """Encode one image: (N,) int64 on the CPU."""
        pixels = to_tensor(image, self.tokenizer.image_size_px).unsqueeze(0)
        return self.tokenizer.encode(pixels.to(self.tokenizer.codebook.device)).flatten().cpu()

    def _vectors(self, ids: Tensor) -> Tensor:
        """Mean of the projected codes: (n, N) -> (n, M). Its product with a text is nearly their score."""
        return self.projected[ids].mean(dim=1)

    def _write_vectors(self, database: sqlite3.Connection) -> None:
        import faiss

        (total,) = database.execute("SELECT count(*) FROM photos").fetchone()
        if not total:
            raise ValueError(f"{self.directory} would hold no photo: none could be read; check the folder")
        rows = database.execute("SELECT id, ids FROM photos ORDER BY id")
        index: Any = None
        while batch := rows.fetchmany(VECTORS_AT_ONCE):
            vectors = self._vectors(_unpack([ids for _, ids in batch])).numpy()
            index = index or new_index(vectors, total)
            index.add_with_ids(vectors, np.array([id_ for id_, _ in batch]))
        with atomic_write(self.vector_file) as temporary:
            faiss.write_index(index, str(temporary))

    def _some_vectors(self, database: sqlite3.Connection) -> Tensor:
        """Vectors of some photos, for the mean and the spread over the index."""
        rows = database.execute("SELECT ids FROM photos ORDER BY id LIMIT ?", (SAMPLE,)).fetchall()
        return self._vectors(_unpack([ids for (ids,) in rows]))

    def search(
        self,
        encode_text: Callable[[list[str]], Tensor],
        words: str | None = None,
        like: Image.Image | None = None,
        top: int = 20,
    ) -> list[Hit]:
        """Find the photos that fit some words, that look like a photo, or both at once, best first.

        Words are scored as in `alignment_scores`, a photo by the cosine to its vector, less the mean vector
        of the index. Both together are standardised and added.

        Args:
            encode_text: the encoder that the tokenizer is aligned with: texts -> (n, M).
            words: what the photos show.
            like: a photo of any size, in the index or not.
            top: photos to return.
        """
        if (words is None or not words.strip()) and like is None:
            raise ValueError("nothing to look for; give some words, a photo, or both")
        if not self.vector_file.is_file():
            raise FileNotFoundError(
                f"{self.directory} holds no finished index; make it with: tavq index PHOTOS --out INDEX"
            )
        import faiss

        database = _connect(self.directory)
        _check_facts(database, {"weights": self.weights}, self.directory)
        index = faiss.read_index(str(self.vector_file))
        some = self._some_vectors(database)
        mean = some.mean(dim=0)

        text = encode_text([words]) if words and words.strip() else None
        photo = None if like is None else self._vectors(self._ids(like).unsqueeze(0)) - mean
        # Divided by their spread over the index, words and photo weigh alike, as they do in the exact score.
        given = [part.cpu() for part in (text, photo) if part is not None]
        query = sum(part / ((some - mean) @ part[0]).std().clamp_min(1e-6) for part in given)
        count = min(max(CANDIDATES, top), index.ntotal)
        _, found = index.search(torch.as_tensor(query).numpy(), count)

        names, ids = _photos(database, [int(id_) for id_ in found[0] if id_ >= 0])
        scores = []
        if text is not None:
            device = self.tokenizer.codebook.device
            scores.append(alignment_scores(self.tokenizer, ids.to(device), text)[:, 0].cpu())
        if photo is not None:
            scores.append((normalize(self._vectors(ids) - mean, dim=1) @ normalize(photo, dim=1).T)[:, 0])
        total = combine_scores(scores)
        best = total.argsort(descending=True, stable=True)[:top].tolist()
        (folder,) = database.execute("SELECT value FROM facts WHERE name = 'folder'").fetchone()
        return [Hit(Path(folder) / names[row], float(total[row])) for row in best]


def _rows(
    encoded: Iterable[EncodedPhoto], states: Mapping[str, tuple[int, int]], unreadable: list[str]
) -> Iterator[tuple[str, int, int, bytes]]:
    """Yield the rows of the photos of `states`, and note which of them are unreadable."""
    with tqdm(desc="encoding", total=len(states), unit="image", disable=None) as bar:
        for name, ids in encoded:
            if name not in states:
                continue
            bar.update(1)
            if isinstance(ids, str):
                unreadable.append(f"{name} ({ids})")
            else:
                yield name, *states[name], ids.astype(np.int32).tobytes()


def new_index(vectors: np.ndarray, total: int) -> Any:
    """Return an empty faiss index for `total` vectors, of which `vectors` (n, M) float32 are the first.

    Up to `EXACT_UP_TO` it compares with all. Beyond, it keeps vectors in half precision and in 4 sqrt(total)
    cells, of which a search visits `CELLS_VISITED` (benchmarks/search.py measures what is lost).
    """
    import faiss

    width = vectors.shape[1]
    if total <= EXACT_UP_TO:
        return faiss.IndexIDMap2(faiss.IndexFlatIP(width))
    cells = min(4 * round(total**0.5), len(vectors) // 39)  # faiss asks for 39 vectors a cell
    index: Any = faiss.index_factory(width, f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.nprobe = CELLS_VISITED
    return index


def _image_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Map each image in `folder` and below, as a relative path, to its time of change and size."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; name the one that holds the photos")
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file():
            state = file.stat()
            files[file.relative_to(folder).as_posix()] = state.st_mtime_ns, state.st_size
    if not files:
        raise FileNotFoundError(f"no image in {folder}; expected one of {', '.join(sorted(IMAGE_SUFFIXES))}")
    return files


def _connect(directory: Path) -> sqlite3.Connection:
    database = sqlite3.connect(directory / "photos.sqlite")
    database.executescript(_TABLES)
    return database


def _check_facts(database: sqlite3.Connection, expected: dict[str, str], directory: Path) -> None:
    stored = dict(database.execute("SELECT name, value FROM facts"))
    for name, value in expected.items():
        if stored.get(name, value) != value:
            raise ValueError(
                f"{directory} was made with the {name} {stored[name]}, not {value}; name another --out or "
                "--checkpoint, or delete the index"
            )


def _unpack(blobs: Sequence[bytes]) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(blobs), dtype=np.int32).reshape(len(blobs), -1)).long()


def _photos(database: sqlite3.Connection, ids: Sequence[int]) -> tuple[list[str], Tensor]:
    """Names and ids (C, N) of some photos, in the order of `ids`."""
    rows: dict[int, tuple[str, bytes]] = {}
    for start in range(0, len(ids), 500):  # SQLite limits the variables of a query
        part = ids[start : start + 500]
        query = f"SELECT id, name, ids FROM photos WHERE id IN ({','.join('?' * len(part))})"
        rows |= {row[0]: row[1:] for row in database.execute(query, part)}
    return [rows[id_][0] for id_ in ids], _unpack([rows[id_][1] for id_ in ids])
