"""An image-text dataset: its examples, and a way to read their images past a broken file."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from .images import UnreadableImageError, load_image, to_rgb

MAX_UNREADABLE_SHARE = 0.01
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


class ImageTextDataset:
    """Examples in a fixed order, of one split or of all.

    Raises:
        ValueError: an id occurs twice.
    """

    def __init__(self, name: str, examples: Sequence[Example]):
        self.name = name
        self.examples = tuple(examples)
        repeated = [id_ for id_, count in Counter(self.ids).items() if count > 1]
        if repeated:
            raise ValueError(
                f"{name}: {len(repeated)} ids occur more than once (first: {repeated[0]}), expected each "
                "once; rename the files"
            )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def ids(self) -> tuple[str, ...]:
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
        return self if count is None else ImageTextDataset(self.name, self.examples[:count])

    def select_split(self, split: str) -> ImageTextDataset:
        """Return the examples of one split; there may be none."""
        return ImageTextDataset(self.name, [example for example in self.examples if example.split == split])


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
    total = total or len(dataset)
    indices = range(len(dataset)) if indices is None else indices
    reasons: list[str] = []
    for index in indices:
        try:
            image = dataset.load_image(index)
        except UnreadableImageError as error:
            reasons.append(f"{dataset[index].id} ({error})")
            if len(reasons) > max_unreadable(total):
                raise ValueError(
                    f"{dataset.name}: {len(reasons)} of the first {index + 1} images cannot be read, at most "
                    f"{max_unreadable(total)} of {total} may be so; repair or remove them: {_listed(reasons)}"
                ) from error
            continue
        yield index, image

    check_unreadable(dataset.name, reasons, len(dataset), total)


def check_unreadable(name: str, reasons: Sequence[str], read: int, total: int | None = None) -> None:
    """Name unreadable images in a warning.

    Args:
        name: of the dataset.
        reasons: a line for each of them.
        read: images that were tried.
        total: number of images that the limit refers to; `read` if None.

    Raises:
        ValueError: there are more than `max_unreadable` allows.
    """
    allowed = max_unreadable(total or read)
    if len(reasons) > allowed:
        raise ValueError(
            f"{name}: {len(reasons)} of {read} images cannot be read, at most {allowed} may be so; repair or "
            f"remove them: {_listed(reasons)}"
        )
    if reasons:
        warnings.warn(
            f"{name}: skipped {len(reasons)} of {read} images that cannot be read: {_listed(reasons)}",
            stacklevel=3,
        )


def max_unreadable(total: int) -> int:
    """Return how many of `total` images may be unreadable before that is an error: 1 %, but at least one."""
    return max(1, int(MAX_UNREADABLE_SHARE * total))


def _listed(names: Sequence[str]) -> str:
    shown = "; ".join(names[:NAMED_AT_MOST])
    more = len(names) - NAMED_AT_MOST
    return shown if more <= 0 else f"{shown}; and {more} more"
