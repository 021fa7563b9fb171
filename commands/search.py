"""tavq search INDEX [WORDS] [--like PHOTO] [--page FILE.html]: find photos by words, a photo, or both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from tavq.base.arguments import parse, print_json, run_main
from tavq.base.device import Device
from tavq.base.files import check_file
from tavq.base.weights import CHECKPOINT

from .index import open_index

if TYPE_CHECKING:
    from tavq.photo_index import Hit


@dataclasses.dataclass(frozen=True)
class SearchRun:
    """Find photos of an index by words, by a photo, or by both: the photo's look and what the words say.

    Examples: tavq search photos-index/ "a dog on the beach" --page found.html;  tavq search photos-index/
    "in the snow" --like dog.jpg
    """

    index: Positional[Path]
    """Directory that tavq index made."""
    words: Positional[str | None] = None
    """What the photos show."""
    like: Path | None = None
    """Photo that the photos look like; it need not be in the index."""
    top: int = 20
    """Number of photos."""
    page: Path | None = None
    """HTML file for the photos found, as thumbnails."""
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME with which the index was made."""
    device: Device = "auto"
    """Device to run on."""
    json: bool = False
    """Print one line of JSON for each photo, instead of text."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top is {self.top}, expected 1 or more")
        if not (self.words or self.like):
            raise ValueError('nothing to look for; name words, as in: tavq search INDEX "a dog", or --like')


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(SearchRun, argv, prog="tavq search")
    if not run.index.is_dir():
        raise FileNotFoundError(f"no index {run.index}; make it with: tavq index PHOTOS --out {run.index}")
    if run.page is not None:
        check_file(run.page, ".html")

    from tavq.data.images import load_image
    from tavq.tokenizer.retrieval import text_encoder_of

    like = None if run.like is None else load_image(run.like)
    index = open_index(run.index, run.checkpoint, run.device)
    encoder = text_encoder_of(index.tokenizer)
    hits = index.search(encoder.encode, run.words, like, run.top)
    for hit in hits:
        if run.json:
            print_json({"path": str(hit.path), "score": hit.score})
        else:
            print(f"{hit.score:8.4f}  {hit.path}")
    if run.page is not None:
        write_found(run, run.page, hits)
        if not run.json:
            print(run.page)


def write_found(run: SearchRun, page: Path, hits: Sequence[Hit]) -> None:
    """Write the photos found as a page of thumbnails, after the photo that was looked for."""
    from tavq.data.images import load_image
    from tavq.data.thumbnail_page import Card, write_page

    sections = {}
    if run.like is not None:
        sections["Like"] = [Card(load_image(run.like), run.like.name)]
    # A photo may have been deleted since the index was made.
    sections["Found"] = [
        Card(load_image(hit.path) if hit.path.is_file() else None, hit.path.name, [f"{hit.score:.4f}"])
        for hit in hits
    ]
    write_page(page, run.words or "Search by a photo", f"{len(hits)} photos of {run.index}", sections)
