"""The tab that takes an image apart into its tokens, and lets people change, swap and mix them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from . import components
from .actions import Actions, open_photo, readable_errors
from .codes import Codes, mixed
from .components import HIDDEN, QUEUED
from .token_views import CODE_CSS, GRID_CSS, GRID_TEMPLATE, PRESS, code_card, token_buttons

LOOK = "look at it"
COPY = "put the chosen code there"
SWAP = "swap it with the chosen one"
MAX_UNDO = 50
FAST: dict[str, Any] = {**QUEUED, **HIDDEN}


@dataclasses.dataclass(frozen=True)
class Board:
    """An image whose tokens are played with."""

    photo: Image.Image
    """What the tokenizer sees: the photo squashed to the decoded image's size."""
    own: Tensor
    """The photo's own ids (h, w)."""
    ids: Tensor
    """Today's ids (h, w)."""
    chosen: int = 0
    """Number of the chosen token, row by row."""
    past: tuple[Tensor, ...] = ()
    """Ids before each change, the latest last."""

    def changed(self, ids: Tensor) -> Board:
        return dataclasses.replace(self, ids=ids, past=(*self.past, self.ids)[-MAX_UNDO:])


@dataclasses.dataclass(frozen=True)
class TokensTab:
    """Components of this tab that the page connects to others."""

    photo: gr.Image
    read: Any
    """Handler: the photo -> `outputs`."""
    outputs: Sequence[Any]
    explain: Any
    """Handler: the board -> `explained`, for after `read`."""
    board: gr.State
    explained: Sequence[Any]


