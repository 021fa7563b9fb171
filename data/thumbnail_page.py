"""A page of thumbnails with text: one HTML file that holds its images, so that it can be moved anywhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tavq.base.files import atomic_write

THUMBNAIL_PX = 240
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
  body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }}
  .cards {{ display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }}
  figure {{ margin: 0; }} img {{ max-width: 100%; }} .about {{ color: #555; }}
  figcaption b {{ overflow-wrap: anywhere; }} figcaption p {{ margin: .2rem 0; }}
</style>
<h1>{title}</h1>
<p class="about">{about}</p>
{sections}
</html>
"""


@dataclass(frozen=True)
class Card:
    """One image of a page, with the text below it; an image that cannot be read is None."""

    image: Image.Image | None
    title: str
    lines: Sequence[str] = ()


def write_page(path: Path, title: str, about: str, sections: Mapping[str, Sequence[Card]]) -> None:
    """Write sections of images, atomically. The page shows the images, so it is not for publication.

    Args:
        path: `.html` file.
        title: heading of the page.
        about: what it shows.
        sections: heading -> its images.
    """
    parts = [
        f"<h2>{html.escape(heading)}</h2>\n<div class='cards'>{''.join(map(_figure, cards))}</div>"
        for heading, cards in sections.items()
    ]
    page = _PAGE.format(title=html.escape(title), about=html.escape(about), sections="\n".join(parts))
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _figure(card: Card) -> str:
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in card.lines)
    picture = "" if card.image is None else f"<img alt='' src='{_thumbnail(card.image)}'>"
    return f"<figure>{picture}<figcaption><b>{html.escape(card.title)}</b>{lines}</figcaption></figure>\n"


def _thumbnail(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    stream = io.BytesIO()
    small.save(stream, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
