"""Progress of long commands: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
LINE = "{desc}{n_fmt} of {total_fmt} {unit}s, {rate_fmt}, {remaining} left"


class Progress(tqdm):
    """A bar of tqdm; where stderr is no terminal, a line of its own every ten seconds takes its place."""

    is_bar = True
    disable = True
    """Of a bar that a signal ended before it was made: `close`, which Python calls, has nothing to do."""

    def __init__(self, *arguments: Any, **options: Any):
        self.is_bar = sys.stderr.isatty()
        self.shown_at = time.monotonic()
        if not self.is_bar:
            options |= {"bar_format": LINE, "desc": f"{options['desc']}: " if options.get("desc") else ""}
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw the bar, or print a line if it is time for one."""
        if self.is_bar:
            return super().display(msg, pos)
        if self.n > self.initial and time.monotonic() - self.shown_at >= SECONDS_BETWEEN_LINES:
            self.shown_at = time.monotonic()
            print(self, file=sys.stderr, flush=True)
        return None

    def clear(self, nolock: bool = False) -> None:
        """Take the bar away while something else is printed; a line stays."""
        if self.is_bar:
            super().clear(nolock=nolock)

    def close(self) -> None:
        """End the bar; lines need no end."""
        if not self.is_bar:
            self.disable = True
        super().close()
