"""tavq train generator --tokens DIR --out DIR: train the prior."""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.generator.train import RUN_PRESETS as PRIOR_PRESETS
from tavq.generator.train import PriorRun, train_prior
from tavq.tokenizer.model import TAVQTokenizer


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(PriorRun, argv, prog="tavq train generator", presets=PRIOR_PRESETS)
    if run.tokenizer is None:
        train_prior(run)
        return
    tokenizer = TAVQTokenizer.from_pretrained(run.tokenizer)
    train_prior(run, lambda ids: tokenizer.decode(ids.cpu()), tokenizer.codebook)
