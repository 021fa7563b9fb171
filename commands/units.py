"""tavq units TEXT: show the words, phrases and sentences of a text."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from tyro.conf import Positional

from tavq.alignment.units import split_units
from tavq.base.arguments import parse, print_json, run_main


@dataclasses.dataclass(frozen=True)
class UnitsRun:
    """Show the words, phrases and sentences that a text is split into for alignment.

    Example: tavq units "Two black dogs jump over a fallen log."
    """

    text: Positional[str]
    """The text, or - for standard input."""
    json: bool = False
    """Print one line of JSON for each result, instead of text."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(UnitsRun, argv, prog="tavq units")
    text = sys.stdin.read() if run.text == "-" else run.text
    if not text.strip():
        raise ValueError('the text is empty; write one, as in: tavq units "a dog jumps over a log"')
    found = dataclasses.asdict(split_units(text))
    if run.json:
        print_json(found)
        return
    for kind, units in found.items():
        print(f"{kind}: " + "; ".join(units))
