"""Caption a folder of images into a file or a directory. Calling it again resumes.

The suffix of the output decides its format: `.jsonl`, `.json`, `.csv`, or none: a directory of `.txt` files.
Captions are first appended to a journal, a file of JSON lines: a killed process loses one batch at most.
"""

from __future__ import annotations

import collections
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tavq.base.files import atomic_write
from tavq.base.journal import append_rows, read_journal
from tavq.base.locks import only_writer
from tavq.base.progress import Progress
from tavq.data.dataset import Example, ImageTextDataset, UnreadableImages, tried_images
from tavq.data.images import UnreadableImageError, squash
from tavq.data.layouts_folder import IMAGE_SUFFIXES

from .config import OUTPUT_SUFFIXES
from .decoding import Caption

CaptionImages = Callable[[Sequence[Image.Image]], Sequence[Sequence[Caption]]]
ComputeRows = Callable[[Sequence[tuple[str, Path]]], Iterable[Sequence[dict[str, Any]]]]
"""Names and files of images -> their rows in this order, some at a time, see `caption_batches`."""
BATCH_SIZE = 32
CSV_COLUMNS = ("image", "caption", "score")


def caption_folder(
    folder: str | Path,
    out: str | Path,
    caption_images: CaptionImages,
    *,
    batch_size: int = BATCH_SIZE,
    size_px: int | None = None,
) -> int:
    """Caption every image in `folder` and below that `out` does not hold yet.

    See `caption_files` and `caption_batches`.
    """
    images = images_in(Path(folder))
    return caption_files(
        images,
        out,
        lambda left: caption_batches(left, caption_images, batch_size=batch_size, size_px=size_px),
    )


def caption_batches(
    images: Sequence[tuple[str, Path]],
    caption_images: CaptionImages,
    *,
    batch_size: int = BATCH_SIZE,
    size_px: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of some images, batch by batch.

    Args:
        images: names and files; the first of them begins a batch. Batches are formed before images are read,
            so that any part of the images makes the batches that it makes in the whole.
        caption_images: RGB images -> captions of each, best first.
        batch_size: images passed to `caption_images` at once.
        size_px: side of the square that each image is squashed to as it is read, so that a batch of large
            images does not fill the memory. None passes images at their own size.

    Yields:
        A row for each image; one that cannot be read has `unreadable`, the reason, instead of a caption.
    """
    dataset = ImageTextDataset("images", [Example(name, path, (), None, "") for name, path in images])
    for first in range(0, len(images), batch_size):
        rows: list[dict[str, Any]] = []
        opened: dict[str, Image.Image] = {}
        for index, image in tried_images(dataset, range(first, min(first + batch_size, len(images)))):
            name = dataset[index].id
            if isinstance(image, UnreadableImageError):
                rows.append({"image": name, "unreadable": str(image)})
            else:
                opened[name] = image if size_px is None else squash(image, size_px)
        groups = caption_images(list(opened.values())) if opened else []
        rows += [_row(name, captions) for name, captions in zip(opened, groups, strict=True)]
        yield rows


def caption_files(images: Mapping[str, Path], out: str | Path, compute: ComputeRows) -> int:
    """Caption every image that `out` does not hold yet.

    Args:
        images: name of each image in the output -> its file.
        out: `.jsonl`, `.json` or `.csv` file, or a directory of `.txt` files with the names of the images
            (`a.jpg.txt` and `a.png.txt` where both images exist, else `a.txt`).
        compute: makes the rows of the images that are left. It may add rows of others, which are ignored.

    Returns:
        How many images were captioned by this call. Unreadable images are named in one warning.

    Raises:
        ValueError: the output has an unknown suffix, or more than 1 % of the images are unreadable.
    """
    out = Path(out)
    if out.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(
            f"cannot write {out.suffix} files ({out}); name a .jsonl, .json or .csv file, or a directory"
        )

    with only_writer(out):
        return _caption_rest(images, out, compute)


def _caption_rest(images: Mapping[str, Path], out: Path, compute: ComputeRows) -> int:
    text_files = _text_files(out, list(images))
    journal = _journal_of(out)
    done = _captioned(out, text_files) | {row["image"] for row in read_journal(journal)}
    left = {name: path for name, path in images.items() if name not in done}

    append_rows(journal, [])  # from now on its removal is noticed
    count = 0
    unreadable = UnreadableImages("images", len(images))
    with Progress(total=len(images), initial=len(images) - len(left), unit="image") as bar:
        for rows in compute(list(left.items())):
            captioned = []
            for row in rows:
                if row["image"] not in left:
                    continue
                if "unreadable" in row:
                    unreadable.add(row["image"], row["unreadable"])
                else:
                    captioned.append(row)
            append_rows(journal, captioned)
            count += len(captioned)
            bar.update(len(captioned))
    unreadable.warn(len(left))

    # First the output, then the journal goes: a process killed between the two repeats the first step.
    if journal != out:
        _write(out, read_journal(journal), text_files)
        journal.unlink()
    return count


def _journal_of(out: Path) -> Path:
    # JSON lines can be appended to, so there the output is its own journal.
    return out if out.suffix == ".jsonl" else out.with_name(f"{out.name}.unfinished.jsonl")


def images_in(folder: Path) -> dict[str, Path]:
    """Find the image files in `folder` and below: path relative to it -> path.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; give one that holds images")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no image in {folder}; expected one of {', '.join(sorted(IMAGE_SUFFIXES))}")
    return {file.relative_to(folder).as_posix(): file for file in files}


