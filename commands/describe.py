"""tavq describe --data DIR --model NAME: write long descriptions of a dataset's images."""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.base.locks import only_writer
from tavq.tokenizer.run_config import DescribeRun


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(DescribeRun, argv, prog="tavq describe")

    from tavq.tokenizer.describe_dataset import describe_dataset

    with only_writer(run.output):
        describe_dataset(run)
