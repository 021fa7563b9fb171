"""tavq train decoder --tokenizer DIR --data DIR --out DIR: train a tokenizer's decoder further."""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.tokenizer.run_config import DECODER_PRESETS, DecoderRun


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(DecoderRun, argv, prog="tavq train decoder", presets=DECODER_PRESETS)

    from tavq.tokenizer.train_decoder import DecoderTask
    from tavq.training.dry_run import dry_run
    from tavq.training.loop import train

    task = DecoderTask(run)
    if run.dry_run:
        dry_run(task, run.training, run)
    else:
        train(task, run.training, run.out, run)
