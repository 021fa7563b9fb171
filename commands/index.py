"""tavq index PHOTOS --out INDEX: make a folder of photos searchable, or bring its index up to date."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import OmitArgPrefixes, Positional

from tavq.base.arguments import parse, print_json, run_main
from tavq.base.device import Device, choose_device
from tavq.base.engine import EngineConfig
from tavq.base.files import check_directory, file_hash
from tavq.base.locks import only_writer
from tavq.base.weights import CHECKPOINT, WEIGHTS_FILE, local_directory
from tavq.serve.config import check_ray

if TYPE_CHECKING:
    from tavq.photo_index import Changes, EncodedPhoto, PhotoIndex

PHOTOS_PER_PART = 256
"""Photos that a task of --engine ray encodes."""


@dataclasses.dataclass(frozen=True)
class IndexRun:
    """Make a folder of photos searchable for tavq search. The same command resumes, and follows changes.

    Example: tavq index photos/ --out photos-index/
    """

    photos: Positional[Path]
    """Folder of images; those in folders below it count, too."""
    out: Path
    """Directory for the index. It takes some hundred bytes a photo and 1.5 kB for its vector."""
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/, which must be aligned with text."""
    device: Device = "auto"
    """Device to run on."""
    json: bool = False
    """Print one line of JSON instead of text."""
    engine: OmitArgPrefixes[EngineConfig] = EngineConfig()


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(IndexRun, argv, prog="tavq index")
    if not run.photos.is_dir():
        raise FileNotFoundError(f"no folder {run.photos}; name the one that holds the photos")
    check_directory(run.out)
    with only_writer(run.out):
        changes = update_on_ray(run) if run.engine.engine == "ray" else update_here(run)
    if run.json:
        print_json({"index": str(run.out), **dataclasses.asdict(changes)})
        return
    print(
        f"{run.out}: {changes.added} photos encoded, {changes.removed} gone, {changes.unchanged} as they were"
    )
    if changes.unreadable:
        print(f"{len(changes.unreadable)} could not be read, such as {changes.unreadable[0]}")


def update_here(run: IndexRun) -> Changes:
    """Bring the index up to date in this process."""
    return open_index(run.out, run.checkpoint, run.device).update(run.photos)


def update_on_ray(run: IndexRun) -> Changes:
    """Bring the index up to date, with the photos encoded on a Ray cluster; this process writes the index."""
    check_ray()
    from tavq.serve.ray_jobs import PartJob, clear_parts
    from tavq.serve.work import ids_of_row, open_indexer

    tokenizer = (local_directory(run.checkpoint) / "tokenizer").resolve()
    parts = run.out.with_name(f"{run.out.name}.parts")

    def encode(folder: Path, states: Mapping[str, tuple[int, int]]) -> Iterator[EncodedPhoto]:
        if not states:
            return
        folder = folder.resolve()
        job = PartJob(
            parts,
            [(name, *state) for name, state in states.items()],
            PHOTOS_PER_PART,
            open_indexer,
            (str(tokenizer), run.device, folder),
            fingerprint=f"index {folder} {file_hash(tokenizer / WEIGHTS_FILE)}",
        )
        yield from map(ids_of_row, itertools.chain.from_iterable(job.rows(run.engine)))

    changes = open_index(run.out, run.checkpoint, "cpu").update(run.photos, encode)
    clear_parts(parts)
    return changes


def open_index(directory: Path, checkpoint: str, device: str) -> PhotoIndex:
    """Open the index at `directory` with the tokenizer of a checkpoint."""
    from tavq.photo_index import PhotoIndex
    from tavq.tokenizer.model import TAVQTokenizer

    folder = local_directory(checkpoint) / "tokenizer"
    tokenizer = TAVQTokenizer.from_pretrained(folder).to(choose_device(device))
    return PhotoIndex(directory, tokenizer, file_hash(folder / WEIGHTS_FILE))
