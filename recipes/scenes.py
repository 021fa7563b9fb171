"""python recipes/scenes.py [--seeds 0 1 2 3 4] [--only none ot]

Which part of the alignment pays, on generated scenes whose truth is known: transport with all of it, without
one part at a time, and the other methods, with one budget. Each run trains tokenizer, probe, captioner and
generator, and measures them by `tavq eval scenes`.

A finished run is skipped and a stopped one is resumed. After each run the tables in docs/what-matters.md are
made again from the result files in recipes/results/scenes/.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ablation import VARIANTS as METHODS
from ablation import (
    Ablation,
    claimed,
    evaluation,
    folder_of,
    queue_of,
    tavq,
    train_captioner,
    train_probe,
    train_tokenizer,
)

from tavq.base.arguments import parse, run_main
from tavq.eval.results import BOOTSTRAP, Results, read_results
from tavq.eval.table import write_block
from tavq.metrics.bootstrap import difference_over_seeds

REFERENCE = "ot"
OT = METHODS[REFERENCE]
VARIANTS: dict[str, tuple[str, ...]] = METHODS | {
    "ot, words alone": (*OT, "--alignment.level-weights", "3", "0", "0"),
    "ot, short text": (*OT, "--alignment.no-long-text"),
    "ot, all codes and units": (*OT, "--alignment.samples", "4096", "--alignment.max-units", "64"),
    "ot, no bank": (*OT, "--alignment.bank-size", "0"),
    "ot, straight-through": (*OT, "--alignment.lookup", "straight-through"),
    "ot, balanced": (*OT, "--alignment.relaxation", "100"),
    "ot, no per-code embedding": (*OT, "--alignment.no-per-code-embedding"),
}
"""Name -> flags of `tavq train tokenizer`. A relaxation of 100 leaves the image marginal no freedom."""
MAPS = (
    "pointing, word: kind",
    "pointing, word: colour",
    "pointing, phrase: colour and shape",
    "pointing, sentence: caption",
    "binding by phrases, attributes",
    "binding by sentences, attributes",
    "binding by sentences, relation",
)
TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "Captions": (
        "own",
        (
            "binding by captioner, attributes",
            "binding by captioner, relation",
            "captions, colour and shape: right",
            "captions, colour and shape: left out",
            "captions, all attributes: right",
            "CIDEr",
        ),
    ),
    "Images": (
        "own",
        (
            "reconstructions: colour and shape",
            "reconstructions: relation",
            "drawing, short: colour and shape",
            "drawing, short, shuffled: colour and shape",
            "drawing, long: colour and shape",
            "drawing, long, shuffled: colour and shape",
            "drawing, long: relation",
        ),
    ),
    "Maps and binding, by the projections of the training": (
        "own",
        MAPS,
    ),
    "Maps and binding, by one probe for all": (
        "probed",
        MAPS,
    ),
}
"""Title -> which result file, and its metrics."""
RESULTS = ("own", "probed")


@dataclasses.dataclass(frozen=True)
class Scenes(Ablation):
    """Train and measure every variant on scenes with the same budget.

    Example: python recipes/scenes.py --seeds 0 1 2 3 4
    """

    data: str = "scenes:5000"
    """Dataset, with the number of training images."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of training."""
    images: int = 9_600
    """Images that each tokenizer sees in training."""
    channels: tuple[int, int] = (48, 96)
    """Channels of the tokenizer."""
    captioner_steps: int = 800
    """Training steps of the captioner."""
    probe_steps: int = 300
    """Training steps of the probe."""
    generator_steps: int = 800
    """Training steps of the generator."""
    evaluated: int = 300
    """Images of the test split that are measured."""
    runs: Path = Path("runs/scenes")
    """Directory for the runs."""
    results: Path = Path("recipes/results/scenes")
    """Directory for the result files."""
    out: Path = Path("docs/what-matters.md")
    """File for the tables."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(VARIANTS)


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(Scenes, argv, prog="python recipes/scenes.py")
    for name, flags, seed in claimed(run, queue_of(VARIANTS, run.seeds)):
        if all(result_of(run, name, seed, part).exists() for part in RESULTS):
            print(f"== {name}, seed {seed}: done before", flush=True)
            continue
        train_and_measure(run, name, flags, seed)
        write_tables(run)
    write_tables(run)
    print(run.out)


def write_tables(run: Scenes) -> None:
    """Write docs/what-matters.md, or the tables in it where it exists."""
    if not run.out.exists():
        run.out.parent.mkdir(parents=True, exist_ok=True)
        run.out.write_text(EMPTY)
    write_block(run.out, "scenes", document(run))


def result_of(run: Scenes, name: str, seed: int, part: str) -> Path:
    """Return the path of a result file: of the run's own checkpoint, or of its tokenizer with the probe."""
    return run.results / f"{folder_of(run, name, seed).name}-{part}.json"


def train_and_measure(run: Scenes, name: str, flags: Sequence[str], seed: int) -> None:
    """Train all parts of one variant, measure them, and leave out what only a stopped training needs."""
    paths = {part: result_of(run, name, seed, part) for part in RESULTS}
    print(f"== {name}, seed {seed}", flush=True)
    folder = folder_of(run, name, seed)
    tiny = run.preset == "tiny"
    train_tokenizer(run, folder, (*flags, *(() if tiny else TOKENIZER)), seed)
    train_probe(run, folder, seed)
    train_captioner(run, folder, seed, *CAPTIONER, *(() if tiny else CAPTIONER_SIZE))
    train_generator(run, folder, seed, *(() if tiny else GENERATOR_SIZE))
    common: list[object] = ["--data", run.data, "--limit", run.evaluated, "--label", name]
    common += ["--reader", run.runs / "reader.safetensors", "--micro-batch", 16, "--draft-tokens", 1]
    evaluation("run_scenes", "--checkpoint", folder, *common, "--out", paths["own"])
    evaluation("run_scenes", "--checkpoint", folder / "probed", *common, "--out", paths["probed"])
    for leftover in (folder / "tokens", *folder.glob("*/training"), *folder.glob("probed/*/training")):
        shutil.rmtree(leftover, ignore_errors=True)


