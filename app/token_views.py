"""HTML of the tab "Tokens": an image as a grid of buttons, and what is known of a code."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from tavq.alignment.aligner import LEVEL_NAMES

from .codes import Codes, positions_line, where_else

SIMILAR_CODES = 5
MAX_POSITIONS = 12  # that are written out

GRID_TEMPLATE = '<div class="token-grid">${value}</div>'
GRID_CSS = """
.token-grid > div {
  display: grid; aspect-ratio: 1; background-size: 100% 100%; max-width: 560px; margin: 0 auto;
}
button {border: 1px solid rgb(255 255 255 / 25%); background: none; padding: 0; min-width: 0; cursor: pointer}
button:hover {border: 2px solid white; outline: 2px solid black; z-index: 1}
button:focus-visible {border: 2px solid white; outline: 3px solid black; z-index: 2}
button.same {border: 2px dashed #facc15; box-shadow: inset 0 0 0 1px black}
button.chosen {border: 3px solid #facc15; outline: 2px solid black; z-index: 1}
"""
CODE_CSS = """
.patches {display: flex; flex-wrap: wrap; gap: 8px; margin: 4px 0 12px}
.patches img {width: 72px; height: 72px; border-radius: 4px; display: block}
.patches button {
  border: 1px solid var(--border-color-primary); background: none; border-radius: 6px; padding: 3px;
  cursor: pointer; color: var(--body-text-color); font-size: var(--text-xs);
}
.patches button:hover, .patches button:focus-visible {outline: 3px solid var(--primary-600)}
p {margin: 4px 0}
"""
# A press on a button is an event `click` with the number that the button carries.
PRESS = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-number]");
  if (button) trigger("click", {number: Number(button.dataset.number)});
});
"""


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def token_buttons(image: Image.Image, ids: Tensor, chosen: int) -> str:
    """Lay a button for each token over the image; those with the chosen one's code are marked.

    Args:
        image: decoded from the ids.
        ids: (h, w) int64.
        chosen: number of a token, row by row.
    """
    height, width = ids.shape
    buttons = []
    for cell, code in enumerate(ids.flatten().tolist()):
        row, column = divmod(cell, width)
        css_class = "chosen" if cell == chosen else "same" if code == ids.flatten()[chosen] else ""
        name = f"row {row + 1}, column {column + 1}: code {code}"
        buttons.append(
            f'<button data-number="{cell}" class="{css_class}" title="{name}" aria-label="{name}"></button>'
        )
    style = (
        f"grid-template-columns: repeat({width}, 1fr); grid-template-rows: repeat({height}, 1fr); "
        f"background-image: url({data_url(image)})"
    )
    return f'<div role="group" aria-label="Tokens of the image" style="{style}">{"".join(buttons)}</div>'


def code_card(codes: Codes, ids: Tensor, chosen: int) -> str:
    """Write what is known of the code of a token: words, patches, other places, similar codes."""
    row, column = divmod(chosen, ids.shape[1])
    code = int(ids[row, column])
    parts = [f"<h3>Row {row + 1}, column {column + 1}: code {code}</h3>"]

    for level in codes.levels:
        words = html.escape(", ".join(codes.words(code, level)))
        kind = LEVEL_NAMES[level - 1]
        parts.append(f"<p><b>Nearest words on level {level} ({kind}):</b> {words}</p>")

    elsewhere = where_else(ids, chosen)
    line = positions_line(elsewhere[:MAX_POSITIONS]) or "nowhere else"
    more = f" and {len(elsewhere) - MAX_POSITIONS} more" if len(elsewhere) > MAX_POSITIONS else ""
    parts.append(f"<p><b>In this image also at:</b> {line}{more}</p>")

    patches = codes.patches(code)
    if patches:
        times = f"{codes.count(code)} of {codes.drawn_total:,} tokens of generated images"
        parts.append(f"<p><b>Patches that have it</b> ({times}):</p>")
        parts.append(_images(patches, f"patch with code {code}"))

    buttons = "".join(_code_button(codes, one) for one in (code, *codes.similar(code, SIMILAR_CODES)))
    parts.append("<p><b>Drawn by the decoder alone, and similar codes.</b> Press one to put it here:</p>")
    parts.append(f'<div class="patches">{buttons}</div>')
    return "".join(parts)


def _images(images: Sequence[Image.Image], text: str) -> str:
    shown = "".join(f'<img src="{data_url(image)}" alt="{text}">' for image in images)
    return f'<div class="patches">{shown}</div>'


def _code_button(codes: Codes, code: int) -> str:
    picture = f'<img src="{data_url(codes.alone(code))}" alt="">'
    return f'<button data-number="{code}" aria-label="Put code {code} here">{picture}{code}</button>'
