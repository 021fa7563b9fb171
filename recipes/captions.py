"""python recipes/captions.py --data DIR [--runs runs/ablation] [--seeds 0 1 2]

Compare captions from the aligned codebook with those from a plain one of the same size and budget.

Run it after `python recipes/ablation.py --only none ot --seeds 0 1 2`. The captioners of that ablation are
trained further self-critically, and all of them are measured on the test split, greedy and with beam 5.
What is done is skipped. docs/captions.md is written from the result files.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tavq.base.arguments import parse, run_main
from tavq.data.config import default_data
from tavq.data.layouts import check_data_is_named
from tavq.eval.cells import format_difference
from tavq.eval.results import Results, compare, read_results
from tavq.eval.table import make_tables

ROOT = Path(__file__).resolve().parent.parent
CODEBOOKS = {"none": "plain", "ot": "aligned"}
STAGES = {"cross-entropy": "captioner", "self-critical": "self-critical/captioner"}
BEAMS = {1: "greedy", 5: "beam 5"}
SHOWN = ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L")


@dataclasses.dataclass(frozen=True)
class CaptionComparison:
    """Train the captioners of the ablation self-critically, measure them, and write the tables.

    Example: python recipes/captions.py --data flickr8k/ --seeds 0 1 2
    """

    data: str = dataclasses.field(default_factory=default_data)
    """Dataset: a directory in any known layout, hf:OWNER/NAME, `shapes` or `scenes`. By default that of
    TAVQ_DATA."""
    runs: Path = Path("runs/ablation")
    """Directory with the runs of the ablation."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the ablation."""
    preset: str = "flickr8k"
    """Preset of the ablation's captioners."""
    split: str = "test"
    """Split to measure on."""
    out: Path = Path("docs/captions.md")
    """File for the tables."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CaptionComparison, argv, prog="python recipes/captions.py")
    check_data_is_named(run.data)
    for seed in run.seeds:
        for codebook in CODEBOOKS:
            train_self_critically(run, run.runs / f"{codebook}-seed{seed}", seed)
            for stage in STAGES:
                for beam in BEAMS:
                    measure(run, codebook, seed, stage, beam)
    run.out.parent.mkdir(parents=True, exist_ok=True)
    run.out.write_text(document(run))
    print(run.out)


def train_self_critically(run: CaptionComparison, folder: Path, seed: int) -> None:
    """Train the captioner in `folder` further, into a folder that has the same tokenizer beside it."""
    out = folder / "self-critical"
    out.mkdir(exist_ok=True)
    if not (out / "tokenizer").is_symlink():
        os.symlink("../tokenizer", out / "tokenizer")
    arguments: list[object] = ["--preset", f"{run.preset}-self-critical", "--training.seed", seed]
    arguments += ["--tokens", folder / "tokens", "--start", folder / "captioner"]
    execute("-m", "tavq", "train", "captioner", *arguments, "--out", out / "captioner")


def result_of(run: CaptionComparison, codebook: str, seed: int, stage: str, beam: int) -> Path:
    """Return the path of a result file."""
    return run.runs / f"{codebook}-seed{seed}" / "results" / f"{run.split}-{stage}-beam{beam}.json"


def measure(run: CaptionComparison, codebook: str, seed: int, stage: str, beam: int) -> None:
    out = result_of(run, codebook, seed, stage, beam)
    if out.exists():
        return
    checkpoint = (run.runs / f"{codebook}-seed{seed}" / STAGES[stage]).parent
    label = f"{CODEBOOKS[codebook]}, seed {seed}, {stage}"
    arguments: list[object] = ["--checkpoint", checkpoint, "--data", run.data, "--split", run.split]
    arguments += ["--beam", beam, "--label", label, "--out", out]
    execute(ROOT / "eval" / "run_caption.py", *arguments)


def execute(*arguments: object) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], check=True)


def document(run: CaptionComparison) -> str:
    """Return docs/captions.md: what alignment changes, seed by seed, and the tables of all results."""
    lines = ["| aligned - plain | " + " | ".join(SHOWN) + " |", "| --- |" + " ---: |" * len(SHOWN)]
    results: list[Results] = []
    for beam, search in BEAMS.items():
        for stage in STAGES:
            for seed in run.seeds:
                pair = [result_of(run, codebook, seed, stage, beam) for codebook in CODEBOOKS]
                results += [read_results(path) for path in pair]
                rows = {row.metric: row for row in compare(*pair)}
                cells = [format_difference(rows[name]) if name in rows else "-" for name in SHOWN]
                lines.append(f"| {search}, {stage}, seed {seed} | " + " | ".join(cells) + " |")
    lines += ["", make_tables(results, differences=False)]
    return TEXT.format(tables="\n".join(lines), **dataclasses.asdict(run))


TEXT = """# Captions from aligned and from plain codes

Written by `python recipes/captions.py` from result files; do not edit. Tokenizers and captioners are those of
the [ablation](ablation.md), seeds {seeds}. Both sides of a pair saw the same images in the same order.
"Self-critical" goes on from "cross-entropy" with the preset `{preset}-self-critical`. The first table shows
differences with their 95 % paired-bootstrap intervals, in bold where the interval excludes 0. CIDEr, BLEU,
METEOR and ROUGE-L are multiplied by 100.

{tables}
"""


if __name__ == "__main__":
    main()
