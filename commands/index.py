"""tavq index PHOTOS --out INDEX: make a folder of photos searchable, or bring its index up to date."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from tavq.base.arguments import parse, print_json, run_main
from tavq.base.device import Device, choose_device
from tavq.base.files import check_directory, file_hash
from tavq.base.locks import only_writer
from tavq.base.weights import CHECKPOINT, WEIGHTS_FILE, local_directory

if TYPE_CHECKING:
    from tavq.photo_index import PhotoIndex


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


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(IndexRun, argv, prog="tavq index")
    if not run.photos.is_dir():
        raise FileNotFoundError(f"no folder {run.photos}; name the one that holds the photos")
    check_directory(run.out)
    with only_writer(run.out):
        changes = open_index(run.out, run.checkpoint, run.device).update(run.photos)
    if run.json:
        print_json({"index": str(run.out), **dataclasses.asdict(changes)})
        return
    print(
        f"{run.out}: {changes.added} photos encoded, {changes.removed} gone, {changes.unchanged} as they were"
    )
    if changes.unreadable:
        print(f"{len(changes.unreadable)} could not be read, such as {changes.unreadable[0]}")


def open_index(directory: Path, checkpoint: str, device: str) -> PhotoIndex:
    """Open the index at `directory` with the tokenizer of a checkpoint."""
    from tavq.photo_index import PhotoIndex
    from tavq.tokenizer.model import TAVQTokenizer

    folder = local_directory(checkpoint) / "tokenizer"
    tokenizer = TAVQTokenizer.from_pretrained(folder).to(choose_device(device))
    return PhotoIndex(directory, tokenizer, file_hash(folder / WEIGHTS_FILE))
