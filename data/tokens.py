"""Image tokens on disk: WebDataset shards from which generator and captioner train.

Each image is encoded once, by `tavq tokenize`.

Shapes: n images, V variants of an image (0 is the image as it is, then its mirror image, then crops), h w
    token grid.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tavq.base.arguments import from_dict
from tavq.base.arrays import DiskArray

from .column import Column
from .tar_shards import read_range
from .token_index import Place, SampleText, index_shards, parse_ids, parse_json

if TYPE_CHECKING:
    pass

META_FILE = "meta.json"
IMAGES_PER_SHARD = 5000


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


class IdsColumn:
    """The ids of every image: `ids[i]` is (V, h, w) int32, `ids[i, 0]` (h, w), `ids[:, 0]` (n, h, w).

    Args:
        images: reads the ids of one image.
    """

    def __init__(self, images: Column[Tensor]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Tensor:
        first, *rest = index if isinstance(index, tuple) else (index,)
        found = self.images[first]
        if isinstance(found, list):
            return torch.stack([ids[tuple(rest)] for ids in found])
        return found[tuple(rest)]


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """The tokens of one split. They stay in their shards, and each image is read when it is asked for.

    Attributes:
        meta: which tokenizer made them.
        shards: the files.
        rows: where the n images lie in them, see `token_index.Place`.
        with_long_texts: whether the long text of an image is the last one of its captions.
    """

    meta: TokenMeta
    shards: tuple[Path, ...]
    rows: np.ndarray | DiskArray
    with_long_texts: bool = False

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def names(self) -> Column[str]:
        """The n image ids."""
        return Column(lambda index: self._read_text(index).id, len(self))

    @property
    def ids(self) -> IdsColumn:
        """The n images as tokens."""
        return IdsColumn(Column(self._read_ids, len(self)))

    @property
    def captions(self) -> Column[tuple[str, ...]]:
        """The captions of the n images."""
        return Column(self._read_captions, len(self))

    @property
    def long_texts(self) -> Column[str | None]:
        """The dense descriptions of the n images, None where an image has none."""
        return Column(lambda index: self._read_text(index).long_text, len(self))

    @property
    def num_captions(self) -> int:
        """Number of captions of all images."""
        return self.captions_of(len(self)).start

    def captions_of(self, index: int) -> range:
        """Return which of all captions, one image after the other, are those of an image."""
        start, *more = (self._captions_before(row) for row in self.rows[index : index + 2].tolist())
        return range(start, *more or [start])

    def _captions_before(self, row: list[int]) -> int:
        place = Place(*row)
        return place.captions_before + (place.long_texts_before if self.with_long_texts else 0)

    def _read_captions(self, index: int) -> tuple[str, ...]:
        text = self._read_text(index)
        long_texts = [text.long_text] if self.with_long_texts and text.long_text else []
        return (*text.captions, *long_texts)

    def _read_ids(self, index: int) -> Tensor:
        place = self._place(index)
        shard = self.shards[place.shard]
        content = read_range(shard, place.ids_at, place.ids_size)
        return torch.from_numpy(parse_ids(content, f"{shard}, byte {place.ids_at}", self.meta))

    def _read_text(self, index: int) -> SampleText:
        place = self._place(index)
        shard = self.shards[place.shard]
        content = read_range(shard, place.text_at, place.text_size)
        # Checked when the index was made; anew it would take half of the time.
        return SampleText(**parse_json(content, f"{shard}, byte {place.text_at}"))

    def _place(self, index: int) -> Place:
        return Place(*self.rows[index].tolist())


class AllTexts(Sequence[str]):
    """The captions of token sets, one image after the other, read from disk in each pass over them."""

    def __init__(self, *sets: TokenSet):
        self.sets = sets

    def __len__(self) -> int:
        return sum(tokens.num_captions for tokens in self.sets)

    def __iter__(self) -> Iterator[str]:
        return (text for tokens in self.sets for captions in tokens.captions for text in captions)

    def __getitem__(self, number: Any) -> Any:
        for tokens in self.sets:
            if 0 <= number < tokens.num_captions:
                starts = range(len(tokens))
                image = bisect.bisect_right(starts, number, key=lambda i: tokens.captions_of(i).start) - 1
                return tokens.captions[image][number - tokens.captions_of(image).start]
            number -= tokens.num_captions
        raise IndexError(f"there are {len(self)} texts")


def read_meta(directory: Path) -> TokenMeta:
    """Read `meta.json` of a token set."""
    path = directory / META_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no token set in {directory}; make one with: tavq tokenize --data DIR --out {directory}"
        )
    return from_dict(TokenMeta, parse_json(path.read_bytes(), str(path)), source=str(path))


def open_tokens(directory: str | Path, *splits: str) -> TokenSet:
    """Open the tokens of one split, or of several one after the other, without reading them into memory.

    Each process opens all shards, because the training loop divides the images among the processes itself.

    Raises:
        FileNotFoundError: no token set lies there, or it has no such split.
        ValueError: a shard is damaged, or holds anything but ids and their text.
    """
    directory = Path(directory)
    meta = read_meta(directory)
    shards: list[Path] = []
    for split in splits:
        found = sorted(directory.glob(f"{split}-*.tar"))
        if not found:
            there = sorted({path.name.rsplit("-", 1)[0] for path in directory.glob("*.tar")})
            raise FileNotFoundError(f"{directory} has no split {split!r}; it has {', '.join(there)}")
        shards += found
    return open_shards(shards, meta)


def open_shards(shards: Sequence[Path], meta: TokenMeta) -> TokenSet:
    """Open shards whose tokenizer is known."""
    return TokenSet(meta, tuple(shards), index_shards(shards, meta))
