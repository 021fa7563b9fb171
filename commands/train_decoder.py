"""tavq train decoder --tokenizer DIR --data DIR --out DIR: train a tokenizer's decoder further."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tavq.base.arguments import parse, run_main
from tavq.tokenizer.run_config import DECODER_PRESETS, DecoderRun

if TYPE_CHECKING:
    from tavq.tokenizer.train_decoder import Resample


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(DecoderRun, argv, prog="tavq train decoder", presets=DECODER_PRESETS)

    from tavq.tokenizer.model import TAVQTokenizer
    from tavq.tokenizer.train_decoder import DecoderTask
    from tavq.training.dry_run import dry_run
    from tavq.training.loop import train

    resample = None
    if run.generator is not None:
        codebook_hash = TAVQTokenizer.from_pretrained(run.tokenizer).codebook_hash
        resample = mistakes_of(run.generator, codebook_hash)
    task = DecoderTask(run, resample)
    if run.dry_run:
        dry_run(task, run.training, run)
    else:
        train(task, run.training, run.out, run)


def mistakes_of(path: Path, codebook_hash: str) -> Resample:
    """Return what samples ids anew by the generator at `path`.

    Raises:
        ValueError: it was trained on ids of another codebook.
    """
    import torch

    from tavq.generator.config import SamplingConfig
    from tavq.generator.model import GeneratorModel
    from tavq.generator.sampling import resample

    generator = GeneratorModel.from_pretrained(path).eval()
    generator.check_codebook(codebook_hash)

    def sampled(ids: torch.Tensor) -> torch.Tensor:
        return resample(generator.to(ids.device), ids, SamplingConfig().top_k)

    return sampled
