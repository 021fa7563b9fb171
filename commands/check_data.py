"""tavq check-data DIR [--out DIR]: captions that fit their image badly, copies, broken and tiny images."""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.base.files import check_directory
from tavq.tokenizer.run_config import CheckRun


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CheckRun, argv, prog="tavq check-data")
    check_directory(run.out)

    from tavq.tokenizer.check_dataset import check_dataset

    check_dataset(run)
