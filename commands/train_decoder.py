"""tavq train decoder --tokenizer DIR --data DIR --out DIR: train a tokenizer's decoder further."""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.tokenizer.train_decoder import DECODER_PRESETS, DecoderRun, DecoderTask
from tavq.training.loop import train


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(DecoderRun, argv, prog="tavq train decoder", presets=DECODER_PRESETS)
    train(DecoderTask(run), run.training, run.out, run)