def _text_files(out: Path, names: list[str]) -> dict[str, Path]:
    """Map each image to its text file in the directory `out`."""
    # Of an absolute path, and of one that leads upwards, only the name lies below `out`.
    inside = {name: Path(name) for name in names}
    inside = {n: Path(p.name) if p.is_absolute() or ".." in p.parts else p for n, p in inside.items()}
    stems = {name: path.with_suffix("") for name, path in inside.items()}
    # Where a.jpg and a.png lie side by side, one a.txt would be overwritten by the other.
    counts = collections.Counter(stems.values())
    return {
        name: out / (f"{inside[name]}.txt" if counts[stem] > 1 else stem.with_name(f"{stem.name}.txt"))
        for name, stem in stems.items()
    }


def _captioned(out: Path, text_files: dict[str, Path]) -> set[str]:
    """Return the images that a finished output holds; those of an unfinished one are in its journal."""
    if out.suffix == "":
        return {name for name, path in text_files.items() if path.exists()}
    if out.suffix == ".jsonl" or not out.exists():
        return set()
    return {row["image"] for row in _read(out)}


def _row(name: str, captions: Sequence[Caption]) -> dict[str, Any]:
    best = captions[0]
    row: dict[str, Any] = {
        "image": name,
        "caption": best.text,
        "score": round(best.score, 4),
        "words": [[word.text, round(word.probability, 4)] for word in best.words],
    }
    if len(captions) > 1:
        row["others"] = [{"caption": other.text, "score": round(other.score, 4)} for other in captions[1:]]
    return row


def _read(out: Path) -> list[dict[str, Any]]:
    """Read the rows of a finished .json or .csv output."""
    if out.suffix == ".json":
        return json.loads(out.read_text(encoding="utf-8"))
    with out.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(out: Path, rows: list[dict[str, Any]], text_files: dict[str, Path]) -> None:
    """Add `rows` to a finished output other than .jsonl; writing the same rows twice changes nothing."""
    if out.suffix == "":
        for row in rows:
            with atomic_write(text_files[row["image"]]) as path:
                path.write_text(row["caption"] + "\n", encoding="utf-8")
        return

    present = _read(out) if out.exists() else []
    rows = list({row["image"]: row for row in present + rows}.values())
    with atomic_write(out) as path, path.open("w", newline="", encoding="utf-8") as file:
        if out.suffix == ".json":
            json.dump(rows, file, indent=1, ensure_ascii=False)
        else:
            writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
