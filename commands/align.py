"""tavq align --base diffusers:PATH --data DIR --out DIR: align anybody's VQ model with text."""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.tokenizer.run_config import AlignRun


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(AlignRun, argv, prog="tavq align")

    from tavq.tokenizer.align import align_model

    align_model(run)
