"""Caption a folder of images into a file or a directory. Calling it again resumes.

The suffix of the output decides its format: `.jsonl`, `.json`, `.csv`, or none: a directory of `.txt` files.
Captions are first appended to a journal, a file of JSON lines: a killed process loses one batch at most.
"""

from __future__ import annotations

import collections
import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tavq.base.files import atomic_write
from tavq.base.journal import read_journal
from tavq.base.locks import only_writer
from tavq.base.progress import Progress
from tavq.data.dataset import Example, ImageTextDataset, check_unreadable, readable_images
from tavq.data.images import UnreadableImageError, squash
from tavq.data.layouts_folder import IMAGE_SUFFIXES

from .config import OUTPUT_SUFFIXES
from .decoding import Caption

CaptionImages = Callable[[Sequence[Image.Image]], Sequence[Sequence[Caption]]]
ComputeParts = Callable[[Sequence[tuple[str, Path]]], Iterable[dict[str, Any]]]
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
    """Caption every image in `folder` and below that `out` does not hold yet, see `caption_files`."""
    images = images_in(Path(folder))
    return caption_files(images, out, caption_images, batch_size=batch_size, size_px=size_px)


def caption_files(
    images: Mapping[str, Path],
    out: str | Path,
    caption_images: CaptionImages,
    *,
    batch_size: int = BATCH_SIZE,
    size_px: int | None = None,
) -> int:
    """Caption every image that `out` does not hold yet.

    Args:
        images: name of each image in the output -> its file.
        out: `.jsonl`, `.json` or `.csv` file, or a directory of `.txt` files with the names of the images
            (`a.jpg.txt` and `a.png.txt` where both images exist, else `a.txt`).
        caption_images: RGB images -> captions of each, best first.
        batch_size: images passed to `caption_images` at once.
        size_px: side of the square that each image is squashed to as it is read, so that a batch of large
            images does not fill the memory. None passes images at their own size.

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
        return _caption_rest(images, out, caption_images, batch_size, size_px)


def _caption_rest(
    images: Mapping[str, Path], out: Path, caption_images: CaptionImages, batch_size: int, size_px: int | None
) -> int:
    names = list(images)
    text_files = _text_files(out, names)
    journal = _journal_of(out)
    done = _captioned(out, text_files) | {row["image"] for row in read_journal(journal)}
    remaining = [name for name in names if name not in done]

    examples = [Example(name, images[name], (), None, "") for name in remaining]
    dataset = ImageTextDataset("images", examples)
    count = 0
    with (
        journal.open("a", encoding="utf-8") as file,
        Progress(total=len(names), initial=len(names) - len(remaining), unit="image") as bar,
    ):
        for batch in _batches(dataset, batch_size, len(names), size_px):
            groups = caption_images([image for _, image in batch])
            for (name, _), captions in zip(batch, groups, strict=True):
                file.write(json.dumps(_row(name, captions), ensure_ascii=False) + "\n")
            file.flush()
            if not journal.exists():
                raise FileNotFoundError(
                    f"{journal} was removed while images were described; repeat the command to begin anew"
                )
            count += len(batch)
            bar.update(len(batch))

    # First the output, then the journal goes: a process killed between the two repeats the first step.
    if journal != out:
        _write(out, read_journal(journal), text_files)
        journal.unlink()
    return count


def caption_part(
    images: Sequence[tuple[str, Path]], caption_images: CaptionImages, size_px: int
) -> list[dict[str, Any]]:
    """Return the rows of some images, in batches as `caption_files` makes them.

    Args:
        images: names and files; the first of them begins a batch.
        caption_images: as `caption_files` takes it.
        size_px: likewise.

    Returns:
        A row for each image; one that cannot be read has `unreadable`, the reason, instead of a caption.
    """
    dataset = ImageTextDataset("images", [Example(name, path, (), None, "") for name, path in images])
    rows: list[dict[str, Any]] = []
    for first in range(0, len(images), BATCH_SIZE):
        opened: dict[str, Image.Image] = {}
        for index in range(first, min(first + BATCH_SIZE, len(images))):
            name = dataset[index].id
            try:
                opened[name] = squash(dataset.load_image(index), size_px)
            except UnreadableImageError as error:
                rows.append({"image": name, "unreadable": str(error)})
        groups = caption_images(list(opened.values())) if opened else []
        rows += [_row(name, captions) for name, captions in zip(opened, groups, strict=True)]
    return rows


def caption_files_in_parts(images: Mapping[str, Path], out: str | Path, compute: ComputeParts) -> int:
    """Like `caption_files`, with the rows of `caption_part` computed elsewhere, some images a part.

    Args:
        images: name of each image in the output -> its file.
        out: as `caption_files` takes it.
        compute: names and files of the images that `out` does not hold yet -> their rows, in this order.

    Returns:
        How many images were captioned by this call.
    """
    out = Path(out)
    with only_writer(out):
        names = list(images)
        text_files = _text_files(out, names)
        journal = _journal_of(out)
        done = _captioned(out, text_files) | {row["image"] for row in read_journal(journal)}
        remaining = [(name, images[name]) for name in names if name not in done]

        count = 0
        reasons: list[str] = []
        # All rows or none: a job that is stopped here finds the same images left, and so the same parts.
        with atomic_write(journal) as aside, aside.open("w", encoding="utf-8") as file:
            if journal.exists():
                file.write(journal.read_text(encoding="utf-8"))
            for row in compute(remaining):
                if "unreadable" in row:
                    reasons.append(f"{row['image']} ({row['unreadable']})")
                    continue
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            if remaining:
                check_unreadable("images", reasons, len(remaining), len(names))
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


def _batches(
    dataset: ImageTextDataset, batch_size: int, total: int, size_px: int | None
) -> Iterator[list[tuple[str, Image.Image]]]:
    """Yield batches of (name, image). Of `total` images, which earlier calls share, 1 % may be unreadable."""
    readable = readable_images(dataset, total=total)
    # By their place among all images, not among the readable ones: so parts of the images make equal batches.
    for _, group in itertools.groupby(readable, key=lambda found: found[0] // batch_size):
        yield [
            (dataset[index].id, image if size_px is None else squash(image, size_px))
            for index, image in group
        ]


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
