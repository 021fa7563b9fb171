"""One example, a list of them, and reading their images without stumbling over a broken file."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .images import UnreadableImageError, load_image, to_rgb

MAX_UNREADABLE_SHARE = 0.01


@dataclass(frozen=True)
class Example:
    """One image with its captions.

    Attributes:
        id: unique in its dataset, the same in every run.
        image: the file, or a function that draws the picture.
        captions: short captions, at least one.
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
    cleaned = (" ".join(caption.split()) for caption in captions)
    return " ".join(
        caption if caption.rstrip("\"')").endswith((".", "!", "?")) else f"{caption} ."
        for caption in cleaned
        if caption
    )


class ImageTextDataset:
    """Examples in a fixed order, with the bookkeeping of one split or of all."""

    def __init__(self, name: str, examples: Sequence[Example]):
        self.name = name
        self.examples = tuple(examples)
        repeated = [name for name, count in Counter(self.ids).items() if count > 1]
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
            UnreadableImageError: the file is truncated, is no image, or is too small.
        """
        image = self.examples[index].image
        return load_image(image) if isinstance(image, Path) else to_rgb(image())

    def select_split(self, split: str) -> ImageTextDataset:
        """Return the examples of one split; there may be none."""
        return ImageTextDataset(self.name, [example for example in self.examples if example.split == split])

    def head(self, limit: int | None) -> ImageTextDataset:
        """The same dataset cut to its first `limit` examples; None keeps all."""
        return self if limit is None else ImageTextDataset(self.name, self.examples[:limit])


def readable_images(
    dataset: ImageTextDataset, *, total: int | None = None
) -> Iterator[tuple[int, Image.Image]]:
    """Yield (index, image) for every image that can be read; name the others in one warning at the end.

    Args:
        dataset: whose images to read.
        total: images of which 1 % may be unreadable, where these are what an earlier call has left.

    Raises:
        ValueError: more than one image, and more than 1 %, cannot be read.
    """
    total = total or len(dataset)
    allowed = max(1, int(MAX_UNREADABLE_SHARE * total))
    reasons: list[str] = []
    for index in range(len(dataset)):
        try:
            image = dataset.load_image(index)
        except (UnreadableImageError, FileNotFoundError) as error:
            reasons.append(f"{dataset[index].id} ({error})")
            if len(reasons) > allowed:
                raise ValueError(
                    f"{dataset.name}: {len(reasons)} of the first {index + 1} images cannot be read, at most "
                    f"{allowed} of {total} may be so; repair or remove them: {_first(reasons)}"
                ) from error
            continue
        yield index, image
    if reasons:
        warnings.warn(
            f"{dataset.name}: skipped {len(reasons)} of {len(dataset)} images that cannot be read: "
            f"{_first(reasons)}",
            stacklevel=2,
        )


def _first(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return "; ".join(names[:limit]) + more
