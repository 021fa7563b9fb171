"""An image-text dataset: its examples, and a way to read their images past a broken file."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from tavq.base.cache import cache_root

from .column import Column
from .images import UnreadableImageError, load_image, to_rgb
from .parquet_rows import ImageColumn, ParquetImage
from .tar_shards import Shard, ShardImage

MAX_UNREADABLE_SHARE = 0.01
IN_MEMORY = 10_000  # examples up to which a dataset is a tuple, beyond which it is a temporary file
NAMED_AT_MOST = 10  # of the unreadable images in one message


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with its captions.

    Attributes:
        id: unique in its dataset, the same in every run.
        image: the file, or a function that makes the image.
        captions: short captions; at least one in a dataset with text.
        long_text: a dense description, where the dataset has one.
        split: "train", "val" or "test".
    """

    id: str
    image: Path | Callable[[], Image.Image]
    captions: tuple[str, ...]
    long_text: str | None
    split: str

    @property
    def text(self) -> str:
        """The long text; without one the captions joined, a full stop added where it is missing."""
        return self.long_text or join_captions(self.captions)


def join_captions(captions: Iterable[str]) -> str:
    """Join captions to one text of sentences: white space collapsed, each ending in . ! or ?"""
    sentences = []
    for caption in captions:
        sentence = " ".join(caption.split())
        if not sentence:
            continue
        if not sentence.rstrip("\"')").endswith((".", "!", "?")):
            sentence += " ."
        sentences.append(sentence)
    return " ".join(sentences)


PLACE = np.dtype([("offset", "<i8"), ("length", "<u4"), ("split", "<i2")])
"""Where an example's line lies, and the number of its split."""


class ExampleFile(Sequence[Example]):
    """Examples that are read from a file when they are asked for.

    Args:
        file: one JSON array a line; it has no name and goes with the last process that has it open.
        places: (n,) of `PLACE`.
        shards: those that images lie in.
        splits: the splits by number.
    """

    def __init__(
        self, file: BinaryIO, places: np.ndarray, shards: Sequence[Shard | ImageColumn], splits: Sequence[str]
    ):
        self.file = file
        self.places = places
        self.shards = shards
        self.splits = splits

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ExampleFile(self.file, self.places[index], self.shards, self.splits)
        offset, length, _ = self.places[range(len(self))[index]].item()
        # Not seek and read: the workers of a DataLoader share the file's position.
        id_, captions, long_text, split, place = json.loads(os.pread(self.file.fileno(), length, offset))
        image: Path | ShardImage | ParquetImage
        if isinstance(place, str):
            image = Path(place)
        else:
            shard = self.shards[place[0]]
            image_class = ParquetImage if isinstance(shard, ImageColumn) else ShardImage
            image = image_class(shard, *place[1:])
        return Example(id_, image, tuple(captions), long_text, split)

    def of_split(self, split: str) -> ExampleFile:
        """Return the examples of one split."""
        number = self.splits.index(split) if split in self.splits else -1
        return ExampleFile(self.file, self.places[self.places["split"] == number], self.shards, self.splits)

    def __reduce__(self) -> Any:  # for workers that are started anew, and have no open files
        return tuple, (list(self),)


def collect(examples: Iterable[Example]) -> Sequence[Example]:
    """Return all examples: as a tuple where they are few, in a temporary file where they are many."""
    rest = iter(examples)
    first = tuple(itertools.islice(rest, IN_MEMORY))
    following = next(rest, None)
    if following is None or not all(isinstance(e.image, Path | ShardImage | ParquetImage) for e in first):
        return (*first, *([] if following is None else [following]), *rest)
    return _written(itertools.chain(first, [following], rest))


def _written(examples: Iterator[Example]) -> ExampleFile:
    cache_root().mkdir(parents=True, exist_ok=True)
    file = tempfile.TemporaryFile(dir=cache_root())
    shards: dict[Shard | ImageColumn, int] = {}
    splits: dict[str, int] = {}
    places: list[np.ndarray] = []
    end = 0
    while group := list(itertools.islice(examples, IN_MEMORY)):
        lines = [_line(example, shards) for example in group]
        file.write(b"".join(lines))
        rows = np.empty(len(group), PLACE)
        lengths = np.array([len(line) for line in lines])
        rows["offset"] = end + lengths.cumsum() - lengths
        rows["length"] = lengths
        rows["split"] = [splits.setdefault(example.split, len(splits)) for example in group]
        places.append(rows)
        end += int(lengths.sum())
    file.flush()
    return ExampleFile(file, np.concatenate(places), list(shards), list(splits))


def _line(example: Example, shards: dict[Shard | ImageColumn, int]) -> bytes:
    image = example.image
    place: Any = str(image)
    if isinstance(image, ShardImage | ParquetImage):
        number = shards.setdefault(image.shard, len(shards))
        fields = dataclasses.fields(image)[1:]  # all but the shard
        place = [number, *(getattr(image, field.name) for field in fields)]
    row = [example.id, example.captions, example.long_text, example.split, place]
    return json.dumps(row).encode()


def repeated(examples: Sequence[Example]) -> dict[str, int]:
    """Return the ids that occur more than once, and how often; memory grows by 8 bytes an example."""
    hashes = np.fromiter((_hash(example.id) for example in examples), np.uint64)
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not twice:
        return {}
    counts = Counter(example.id for example in examples if _hash(example.id) in twice)
    return {id_: count for id_, count in counts.items() if count > 1}


