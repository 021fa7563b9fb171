"""python recipes/ablation.py --data DIR --teacher NETWORK.pt --features NETWORK.pt [--seeds 0 1]

Which part of the alignment does what: the same small tokenizer with each `--align`, with and without levels,
each read by the same probe and by a small captioner, measured on val. A run that is done is skipped, a
stopped one goes on; the table in docs/ablation.md is made again after each from the result files, and rows
that were made elsewhere, with the same settings and more seeds than are here, stay as they are.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tavq.base.arguments import parse, run_main
from tavq.data.layouts import check_data_is_named, default_data
from tavq.eval.results import Results, read_results
from tavq.eval.table import write_block
from tavq.tokenizer.train import LossConfig
from tavq.training.run_folder import claim_folder

ROOT = Path(__file__).resolve().parent.parent
VARIANTS: dict[str, tuple[str, ...]] = {
    "none": ("--align", "none"),
    "lgvq": ("--align", "lgvq"),
    "gaussian": ("--align", "gaussian"),
    "ot": ("--align", "ot"),
    "ot, sentences alone": ("--align", "ot", "--alignment.level-weights", "0", "0", "3"),
    "ot, levels reversed": ("--align", "ot", "--alignment.pairing", "3", "2", "1"),
}
TUNING: dict[str, tuple[str, ...]] = {
    "none, five times the commitment": (*VARIANTS["none"], "--model.quantizer.commitment", "0.25"),
    "lgvq, ten times its weights": (
        *VARIANTS["lgvq"],
        *("--lgvq.global-weight", "1e-2", "--lgvq.word-weight", "1e-1", "--lgvq.relation-weight", "1e-3"),
    ),
    "gaussian, twice the share": (*VARIANTS["gaussian"], "--losses.align", f"{2 * LossConfig.align}"),
    "ot, twice the share": (*VARIANTS["ot"], "--losses.align", f"{2 * LossConfig.align}"),
}
"""One for each method beside its default; of the first seed alone."""
METHODS = ("none", "lgvq", "gaussian", "ot")
COLUMNS: dict[str, tuple[str, str, float, int]] = {
    "R@10, own projections": ("tokenizer", "t2i_R@10", 100, 1),
    "R@10, probe": ("probed", "t2i_R@10", 100, 1),
    "image to text": ("probed", "i2t_R@10", 100, 1),
    "rFD": ("tokenizer", "rFD", 1, 1),
    "PSNR": ("tokenizer", "PSNR", 1, 2),
    "usage": ("tokenizer", "usage", 1, 3),
    "CIDEr": ("caption", "CIDEr", 100, 1),
}
"""Title -> result file, metric, factor, digits."""


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Train and measure every variant with the same budget."""

    data: str = dataclasses.field(default_factory=default_data)
    """Dataset: a directory in any known layout, or `shapes`. By default the one that TAVQ_DATA names."""
    teacher: Path | None = None
    """TorchScript network of the perceptual loss; nothing is distilled here."""
    features: Path | None = None
    """TorchScript network that measures rFD; without it rFD is left out."""
    seeds: tuple[int, ...] = (0, 1)
    only: tuple[str, ...] = ()
    """Variants to run; all if none is named."""
    images: int = 30_000
    """Seen by each tokenizer in training."""
    batch_size: int = 16
    image_size_px: int = 64
    channels: tuple[int, int] = (64, 128)
    """Side of the tokenizer's images: two thirds of the preset's, which halves the time."""
    captioner_steps: int = 600
    probe_steps: int = 500
    preset: str = "flickr8k"
    runs: Path = Path("runs/ablation")
    out: Path = Path("docs/ablation.md")

    def __post_init__(self) -> None:
        check_data_is_named(self.data)
        unknown = set(self.only) - set(VARIANTS) - set(TUNING)
        if unknown:
            names = ", ".join([*VARIANTS, *TUNING])
            raise ValueError(f"no variant {sorted(unknown)[0]!r}; choose among: {names}")


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(Ablation, argv, prog="python recipes/ablation.py")
    (run.runs / "settings").mkdir(parents=True, exist_ok=True)
    claim_folder(run.runs / "settings", dataclasses.replace(run, seeds=(), only=(), out=Path()), is_main=True)
    queue = [(name, flags, seed) for seed in run.seeds for name, flags in VARIANTS.items()]
    queue += [(name, flags, run.seeds[0]) for name, flags in TUNING.items()]
    for name, flags, seed in queue:
        if not run.only or name in run.only:
            carry_out(run, name, flags, seed)
            if not run.out.exists():
                run.out.parent.mkdir(parents=True, exist_ok=True)
                run.out.write_text(EMPTY)
            write_block(run.out, "ablation", document(run))
    print(run.out)


