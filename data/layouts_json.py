"""Readers of annotation files: Karpathy json, COCO captions json, the original Flickr8k lists.

Each yields examples whose `split` is "" where the layout does not say it. Images are not opened here.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .annotations import check_string, clean_captions, parse_json, read_text
from .contained import check_file_name
from .dataset import Example

_FLICKR_LISTS = {"trainImages": "train", "devImages": "val", "testImages": "test"}
# Flickr8k.token.txt has captions of one file that was never published under this name.
_FLICKR_UNPUBLISHED = "2258277193_586949ec62.jpg.1"


def read_karpathy(file: Path, root: Path) -> Iterator[Example]:
    """Read Karpathy's json. Its split "restval" counts as train, as usual.

    An entry is {"filename", "split", "sentences": [{"raw"}, ...]}, and optionally "filepath", its folder.
    """
    content = parse_json(read_text(file), str(file))
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{file} has no list 'images'; expected Karpathy's layout, check the file")
    folders = _image_folders(root)
    for number, entry in enumerate(content["images"]):
        where = f"{file}, image {number}"
        try:
            name, split, sentences = entry["filename"], entry["split"], entry["sentences"]
            captions = clean_captions([sentence["raw"] for sentence in sentences], where)
            subfolder = entry.get("filepath", "")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} lacks {error}; expected filename, split and sentences[].raw") from None
        name = check_file_name(name, where)
        subfolder = check_file_name(subfolder, where)
        split = "train" if split == "restval" else check_string(split, where)
        if captions:
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
    """Read {"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}."""
    content = parse_json(read_text(file), str(file))
    captions: dict[Any, list[str]] = defaultdict(list)
    try:
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        names = {entry["id"]: entry["file_name"] for entry in content["images"]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file} lacks {error}; expected COCO's images[] and annotations[].caption"
        ) from None

    kind = file.stem.removeprefix("captions_")  # such as val2017, which is also the folder of its images
    folders = [root / kind, root / "images" / kind, *_image_folders(root)]
    for image_id, name in names.items():
        where = f"{file}, image {image_id!r:.80}"
        if cleaned := clean_captions(captions[image_id], where):
            image = _locate(check_file_name(name, where), folders)
            yield Example(check_string(str(image_id), where), image, cleaned, None, split)


def read_original_flickr8k(file: Path, root: Path) -> Iterator[Example]:
    """Read `captions.txt` (name,caption) or `Flickr8k.token.txt` (name#n, tab, caption) and the split lists.

    Where the three lists lie beside it, images in none of them are left out, as in the standard split.
    """
    captions: dict[str, list[str]] = defaultdict(list)
    for name, caption in _flickr_rows(file):
        captions[name].append(caption)
    splits = _flickr_splits(file.parent)
    folders = [root / name for name in ("Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset")]
    for name in splits or captions:
        if name not in captions:
            raise ValueError(f"{file} has no caption of {name}, which a split list names; download it again")
        if cleaned := clean_captions(captions[name], str(file)):
            image = _locate(check_file_name(name, str(file)), folders)
            yield Example(Path(name).stem, image, cleaned, None, splits.get(name, ""))


def _flickr_rows(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (file name, caption) of each caption."""
    text = read_text(file)
    if file.name == "captions.txt":
        try:
            rows = list(csv.reader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise ValueError(f"{file} is no valid csv ({error}); download it again") from None
        for row in rows:
            if len(row) > 1 and row[:2] != ["image", "caption"]:
                yield row[0], ",".join(row[1:])  # some copies leave a caption with a comma unquoted
        return
    for line in text.split("\n"):
        name, _, caption = line.partition("\t")
        name = name.partition("#")[0]
        if caption.strip() and name != _FLICKR_UNPUBLISHED:
            yield name, caption


def _flickr_splits(folder: Path) -> dict[str, str]:
    """Return file name -> split from the three split lists; empty where there are none."""
    lists = {split: folder / f"Flickr_8k.{name}.txt" for name, split in _FLICKR_LISTS.items()}
    present = {split: file for split, file in lists.items() if file.is_file()}
    if present and len(present) < len(lists):
        missing = next(file for split, file in lists.items() if split not in present)
        raise FileNotFoundError(f"no split list {missing}; all three lists are needed, or none of them")
    return {name: split for split, file in present.items() for name in read_text(file).split()}


def _image_folders(root: Path) -> list[Path]:
    return [root / "images", root / "Images", root]


def _locate(name: str, folders: Sequence[Path]) -> Path:
    """Return the path of an image in the first folder that has it.

    Where no folder has it, the path in the first folder that exists is returned, for the error that follows.
    """
    paths = [folder / name for folder in folders]
    for path in paths:
        if path.is_file():
            return path
    for path in paths:
        if path.parent.is_dir():
            return path
    return paths[0]