class Playing:
    """What the buttons of this tab do. Handlers return [board, grid, comparison, chosen code, status]."""

    def __init__(self, actions: Actions):
        self.pipeline = actions.pipeline
        self.codes = Codes(actions.pipeline)

    def read(self, photo: str | None) -> list[Any]:
        """Encode a photo, and lay out its tokens."""
        try:
            with readable_errors():
                image = open_photo(photo)
        except gr.Error as error:
            return [gr.skip()] * 4 + [components.failed(error)]
        size = self.pipeline.tokenizer.decode_size_px
        seen = image.resize((size, size), Image.Resampling.BICUBIC)
        ids = self.pipeline.encode([image])[0].cpu()
        h, w = ids.shape
        return self._shown(Board(seen, ids, ids, chosen=h // 2 * w + w // 2))

    def press(self, board: Board | None, press_does: str, event: gr.EventData) -> list[Any]:
        """Look at the token that was pressed, or change it."""
        if board is None:
            return [gr.skip()] * 5
        cell = int(event.number)
        ids = board.ids.clone().flatten()
        if press_does == COPY:
            ids[cell] = ids[board.chosen].clone()
            return self._shown(board.changed(ids.view_as(board.ids)))
        if press_does == SWAP:
            ids[[cell, board.chosen]] = ids[[board.chosen, cell]]
            board = board.changed(ids.view_as(board.ids))
        return self._shown(dataclasses.replace(board, chosen=cell))

    def put_pressed(self, board: Board | None, event: gr.EventData) -> list[Any]:
        """Give the chosen token the code of the button that was pressed."""
        return self.put(board, int(event.number), everywhere=False)

    def put_one(self, board: Board | None, code: float | None) -> list[Any]:
        return self.put(board, code, everywhere=False)

    def put_all(self, board: Board | None, code: float | None) -> list[Any]:
        return self.put(board, code, everywhere=True)

    def put(self, board: Board | None, code: float | None, *, everywhere: bool) -> list[Any]:
        """Give the chosen token another code, or all tokens that have its code."""
        num_codes = self.pipeline.tokenizer.num_codes
        if board is None:
            return [gr.skip()] * 5
        if code is None or not 0 <= code < num_codes:
            error = gr.Error(f"the code is {code}, expected 0 to {num_codes - 1}")
            return [gr.skip()] * 4 + [components.failed(error)]
        ids = board.ids.clone().flatten()
        if everywhere:
            ids[ids == ids[board.chosen]] = int(code)
        else:
            ids[board.chosen] = int(code)
        return self._shown(board.changed(ids.view_as(board.ids)))

    def undo(self, board: Board | None) -> list[Any]:
        if board is None or not board.past:
            return [gr.skip()] * 5
        *past, ids = board.past
        return self._shown(dataclasses.replace(board, ids=ids, past=tuple(past)))

    def reset(self, board: Board | None) -> list[Any]:
        if board is None:
            return [gr.skip()] * 5
        return self._shown(board.changed(board.own))

    def mix(self, board: Board | None, second: str | None, percent: float) -> list[Any]:
        """Replace a share of the photo's own tokens by those of a second photo."""
        try:
            with readable_errors():
                if board is None:
                    raise ValueError("no photo; read the tokens of a first one")
                other = self.pipeline.encode([open_photo(second)])[0].cpu()
        except gr.Error as error:
            return [gr.skip()] * 4 + [components.failed(error)]
        return self._shown(board.changed(mixed(board.own, other, percent / 100)))

    def explain(self, board: Board | None) -> Iterator[list[Any]]:
        """Yield [card of the chosen code, and the parts of the tab that need a photo, shown]."""
        if board is None:
            yield [gr.skip()] * 4
            return
        # Words take a while when they are encoded for the first time: the picture is shown before.
        yield [gr.skip(), gr.Column(visible=True), gr.Row(visible=True), gr.Row(visible=True)]
        yield [code_card(self.codes, board.ids, board.chosen)] + [gr.skip()] * 3

    def _shown(self, board: Board) -> list[Any]:
        image = self.pipeline.decode(board.ids.unsqueeze(0).to(self.pipeline.device))[0]
        differ = int((board.ids != board.own).sum())
        line = f"{differ} of {board.ids.numel()} tokens differ from the photo's own."
        grid = token_buttons(image, board.ids, board.chosen)
        code = int(board.ids.flatten()[board.chosen])
        used = len(torch.unique(board.ids))
        return [board, grid, (board.photo, image), code, components.told(f"{used} different codes. {line}")]


def tokens(actions: Actions, drawn: Sequence[Path]) -> TokensTab:
    playing = Playing(actions)
    board: gr.State = gr.State(None)
    with gr.Row():
        with gr.Column(scale=2):
            photo = components.photo()
            run = gr.Button("Read its tokens", variant="primary", elem_classes="run")
            components.shortcuts()
            components.photo_examples(photo, drawn)
        with gr.Column(scale=3):
            status = components.status()
            with gr.Column(visible=False) as play:
                gr.Markdown("**The image, decoded from its tokens.** Press a token: what does its code mean?")
                grid = gr.HTML("", html_template=GRID_TEMPLATE, css_template=GRID_CSS, js_on_load=PRESS)
                press_does = gr.Radio([LOOK, COPY, SWAP], value=LOOK, label="Pressing a token will")
                code = gr.Number(label="Code of the chosen token", precision=0)
                with gr.Row():
                    put = gr.Button("Put this code here", size="sm", min_width=120)
                    put_all = gr.Button("Put it wherever the old one is", size="sm", min_width=120)
                    undo = gr.Button("Undo", size="sm", min_width=80)
                    reset = gr.Button("The photo's own tokens", size="sm", min_width=120)
    with gr.Row(visible=False) as found:
        with gr.Column(scale=2):
            comparison = components.comparison("Photo and decoded")
        with gr.Column(scale=3):
            card = gr.HTML("", css_template=CODE_CSS, js_on_load=PRESS)
    with gr.Row(visible=False) as mixing:
        with gr.Column(scale=2):
            gr.Markdown("#### Mix the tokens of two photos")
            second = components.photo("Second photo")
        with gr.Column(scale=3):
            share = gr.Slider(0, 100, 50, step=5, label="Tokens of the second photo, %")
            mix = gr.Button("Mix")
            components.photo_examples(second, drawn)

    explained = [card, play, found, mixing]
    outputs = [board, grid, comparison, code, status]
    run.click(playing.read, photo, outputs, api_visibility="private", show_progress_on=status, **QUEUED).then(
        playing.explain, board, explained, api_visibility="private", show_progress_on=status, **QUEUED
    )
    changes = [
        grid.click(playing.press, [board, press_does], outputs, **FAST),
        card.click(playing.put_pressed, board, outputs, **FAST),
        put.click(playing.put_one, [board, code], outputs, **FAST),
        put_all.click(playing.put_all, [board, code], outputs, **FAST),
        undo.click(playing.undo, board, outputs, **FAST),
        reset.click(playing.reset, board, outputs, **FAST),
        gr.on([mix.click, share.release], playing.mix, [board, second, share], outputs, **FAST),
    ]
    for change in changes:
        change.then(playing.explain, board, explained, **FAST)
    return TokensTab(photo, playing.read, outputs, playing.explain, board, explained)
