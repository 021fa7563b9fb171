"""tavq train lexicon --tokens DIR --generator DIR --out DIR: train image words for a frozen generator."""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.generator.config import LEXICON_PRESETS, LexiconRun


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(LexiconRun, argv, prog="tavq train lexicon", presets=LEXICON_PRESETS)

    from tavq.generator.train_lexicon import train_lexicon

    train_lexicon(run)
