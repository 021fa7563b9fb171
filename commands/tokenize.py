"""tavq tokenize --data DIR --out DIR [--checkpoint DIR]: encode a dataset into ids."""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.tokenizer.run_config import TokenizeRun


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(TokenizeRun, argv, prog="tavq tokenize")

    from tavq.tokenizer.encode_dataset import encode_dataset

    encode_dataset(run)
    print(run.out)
