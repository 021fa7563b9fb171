"""tavq train captioner --tokens DIR --out DIR: train the captioner."""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.captioner.config import RUN_PRESETS, CaptionerRun


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CaptionerRun, argv, prog="tavq train captioner", presets=RUN_PRESETS)

    from tavq.captioner.train import train_captioner
    from tavq.data.tokens import read_meta
    from tavq.tokenizer.caption_scores import caption_alignment_scores
    from tavq.tokenizer.foreign import open_tokenizer

    if run.tokenizer is None:
        train_captioner(run)
        return
    tokenizer = open_tokenizer(run.tokenizer)
    if tokenizer.codebook_hash != read_meta(run.tokens).codebook_hash:
        raise ValueError(f"{run.tokens} was made by another tokenizer than {run.tokenizer}; give that one")
    scores = caption_alignment_scores(tokenizer, run.tokens) if run.model.quality_buckets else None
    train_captioner(run, tokenizer.codebook, scores)
