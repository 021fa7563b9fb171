"""Open an image-text dataset by its path. The layout is detected automatically.

Known layouts: Karpathy json (`dataset_*.json` + `images/`), COCO captions (`annotations/captions_*.json` +
image folders), the original Flickr8k (`Images/` + `captions.txt` or `Flickr8k.token.txt` and its split
lists), `metadata.jsonl` (Hugging Face imagefolder), WebDataset shards (`*.tar`), parquet files as
`datasets` writes them, a folder of images with `.txt` side-cars (one caption a line), datasets of the
Hugging Face hub (`hf:OWNER/NAME`), and the generated datasets "shapes" and "scenes". A dense description is
taken from `long_text.jsonl`, a ShareGPT4V json or `NAME.long.txt` where one lies beside them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from .config import SPLITS
from .contained import LinkCheck
from .dataset import Example, ImageTextDataset, collect
from .layouts_folder import IMAGE_SUFFIXES, has_metadata, read_metadata, read_sidecars
from .layouts_hub import Source, named_source, read_hub
from .layouts_json import read_coco, read_karpathy, read_original_flickr8k
from .layouts_shards import named_shards, read_shards
from .long_text import attach_long_text
from .scenes import scenes_examples
from .shapes import shapes_examples

_GENERATED = {"shapes": shapes_examples, "scenes": scenes_examples}
_KNOWN = (
    "dataset_*.json, annotations/captions_*.json, Flickr8k's captions.txt, metadata.jsonl, "
    "*.tar shards, *.parquet files or images with .txt side-cars"
)


def check_data_is_named(path: str | Path) -> None:
    """Raise ValueError if neither a flag nor TAVQ_DATA named a dataset."""
    if not str(path):
        raise ValueError("no dataset is named; give one with --data DIR, or set TAVQ_DATA")


def open_dataset(path: str | Path, split: str | None = None) -> ImageTextDataset:
    """Open a dataset, whatever its layout.

    Where the layout has no splits, images are divided 80/10/10 by the SHA-256 of their ids.

    Args:
        path: a directory, an annotation json in it, or "shapes" or "scenes" for a generated dataset, with as
            many training images as a number behind a colon says ("scenes:50000"). WebDataset shards may also
            be one file, a pattern such as photos/train-{000..099}.tar, or a URL of these, see `remote`.
            A dataset of the hub is hf:OWNER/NAME, see `layouts_hub.named_source`.
        split: "train", "val" or "test"; None gives all.

    Raises:
        FileNotFoundError: nothing lies at `path`, or annotated images are missing.
        ValueError: the layout is unknown, an annotation cannot be read or names a file outside the dataset,
            or `split` is empty.
    """
    check_data_is_named(path)
    if split is not None and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    name, _, count = str(path).partition(":")
    if name in _GENERATED:
        return _generate(name, count, SPLITS if split is None else (split,))

    source = named_source(str(path))
    if source is not None and source.repository:
        return ImageTextDataset(source.name, collect(_select_split(read_hub(source), split, str(path))))
    shards = [] if source else named_shards(str(path))
    local = [shard for shard in shards if isinstance(shard, Path)]
    if len(local) < len(shards):
        remote = _select_split(read_shards(shards), split, str(path))
        return ImageTextDataset(shards[0].stem, collect(remote))

    root = local[0] if local else Path(source.path if source else path)
    folder = root if root.is_dir() else root.parent
    links = LinkCheck(_root_of_images(root))
    reader = (lambda: read_shards(local)) if local else _find_reader(root, source)
    # One example after the other, as a large dataset does not fit into memory.
    examples = _check_images(_select_split(reader(), split, folder), folder, links)
    return ImageTextDataset(folder.resolve().name, collect(attach_long_text(examples, folder, links)))


def _generate(name: str, count: str, splits: Iterable[str]) -> ImageTextDataset:
    if count and not (count.isdecimal() and int(count)):
        raise ValueError(f"{name}:{count} names no number of training images; write it as in {name}:5000")
    counts = {"train": int(count)} if count else {}
    examples = [example for split in splits for example in _GENERATED[name](split, counts.get(split))]
    return ImageTextDataset(name, examples)


def _find_reader(root: Path, source: Source | None) -> Callable[[], Iterable[Example]]:
    """Return the reader for the layout at `root`; where options are given, that of parquet files."""
    if source is not None:
        return lambda: read_hub(source)
    if root.is_file():
        return _json_reader(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no dataset at {root}; expected a directory ({_KNOWN}), 'shapes' or 'scenes', check --data"
        )

    # The order matters: a Karpathy json may lie beside the original lists, and side-cars are the last resort.
    if karpathy := _files(root, "dataset_*.json"):
        return lambda: read_karpathy(_only(karpathy), root)
    if coco := _files(root, "annotations/captions_*.json"):
        return lambda: read_coco(coco, root)
    if has_metadata(root):
        return lambda: read_metadata(root)
    if captions := _flickr_captions(root):
        return lambda: read_original_flickr8k(captions, root)
    if shards := _files(root, "*.tar"):
        return lambda: read_shards(shards)
    if any(root.rglob("*.parquet")):
        return lambda: read_hub(Source(str(root)))
    if any(file.suffix.lower() in IMAGE_SUFFIXES for file in root.rglob("*")):
        return lambda: read_sidecars(root)
    state = "holds no known layout" if any(root.iterdir()) else "is empty"
    raise ValueError(f"{root} {state}; expected {_KNOWN}")


def _json_reader(file: Path) -> Callable[[], Iterable[Example]]:
    if file.match("dataset_*.json"):
        return lambda: read_karpathy(file, file.parent)
    if file.match("captions_*.json"):
        return lambda: read_coco([file], _root_of_images(file))
    raise ValueError(
        f"{file} is no known annotation file; expected dataset_*.json or captions_*.json, or its directory"
    )


def _files(root: Path, pattern: str) -> list[Path]:
    """List regular files alone: reading from a named pipe would wait for ever."""
    return sorted(file for file in root.glob(pattern) if file.is_file())


def _flickr_captions(root: Path) -> Path | None:
    for name in ("Flickr8k.token.txt", "captions.txt"):
        for folder in (root, root / "Flickr8k_text"):
            if (folder / name).is_file():
                return folder / name
    return None


def _only(files: list[Path]) -> Path:
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(
            f"{files[0].parent} holds {len(files)} annotation files ({names}); give the path of one"
        )
    return files[0]


def _with_split(example: Example) -> Example:
    """Give an example without a split one by the hash of its id, so that it stays when others come or go."""
    if example.split:
        return example
    position = int.from_bytes(hashlib.sha256(example.id.encode()).digest()[:4], "big") / 2**32
    split = "train" if position < 0.8 else "val" if position < 0.9 else "test"
    return replace(example, split=split)


def _select_split(examples: Iterable[Example], split: str | None, folder: Path | str) -> Iterator[Example]:
    """Yield the examples of a split, all if it is None; without any that is an error at the end."""
    sizes: Counter[str] = Counter()
    for example in map(_with_split, examples):
        if example.split not in SPLITS:
            raise ValueError(
                f"{folder}: {example.id} is in split {example.split!r}, expected {', '.join(SPLITS)}; "
                "rename it"
            )
        sizes[example.split] += 1
        if split in (None, example.split):
            yield example

    if not sizes:
        raise ValueError(f"{folder} holds no example with image and caption; expected {_KNOWN}")
    if split is not None and not sizes[split]:
        counts = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"{folder} has no example in split {split!r} (it has {counts}); choose another --split"
        )


def _root_of_images(root: Path) -> Path:
    """Return the directory below which the images of a dataset must lie."""
    if root.is_dir():
        return root
    return root.parent.parent if root.match("captions_*.json") else root.parent


def _check_images(examples: Iterable[Example], folder: Path, links: LinkCheck) -> Iterator[Example]:
    """Yield the examples; images that are missing are an error at the end, which counts them."""
    missing: list[Path] = []
    count = 0
    for example in examples:
        count += 1
        if isinstance(example.image, Path):
            if not example.image.is_file():
                missing.append(example.image)
                continue
            links.check(example.image)
        yield example
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {count} annotated images are missing or no regular files, "
            f"the first is {missing[0]}; put them there or take them out of the annotations"
        )
