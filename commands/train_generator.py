"""tavq train generator --tokens DIR --out DIR: train the generator."""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.generator.config import RUN_PRESETS, GeneratorRun


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(GeneratorRun, argv, prog="tavq train generator", presets=RUN_PRESETS)

    from tavq.generator.preference import PreferenceTask
    from tavq.generator.train import GeneratorTask, train_generator
    from tavq.tokenizer.foreign import open_tokenizer

    task_class = PreferenceTask if run.stage == "preference" else GeneratorTask
    if run.tokenizer is None:
        train_generator(run, task_class=task_class)
        return
    tokenizer = open_tokenizer(run.tokenizer)
    train_generator(run, lambda ids: tokenizer.decode(ids.cpu()), tokenizer.codebook, task_class=task_class)
