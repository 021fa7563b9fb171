"""Readers of annotation files: Karpathy json, COCO captions json, the original Flickr8k lists.

Each yields examples whose `split` is "" where the layout does not say it; images are not checked here.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .contained import check_file_name
from .dataset import Example

_FLICKR_LISTS = {"trainImages": "train", "devImages": "val", "testImages": "test"}
# Flickr8k.token.txt captions one file that was never published under this name.
_FLICKR_UNPUBLISHED = "2258277193_586949ec62.jpg.1"


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid json ({error}); download it again") from error


def read_karpathy(file: Path, root: Path) -> Iterator[Example]:
    """Read Karpathy's json; "restval" counts as train, as is the custom."""
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{file} has no list 'images'; expected Karpathy's layout, check the file")
    folders = _image_folders(root)
    for entry in content["images"]:
        try:
            name = check_file_name(entry["filename"], str(file))
            captions = clean_captions(sentence["raw"] for sentence in entry["sentences"])
            split = "train" if entry["split"] == "restval" else entry["split"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{file}: an image lacks {error}; expected filename, split and sentences[].raw"
            ) from None
        subfolder = check_file_name(entry.get("filepath", ""), str(file))
        image = _locate(name, [folder / subfolder for folder in folders] + folders)
        yield Example(Path(name).stem, image, captions, None, split)


def read_coco(files: Sequence[Path], root: Path) -> Iterator[Example]:
    """Read COCO captions; a file's split is the word in its name (captions_val2017.json -> val)."""
    by_split: dict[str, Path] = {}
    for file in files:
        split = next((name for name in ("train", "val", "test") if name in file.stem), "")
        if split in by_split:
            raise ValueError(
                f"{by_split[split].name} and {file.name} are the same split; give the path of one of them"
            )
        by_split[split] = file
    for split, file in by_split.items():
        yield from _read_coco_file(file, root, split)


def _read_coco_file(file: Path, root: Path, split: str) -> Iterator[Example]:
    content = read_json(file)
    captions: dict[int, list[str]] = defaultdict(list)
    try:
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        names = {entry["id"]: entry["file_name"] for entry in content["images"]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file} lacks {error}; expected COCO's images[] and annotations[].caption"
        ) from None
    kind = file.stem.removeprefix("captions_")
    folders = [root / kind, root / "images" / kind, *_image_folders(root)]
    for image_id, name in names.items():
        if captions[image_id]:
            image = _locate(check_file_name(name, str(file)), folders)
            yield Example(str(image_id), image, clean_captions(captions[image_id]), None, split)


def read_original_flickr8k(file: Path, root: Path) -> Iterator[Example]:
    """Read `captions.txt` (name,caption) or `Flickr8k.token.txt` (name#n, tab, caption) and the split lists.

    Where the three lists lie beside it, images in none of them are left out, as the standard split does.
    """
    captions: dict[str, list[str]] = defaultdict(list)
    for name, caption in _flickr_rows(file):
        captions[name].append(caption)
    splits = _flickr_splits(file.parent)
    folders = [root / name for name in ("Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset")]
    for name in splits or captions:
        if name not in captions:
            raise ValueError(f"{file} has no caption of {name}, which a split list names; download it again")
        image = _locate(check_file_name(name, str(file)), folders)
        yield Example(Path(name).stem, image, clean_captions(captions[name]), None, splits.get(name, ""))


def _flickr_rows(file: Path) -> Iterator[tuple[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        if file.name == "captions.txt":
            for row in csv.reader(lines):
                if len(row) > 1 and row[:2] != ["image", "caption"]:
                    yield row[0], ",".join(row[1:])  # some copies leave a caption with a comma unquoted
            return
        for line in lines:
            name, _, caption = line.partition("\t")
            name = name.partition("#")[0]
            if caption.strip() and name != _FLICKR_UNPUBLISHED:
                yield name, caption


def _flickr_splits(folder: Path) -> dict[str, str]:
    lists = {split: folder / f"Flickr_8k.{name}.txt" for name, split in _FLICKR_LISTS.items()}
    present = {split: file for split, file in lists.items() if file.is_file()}
    if present and len(present) < len(lists):
        missing = next(file for split, file in lists.items() if split not in present)
        raise FileNotFoundError(f"no split list {missing}; all three lists are needed, or none of them")
    return {name: split for split, file in present.items() for name in file.read_text().split()}


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Collapse white space (a stray line separator shifts every later caption in PTB); drop empty ones."""
    cleaned = (" ".join(caption.split()) for caption in captions)
    return tuple(caption for caption in cleaned if caption)


def _image_folders(root: Path) -> list[Path]:
    return [root / "images", root / "Images", root]


def _locate(name: str, folders: Sequence[Path]) -> Path:
    """Return where the image lies; the first folder that exists stands for it when it lies nowhere."""
    places = [folder / name for folder in folders]
    existing = (place for place in places if place.is_file())
    named = (place for place in places if place.parent.is_dir())
    return next(existing, None) or next(named, places[0])
