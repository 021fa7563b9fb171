"""tavq train tokenizer --data DIR --out DIR: train the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.tokenizer.train import RUN_PRESETS, TokenizerRun, TokenizerTask
from tavq.training.loop import train


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(TokenizerRun, argv, prog="tavq train tokenizer", presets=RUN_PRESETS)
    task = TokenizerTask(run)
    train(task, task.run.training, task.run.out, task.run)  # the task's run has what --start decides
