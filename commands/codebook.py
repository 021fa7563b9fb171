"""tavq codebook CHECKPOINT --data DIR [--out codebook.png]: show a codebook."""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.tokenizer.run_config import CodebookRun


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CodebookRun, argv, prog="tavq codebook")

    from tavq.tokenizer.contact_sheet import show_codebook

    show_codebook(run)
