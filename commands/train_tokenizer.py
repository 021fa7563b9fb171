"""tavq train tokenizer --data DIR --out DIR: train the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.tokenizer.config import RUN_PRESETS, TokenizerRun


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(TokenizerRun, argv, prog="tavq train tokenizer", presets=RUN_PRESETS)

    from tavq.tokenizer.train import TokenizerTask
    from tavq.training.dry_run import dry_run
    from tavq.training.loop import train

    task = TokenizerTask(run)
    run = task.run  # it has what --start decides
    if run.dry_run:
        dry_run(task, run.training, run)
    else:
        train(task, run.training, run.out, run)
