"""Captions of a folder of images, written as they are made; the same call goes on where a stopped one was.

The name of `out` tells the kind: `.jsonl`, `.json`, `.csv`, or a directory for a `.txt` an image. Finished
images are journaled as lines of JSON, whatever the kind; a half-written last line is dropped.
"""

from __future__ import annotations

import collections
import csv
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from tavq.base.files import written_aside
from tavq.data.examples import Example, ImageTextDataset, readable_images
from tavq.data.layouts_folder import IMAGE_SUFFIXES

from .decoding import Caption

Describe = Callable[[Sequence[Image.Image]], list[list[Caption]]]
KINDS = (".jsonl", ".json", ".csv", "")
COLUMNS = ("image", "caption", "score")


def caption_folder(folder: str | Path, out: str | Path, describe: Describe, *, batch_size: int = 32) -> int:
    """Describe every image in `folder` (and below) that `out` does not hold yet.

    Args:
        folder: searched for image files of any usual kind.
        out: `.jsonl`, `.json` or `.csv` file, or a directory of `.txt` files with the names of the images
            (`a.jpg.txt` and `a.png.txt` where both lie there, else `a.txt`).
        describe: RGB images -> captions of each, the best first.
        batch_size: images handed to `describe` at once.

    Returns:
        How many images were described now. Those that cannot be read are named in one warning.

    Raises:
        FileNotFoundError: no folder, or no image in it.
        ValueError: an unknown kind of output, or more than 1 % of the images cannot be read.
    """
    folder, out = Path(folder), Path(out)
    if out.suffix not in KINDS:
        raise ValueError(
            f"cannot write {out.suffix} files ({out}); name a .jsonl, .json or .csv file, or a directory"
        )
    names = _images(folder)
    journal = out if out.suffix == ".jsonl" else out.with_name(f"{out.name}.unfinished.jsonl")
    side_cars = _side_cars(out, names)
    done = _finished(out, side_cars) | {row["image"] for row in _mended(journal)}
    left = [name for name in names if name not in done]
    dataset = ImageTextDataset(str(folder), [Example(name, folder / name, (), None, "") for name in left])
    count = 0
    with (
        journal.open("a", encoding="utf-8") as file,
        tqdm(total=len(names), initial=len(names) - len(left), unit="image", disable=None) as bar,
    ):
        for batch in _batches(dataset, batch_size, len(names)):
            described = describe([image for _, image in batch])
            for (name, _), captions in zip(batch, described, strict=True):
                file.write(json.dumps(_row(name, captions), ensure_ascii=False) + "\n")
            file.flush()
            count += len(batch)
            bar.update(len(batch))
    if journal != out:
        _write(out, _mended(journal), side_cars)
        journal.unlink()
    return count


def _images(folder: Path) -> list[str]:
    """Names of the image files below `folder`, as paths from it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; give one that holds images")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no image in {folder}; expected one of {', '.join(sorted(IMAGE_SUFFIXES))}")
    return [file.relative_to(folder).as_posix() for file in files]


def _batches(dataset: ImageTextDataset, size: int, total: int) -> Iterator[list[tuple[str, Image.Image]]]:
    named = ((dataset[index].id, image) for index, image in readable_images(dataset, total=total))
    while batch := list(itertools.islice(named, size)):
        yield batch


def _row(name: str, captions: list[Caption]) -> dict[str, Any]:
    best = captions[0]
    row: dict[str, Any] = {"image": name, "caption": best.text, "score": round(best.score, 4)}
    row["words"] = [[word.text, round(word.probability, 4)] for word in best.words]
    if len(captions) > 1:
        row["others"] = [{"caption": other.text, "score": round(other.score, 4)} for other in captions[1:]]
    return row


def _mended(journal: Path) -> list[dict[str, Any]]:
    """The rows of a journal, after cutting off a last line that a killed run left half-written."""
    if not journal.exists():
        journal.parent.mkdir(parents=True, exist_ok=True)
        return []
    whole, _, broken = journal.read_bytes().rpartition(b"\n")  # the break may lie within a character
    if broken:
        with written_aside(journal) as path:
            path.write_bytes(whole + b"\n" if whole else b"")
    return [json.loads(line) for line in whole.split(b"\n") if line]


def _finished(out: Path, side_cars: dict[str, Path]) -> set[str]:
    """The images that a finished output holds (the journal of an unfinished one is read apart)."""
    if out.suffix == "":
        return {name for name, path in side_cars.items() if path.exists()}
    return {row["image"] for row in _read(out)} if out.exists() and out.suffix != ".jsonl" else set()


def _side_cars(out: Path, names: list[str]) -> dict[str, Path]:
    """Image -> its text file."""
    stems = collections.Counter(Path(name).with_suffix("") for name in names)
    return {
        name: out / (f"{name}.txt" if stems[stem] > 1 else stem.with_name(f"{stem.name}.txt"))
        for name, stem in ((name, Path(name).with_suffix("")) for name in names)
    }


def _read(out: Path) -> list[dict[str, Any]]:
    if out.suffix == ".json":
        return json.loads(out.read_text(encoding="utf-8"))
    with out.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(out: Path, rows: list[dict[str, Any]], side_cars: dict[str, Path]) -> None:
    """Add `rows` to a finished output of another kind than the journal; doing it again changes nothing."""
    if out.suffix == "":
        for row in rows:
            with written_aside(side_cars[row["image"]]) as path:
                path.write_text(row["caption"] + "\n", encoding="utf-8")
        return
    there = _read(out) if out.exists() else []
    rows = list({row["image"]: row for row in there + rows}.values())
    with written_aside(out) as path, path.open("w", newline="", encoding="utf-8") as file:
        if out.suffix == ".json":
            json.dump(rows, file, indent=1, ensure_ascii=False)
        else:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
