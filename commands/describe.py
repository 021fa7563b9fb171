"""tavq describe --data DIR --model NAME: write long descriptions of a dataset's images."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tavq.base.arguments import parse, run_main
from tavq.base.files import file_hash
from tavq.base.locks import only_writer
from tavq.base.weights import WEIGHTS_FILE, local_directory
from tavq.serve.config import check_ray
from tavq.tokenizer.run_config import DescribeRun

if TYPE_CHECKING:
    from tavq.tokenizer.describe_dataset import Question

IMAGES_PER_PART = 8
"""Images that a task of --engine ray describes."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(DescribeRun, argv, prog="tavq describe")
    if run.engine.engine == "ray":
        check_ray()

    from tavq.tokenizer.describe_dataset import describe_dataset

    with only_writer(run.output):
        if run.engine.engine == "ray":
            describe_on_ray(run)
        else:
            describe_dataset(run)


def describe_on_ray(run: DescribeRun) -> None:
    """Describe the images with the work spread over a Ray cluster; this process writes the descriptions."""
    from tavq.data.vision_language import model_directory
    from tavq.serve.ray_jobs import PartJob, clear_parts
    from tavq.serve.work import open_describer
    from tavq.tokenizer.describe_dataset import describe_dataset

    model = model_directory(run.vlm).resolve()
    tokenizer = local_directory(run.tokenizer).resolve()
    data = str(Path(run.data).resolve()) if Path(run.data).exists() else run.data
    there = dataclasses.replace(run, data=data, tokenizer=str(tokenizer))
    parts = run.output.with_name(f"{run.output.name}.parts")
    files = [(file.name, file.stat().st_size) for file in sorted(model.iterdir())]
    judged_by = file_hash(tokenizer / WEIGHTS_FILE) if run.min_grounding else None

    def describe(questions: Sequence[Question]) -> Iterable[dict[str, Any]]:
        if not questions:
            return ()
        job = PartJob(
            parts,
            questions,
            IMAGES_PER_PART,
            open_describer,
            (there, model),
            fingerprint=f"describe {data} {run.vlm} {files} {run.min_grounding} {judged_by}",
        )
        return itertools.chain.from_iterable(job.rows(run.engine))

    describe_dataset(run, describe)
    clear_parts(parts)