def carry_out(run: Ablation, name: str, flags: Sequence[str], seed: int) -> None:
    """Train tokenizer, probe and captioner of one variant, and measure them."""
    folder = folder_of(run, name, seed)
    if all((folder / "results" / f"{part}.json").exists() for part in ("tokenizer", "probed", "caption")):
        print(f"== {name}, seed {seed}: done before", flush=True)
        return
    print(f"== {name}, seed {seed}", flush=True)
    data, common = ["--data", run.data], ["--training.seed", seed, "--training.batch-size", run.batch_size]
    size, steps = ["image-size-px", run.image_size_px], run.images // run.batch_size
    perceptual = ["--perceptual", run.teacher] if run.teacher else []
    tokenizer, probed = folder / "tokenizer", folder / "probed" / "tokenizer"
    shape = ["--model.num-heads", 4, "--model.channels", *run.channels, f"--model.{size[0]}", size[1]]
    tavq(
        *("train", "tokenizer", "--preset", run.preset, *data, "--out", tokenizer, *flags, *common),
        *(() if run.preset == "tiny" else shape),
        *(*perceptual, "--losses.adversarial", 0, "--training.steps", steps),
        *("--training.evaluate-every", max(1, steps // 2)),
    )
    edge = 32 if run.preset == "tiny" else size[1]
    tavq(
        *("align", "--base", f"tavq:{tokenizer}", "--probe-only", *data, "--out", probed, *common),
        *(f"--{size[0]}", edge, "--probe-steps", run.probe_steps),
    )
    tavq("tokenize", *data, "--checkpoint", tokenizer, "--out", folder / "tokens", "--crops", 0)
    tavq(
        *("train", "captioner", "--preset", run.preset, "--tokens", folder / "tokens", "--out"),
        *(folder / "captioner", "--tokenizer", tokenizer, "--training.seed", seed),
        *("--training.steps", run.captioner_steps, "--training.evaluate-every", run.captioner_steps),
    )
    measured = ["--data", run.data, "--split", "val", "--label", name]
    results = folder / "results"
    network = ["--features", run.features] if run.features else ["--no-frechet"]
    script("run_caption", "--checkpoint", folder, *measured, "--beam", 1, "--out", results / "caption.json")
    script("run_tokenizer", "--checkpoint", folder, *measured, *network, "--out", results / "tokenizer.json")
    probe = ["--checkpoint", folder / "probed", *measured, "--no-frechet"]
    script("run_tokenizer", *probe, "--out", results / "probed.json")


def folder_of(run: Ablation, name: str, seed: int) -> Path:
    return run.runs / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def tavq(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "tavq", *map(str, arguments)], check=True)


def script(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, ROOT / "eval" / f"{name}.py", *map(str, arguments)], check=True)


def document(run: Ablation) -> str:
    """The block of docs/ablation.md, from the result files that are there."""
    fields = dataclasses.asdict(run) | {"dataset": Path(run.data).name}
    fields["perceptual"] = "perceptual loss" if run.teacher else "no perceptual loss"
    settings = SETTINGS.format(**fields)
    written = run.out.read_text(encoding="utf-8") if run.out.is_file() else ""
    rows = {}
    for name in [*VARIANTS, *TUNING]:
        found = [results_of(run, name, seed) for seed in run.seeds]
        found = [results for results in found if results]
        cells = [cell(found, *column) for column in COLUMNS.values()]
        there = next((line for line in written.splitlines() if line.startswith(f"| {name} |")), "")
        if there and settings in written and int(there.split("|")[2]) > len(found):
            rows[name] = there  # made on another machine, perhaps
        elif found:
            rows[name] = f"| {name} | {len(found)} | " + " | ".join(cells) + " |"
    header = "| variant | seeds | " + " | ".join(COLUMNS) + " |"
    table = "\n".join([header, "| --- | ---: |" + " ---: |" * len(COLUMNS), *rows.values()])
    tuned = f"tuning run with the first seed ({len(rows.keys() & TUNING.keys())} of {len(TUNING)} done)."
    return f"{settings}\nBeside its default setting, each method gets {tuning_runs()} {tuned}\n\n{table}"


def tuning_runs() -> int:
    """Tuning runs of each method; the same for all, or the comparison is not fair."""
    counts = {sum(name.startswith(f"{method},") for name in TUNING) for method in METHODS}
    if len(counts) != 1:
        raise ValueError(f"methods have {sorted(counts)} tuning runs, expected equally many")
    return counts.pop()


def results_of(run: Ablation, name: str, seed: int) -> dict[str, Results]:
    """The three result files of a run; empty where one is missing."""
    paths = {
        part: folder_of(run, name, seed) / "results" / f"{part}.json"
        for part in ("tokenizer", "probed", "caption")
    }
    return (
        {part: read_results(p) for part, p in paths.items()}
        if all(p.exists() for p in paths.values())
        else {}
    )


def cell(found: list[dict[str, Results]], part: str, metric: str, factor: float, digits: int) -> str:
    """Mean over seeds, with the range where there are several."""
    values = []
    for results in found:
        named = [n for n in results[part].metrics if n == metric or n.startswith(f"{metric}-")]
        values += [factor * results[part].metrics[n]["value"] for n in named]
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


EMPTY = """# Ablation of the alignment

<!-- ablation: begin -->
<!-- ablation: end -->
"""
SETTINGS = """Made by `python recipes/ablation.py`: validation split of {dataset}, {image_size_px} px,
{channels[0]} and {channels[1]} channels, {images} images per tokenizer in batches of {batch_size},
{perceptual}, no discriminator, no distillation. A captioner of {captioner_steps} steps is trained on
the tokens of each. "Own projections" were trained with the codes. The probe is trained for
{probe_steps} steps on frozen codes, alike for all. Recall in per cent (chance 1 %), CIDEr times 100
(greedy). Mean over seeds, and the range."""


if __name__ == "__main__":
    main()
