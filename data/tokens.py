"""Image tokens on disk: WebDataset shards that prior and captioner train from, so that no photo is encoded
twice.

Legend: n images, V variants of an image (0 is the photo as it is, then its mirror image, then crops), h w
    token grid.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

META_FILE = "meta.json"
SHARD_SIZE = 5000  # images


@dataclasses.dataclass(frozen=True)
class TokenMeta:
    """Which tokenizer made the tokens, and from what."""

    num_codes: int
    grid_size: tuple[int, int]
    codebook_hash: str
    tokenizer: str
    """Hash of the tokenizer's weights."""
    data: str
    image_size_px: int


@dataclasses.dataclass(frozen=True)
class TokenRecord:
    """One image as tokens, with its captions."""

    id: str
    split: str
    ids: np.ndarray
    """(V, h, w) integers in [0, num_codes)."""
    captions: tuple[str, ...]
    long_text: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """The tokens of one split, in memory.

    Attributes:
        names: n image ids.
        ids: (n, V, h, w) int32.
        captions: n tuples of captions.
        long_texts: n dense descriptions, None where an image has none.
    """

    meta: TokenMeta
    names: tuple[str, ...]
    ids: Tensor
    captions: tuple[tuple[str, ...], ...]
    long_texts: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.names)


def write_tokens(directory: Path, records: Iterable[TokenRecord], meta: TokenMeta) -> None:
    """Write `records` as shards `SPLIT-000000.tar` and `meta.json`.

    They are written to a temporary folder that takes the place of `directory` when all are there.

    Raises:
        FileExistsError: `directory` exists and is no token set.
    """
    import webdataset

    if directory.exists() and not (directory / META_FILE).exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists and holds no token set; name another --out")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as folder:
        aside = Path(folder) / "tokens"
        aside.mkdir()
        counts: dict[str, int] = {}
        writers: dict[str, webdataset.TarWriter] = {}
        for record in records:
            count = counts.get(record.split, 0)
            if count % SHARD_SIZE == 0:
                if record.split in writers:
                    writers[record.split].close()
                shard = aside / f"{record.split}-{count // SHARD_SIZE:06d}.tar"
                writers[record.split] = webdataset.TarWriter(str(shard), mtime=0)
            writers[record.split].write(_sample(record, count))
            counts[record.split] = count + 1
        for writer in writers.values():
            writer.close()
        (aside / META_FILE).write_text(json.dumps(dataclasses.asdict(meta), indent=2) + "\n")
        if directory.exists():
            shutil.rmtree(directory)
        aside.rename(directory)


def _sample(record: TokenRecord, count: int) -> dict[str, object]:
    text = {"id": record.id, "captions": list(record.captions), "long_text": record.long_text}
    return {"__key__": f"{count:08d}", "json": text, "npy": record.ids.astype(np.int32)}


def read_meta(directory: Path) -> TokenMeta:
    """Read `meta.json` of a token set."""
    path = directory / META_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no token set in {directory}; make one with: tavq tokenize --data DIR --out {directory}"
        )
    values = json.loads(path.read_text())
    return TokenMeta(**values | {"grid_size": tuple(values["grid_size"])})


def open_tokens(directory: str | Path, split: str) -> TokenSet:
    """Read the tokens of one split into memory.

    Raises:
        FileNotFoundError: no token set lies there, or it has no such split.
    """
    import webdataset

    directory = Path(directory)
    meta = read_meta(directory)
    shards = sorted(directory.glob(f"{split}-*.tar"))
    if not shards:
        found = sorted({path.name.rsplit("-", 1)[0] for path in directory.glob("*.tar")})
        raise FileNotFoundError(f"{directory} has no split {split!r}; it has {', '.join(found)}")
    source = webdataset.WebDataset([str(s) for s in shards], shardshuffle=False, empty_check=False).decode()
    samples = list(source)
    return TokenSet(
        meta,
        names=tuple(sample["json"]["id"] for sample in samples),
        ids=torch.from_numpy(np.stack([sample["npy"] for sample in samples])),
        captions=tuple(tuple(sample["json"]["captions"]) for sample in samples),
        long_texts=tuple(sample["json"]["long_text"] for sample in samples),
    )