def train_generator(run: Scenes, folder: Path, seed: int, *flags: object) -> None:
    arguments: list[object] = ["--preset", run.preset, "--tokens", folder / "tokens", "--long-text"]
    arguments += ["--tokenizer", folder / "tokenizer", "--out", folder / "generator", "--training.seed", seed]
    arguments += ["--training.steps", run.generator_steps, "--training.evaluate-every", run.generator_steps]
    tavq("train", "generator", *arguments, *flags)


def document(run: Scenes) -> str:
    """Return the block of docs/what-matters.md, from the result files that exist."""
    parts = [SETTINGS.format(**dataclasses.asdict(run))]
    for title, (part, metrics) in TABLES.items():
        found = {name: results_of(run, name, part) for name in VARIANTS}
        lines = [table_row(name, found, metrics) for name, results in found.items() if results]
        header = [row("variant, seeds", metrics), row("---", ["---:"] * len(metrics))]
        parts.append("\n".join([f"**{title}**", "", *header, *floor_rows(found, metrics), *lines]))
    return "\n\n".join(parts)


def results_of(run: Scenes, name: str, part: str) -> dict[int, Results]:
    """Return seed -> the result file of a variant, of those that exist."""
    paths = {seed: result_of(run, name, seed, part) for seed in run.seeds}
    return {seed: read_results(path) for seed, path in paths.items() if path.exists()}


def floor_rows(found: dict[str, dict[int, Results]], metrics: Sequence[str]) -> list[str]:
    """Return one row for each kind of reference point, by the first result of the reference variant."""
    floors = next((result.protocol["floors"] for result in found[REFERENCE].values()), {})
    kinds = dict.fromkeys(name.rsplit(", ", 1)[1] for name in floors if name.rsplit(", ", 1)[0] in metrics)
    cells = {kind: [floors.get(f"{metric}, {kind}") for metric in metrics] for kind in kinds}
    return [
        row(kind, ["" if v is None else f"{100 * v:.1f}" for v in values]) for kind, values in cells.items()
    ]


def table_row(name: str, found: dict[str, dict[int, Results]], metrics: Sequence[str]) -> str:
    """Return the means of a variant, with the difference from the reference where both have the seeds."""
    results = found[name]
    cells = [cell(results, {} if name == REFERENCE else found[REFERENCE], metric) for metric in metrics]
    return row(f"{name}, {len(results)}", cells)


def cell(results: dict[int, Results], reference: dict[int, Results], metric: str) -> str:
    """Return the mean over seeds in per cent and, in bold where its interval excludes 0, the difference."""
    scores = {
        seed: result.per_image()[metric] for seed, result in results.items() if metric in result.metrics
    }
    if not scores:
        return "-"
    mean = f"{100 * np.mean(list(scores.values())):.1f}"
    pairs = [
        (reference[seed].per_image()[metric], own)
        for seed, own in scores.items()
        if seed in reference and metric in reference[seed].metrics
    ]
    if not pairs:
        return mean
    theirs, own = (np.stack(side) for side in zip(*pairs, strict=True))
    interval = difference_over_seeds(theirs, own, **BOOTSTRAP)
    text = f"{100 * interval.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    return f"{mean} (**{text}**)" if interval.excludes_zero else f"{mean} ({text})"


def row(title: str, cells: Sequence[str]) -> str:
    return f"| {title} | " + " | ".join(cells) + " |"


TOKENIZER = ("--model.upsample-channels", "--model.decoder-blocks", "1", "--model.quantizer.num-codes", "512")
TOKENIZER += ("--losses.l1-size-px", "0")  # a scene has no detail that must be invented
CAPTIONER = ("--model.long-words", "80", "--min-word-count", "1", "--captions-per-image", "1")
CAPTIONER_SIZE = ("--model.width", "128", "--model.num-heads", "4")
GENERATOR_SIZE = ("--model.width", "128", "--model.num-layers", "4", "--model.hidden-width", "352")
GENERATOR_SIZE += ("--model.max-text-tokens", "88")
EMPTY = """# What matters

Which part of the alignment pays, and by how much? Small chains are trained on generated scenes, whose truth
is known. They differ in one thing. [Evaluate and compare](evaluation.md#measure-where-the-truth-is-known)
explains the metrics.

<!-- scenes: begin -->
<!-- scenes: end -->
"""
SETTINGS = """Made by `python recipes/scenes.py`: `--data {data}`, {image_size_px} px, {channels[0]} and
{channels[1]} channels, 512 codes, {images} images per tokenizer in batches of {batch_size}, L1 alone.
Captioner of {captioner_steps} steps, generator of {generator_steps}, both also on the long texts; probe of
{probe_steps} steps on frozen codes, alike for all. {evaluated} images of the test split. All in per cent,
CIDEr times 100; a binding of 50 is chance. Mean over seeds; in brackets the difference from `ot` with its
95 % interval, seeds and images resampled, in bold where it excludes 0."""


if __name__ == "__main__":
    main()