def _hash(id_: str) -> int:
    content = id_.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class ImageTextDataset:
    """Examples in a fixed order, of one split or of all.

    Raises:
        ValueError: an id occurs twice.
    """

    def __init__(self, name: str, examples: Sequence[Example]):
        self.name = name
        self.examples: Sequence[Example] = examples if isinstance(examples, ExampleFile) else tuple(examples)
        if twice := repeated(self.examples):
            raise ValueError(
                f"{name}: {len(twice)} ids occur more than once (first: {next(iter(twice))}), expected each "
                "once; rename the files"
            )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def ids(self) -> Sequence[str]:
        """The ids: a tuple, or read from the file where the examples are."""
        if isinstance(self.examples, ExampleFile):
            return Column(lambda index: self.examples[index].id, len(self))
        return tuple(example.id for example in self.examples)

    def load_image(self, index: int) -> Image.Image:
        """Read the image of one example as RGB.

        Raises:
            UnreadableImageError: the file is gone, is truncated, is no image, is too small or too large.
        """
        image = self.examples[index].image
        if not isinstance(image, Path):
            return to_rgb(image())
        try:
            return load_image(image)
        except FileNotFoundError as error:  # it was there when the dataset was opened
            raise UnreadableImageError(str(error)) from error

    def fingerprint(self) -> str:
        """Return a hash of ids, splits, texts and sizes of the images: it tells whether a dataset changed."""
        digest = hashlib.sha256(self.name.encode())
        for example in self.examples:
            image = example.image
            size = image.stat().st_size if isinstance(image, Path) else getattr(image, "size", 0)
            row = (example.id, example.split, example.captions, example.long_text, size)
            digest.update(repr(row).encode())
        return digest.hexdigest()[:16]

    def take(self, count: int | None) -> ImageTextDataset:
        """Return the first `count` examples; None returns all."""
        return self if count is None else self._part(self.examples[:count])

    def select_split(self, split: str) -> ImageTextDataset:
        """Return the examples of one split; there may be none."""
        if isinstance(self.examples, ExampleFile):
            return self._part(self.examples.of_split(split))
        return self._part(tuple(example for example in self.examples if example.split == split))

    def _part(self, examples: Sequence[Example]) -> ImageTextDataset:
        part = copy.copy(self)  # whose ids are known to be distinct
        part.examples = examples
        return part


def tried_images(
    dataset: ImageTextDataset, indices: Iterable[int] | None = None
) -> Iterator[tuple[int, Image.Image | UnreadableImageError]]:
    """Yield (index, image) for the images of `indices`, by default all; the error where one is unreadable."""
    for index in range(len(dataset)) if indices is None else indices:
        image: Image.Image | UnreadableImageError
        try:
            image = dataset.load_image(index)
        except UnreadableImageError as error:
            image = error
        yield index, image


def readable_images(
    dataset: ImageTextDataset, *, total: int | None = None, indices: Iterable[int] | None = None
) -> Iterator[tuple[int, Image.Image]]:
    """Yield (index, image) for every image that can be read; name the others in one warning at the end.

    Args:
        dataset: whose images to read.
        total: number of images that the limit of unreadable ones refers to, where `dataset` is only what an
            earlier call has left of them.
        indices: the images to read; all by default.

    Raises:
        ValueError: more images cannot be read than `max_unreadable` allows.
    """
    unreadable = UnreadableImages(dataset.name, total or len(dataset))
    for index, image in tried_images(dataset, indices):
        if isinstance(image, UnreadableImageError):
            unreadable.add(dataset[index].id, str(image))
        else:
            yield index, image
    unreadable.warn(len(dataset))


class UnreadableImages:
    """The images of a dataset that cannot be read. A few are named in one warning; more are an error.

    Args:
        name: of the dataset.
        total: number of its images, of which `max_unreadable` may be unreadable.
    """

    def __init__(self, name: str, total: int):
        self.name = name
        self.total = total
        self.reasons: list[str] = []

    def add(self, id_: str, reason: str) -> None:
        """Note an image. Raises ValueError when it is one too many."""
        self.reasons.append(f"{id_} ({reason})")
        allowed = max_unreadable(self.total)
        if len(self.reasons) > allowed:
            raise ValueError(
                f"{self.name}: {len(self.reasons)} images cannot be read, at most {allowed} of {self.total} "
                f"may be so; repair or remove them: {_listed(self.reasons)}"
            )

    def warn(self, tried: int) -> None:
        """Name them in a warning, if there are any among the images that were tried."""
        if self.reasons:
            warnings.warn(
                f"{self.name}: skipped {len(self.reasons)} of {tried} images that cannot be read: "
                f"{_listed(self.reasons)}",
                stacklevel=3,
            )


def max_unreadable(total: int) -> int:
    """Return how many of `total` images may be unreadable before that is an error: 1 %, but at least one."""
    return max(1, int(MAX_UNREADABLE_SHARE * total))


def _listed(names: Sequence[str]) -> str:
    shown = "; ".join(names[:NAMED_AT_MOST])
    more = len(names) - NAMED_AT_MOST
    return shown if more <= 0 else f"{shown}; and {more} more"
