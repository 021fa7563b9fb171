"""python recipes/ablation.py --data DIR --teacher NETWORK.pt --features NETWORK.pt [--seeds 0 1]

Which part of the alignment does what: the same small tokenizer is trained with each `--align`, with and
without levels, and measured on val by the same probe and by a small captioner.

A finished run is skipped and a stopped one is resumed. After each run the table in docs/ablation.md is made
again from the result files. Rows made elsewhere with the same settings and more seeds stay as they are.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from tavq.alignment.units import units_of
from tavq.base.arguments import parse, run_main
from tavq.data.config import default_data
from tavq.data.keep import write_keep
from tavq.data.layouts import check_data_is_named, open_dataset
from tavq.eval.results import Results, read_results
from tavq.eval.table import write_block
from tavq.tokenizer.config import LossConfig
from tavq.training.run_folder import claim_folder

Job = tuple[str, Sequence[str], int]
"""Name of a variant, its flags, a seed."""
Columns = dict[str, tuple[str, str, float, int]]
"""Title -> result file, metric, factor, digits."""
ROOT = Path(__file__).resolve().parent.parent
SGC = ("--model.quantizer.name", "sgc", "--model.fuse-levels")
VARIANTS: dict[str, tuple[str, ...]] = {
    "none": ("--align", "none"),
    "lgvq": ("--align", "lgvq"),
    "gaussian": ("--align", "gaussian"),
    "filip": ("--align", "filip"),
    "ot": ("--align", "ot"),
    "ot, sentences alone": ("--align", "ot", "--alignment.level-weights", "0", "0", "3"),
    "ot, levels reversed": ("--align", "ot", "--alignment.pairing", "3", "2", "1"),
}
FIRST_CAPTION = "ot, first caption alone"
CLUSTERED: dict[str, tuple[str, ...]] = {f"{name}, sgc": (*VARIANTS[name], *SGC) for name in ("none", "ot")}
"""Codes of SGC-VQGAN; the classes come from --teacher."""
ON_PHOTOS = {FIRST_CAPTION: VARIANTS["ot"], **CLUSTERED}
"""Variants that scenes do not have: there is one caption, and no network."""
TUNING: dict[str, tuple[str, ...]] = {
    "none, five times the commitment": (*VARIANTS["none"], "--model.quantizer.commitment", "0.25"),
    "lgvq, ten times its weights": (
        *VARIANTS["lgvq"],
        *("--lgvq.global-weight", "1e-2", "--lgvq.word-weight", "1e-1", "--lgvq.relation-weight", "1e-3"),
    ),
    "gaussian, twice the share": (*VARIANTS["gaussian"], "--losses.align", f"{2 * LossConfig.align}"),
    "ot, twice the share": (*VARIANTS["ot"], "--losses.align", f"{2 * LossConfig.align}"),
}
"""One further setting for each method, of the first seed alone."""
METHODS = ("none", "lgvq", "gaussian", "ot")
COLUMNS: Columns = {
    "R@10, own projections": ("tokenizer", "t2i_R@10", 100, 1),
    "R@10, probe": ("probed", "t2i_R@10", 100, 1),
    "image to text": ("probed", "i2t_R@10", 100, 1),
    "rFD": ("tokenizer", "rFD", 1, 1),
    "PSNR": ("tokenizer", "PSNR", 1, 2),
    "usage": ("tokenizer", "usage", 1, 3),
    "CIDEr": ("caption", "CIDEr", 100, 1),
}
MEANING_COLUMNS: Columns = {
    "purity of codes": ("tokenizer", "code_purity", 100, 1),
    "evenness of classes": ("tokenizer", "class_evenness", 100, 1),
    "usage": ("tokenizer", "usage", 1, 3),
    "PSNR": ("tokenizer", "PSNR", 1, 2),
}


RESULTS = ("tokenizer", "probed", "caption")
"""Names of the result files of a run."""
TINY_IMAGE_SIZE_PX = 32


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Train and measure every variant with the same budget.

    Example: python recipes/ablation.py --data flickr8k/ --teacher squeezenet_layers.pt --seeds 0 1 2
    """

    data: str = dataclasses.field(default_factory=default_data)
    """Dataset: a directory in any known layout, hf:OWNER/NAME, `shapes` or `scenes`. By default that of
    TAVQ_DATA."""
    teacher: Path | None = None
    """TorchScript network of the perceptual loss, and of the classes of SGC-VQGAN and of purity. Nothing is
    distilled here."""
    features: Path | None = None
    """TorchScript network that measures rFD. Without it rFD is left out."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of training."""
    only: tuple[str, ...] = ()
    """Variants to train; all of them by default."""
    images: int = 30_000
    """Images that each tokenizer sees in training."""
    batch_size: int = 16
    """Batch size of tokenizers and probes."""
    image_size_px: int = 64
    """Side that images are squashed to."""
    channels: tuple[int, int] = (64, 128)
    """Channels of the tokenizer: two thirds of the preset's, which halves the time."""
    captioner_steps: int = 600
    """Training steps of the captioner."""
    probe_steps: int = 500
    """Training steps of the probe."""
    preset: str = "flickr8k"
    """Preset of tokenizer and captioner: flickr8k or tiny."""
    runs: Path = Path("runs/ablation")
    """Directory for the runs."""
    out: Path = Path("docs/ablation.md")
    """File for the table."""

    @property
    def names(self) -> tuple[str, ...]:
        """Variants that `only` may name."""
        return (*VARIANTS, *ON_PHOTOS, *TUNING)

    def __post_init__(self) -> None:
        check_data_is_named(self.data)
        unknown = set(self.only) - set(self.names)
        if unknown:
            raise ValueError(f"no variant {sorted(unknown)[0]!r}; choose among: {'; '.join(self.names)}")


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(Ablation, argv, prog="python recipes/ablation.py")
    variants = VARIANTS | ON_PHOTOS
    if run.teacher is None:
        print("without --teacher no network gives classes: the rows of sgc are left out")
        variants = {name: flags for name, flags in variants.items() if name not in CLUSTERED}
    queue = queue_of(variants, run.seeds)
    queue += [(name, flags, run.seeds[0]) for name, flags in TUNING.items()]
    for name, flags, seed in claimed(run, queue):
        train_and_measure(run, name, flags, seed)
        if not run.out.exists():
            run.out.parent.mkdir(parents=True, exist_ok=True)
            run.out.write_text(EMPTY)
        write_block(run.out, "ablation", document(run))
    print(run.out)


def queue_of(variants: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> list[Job]:
    """Return all variants with the first seed before any with the second: an early table has every row."""
    return [(name, flags, seed) for seed in seeds for name, flags in variants.items()]


def claimed(run: Ablation, queue: Sequence[Job]) -> Iterator[Job]:
    """Yield the jobs that `run.only` names, in a folder that holds runs of these settings alone."""
    (run.runs / "settings").mkdir(parents=True, exist_ok=True)
    claim_folder(run.runs / "settings", dataclasses.replace(run, seeds=(), only=(), out=Path()), is_main=True)
    yield from (job for job in queue if not run.only or job[0] in run.only)


def train_and_measure(run: Ablation, name: str, flags: Sequence[str], seed: int) -> None:
    """Train tokenizer, probe and captioner of one variant, and measure them."""
    folder = folder_of(run, name, seed)
    if all((folder / "results" / f"{part}.json").exists() for part in RESULTS):
        print(f"== {name}, seed {seed}: done before", flush=True)
        return
    print(f"== {name}, seed {seed}", flush=True)
    if name == FIRST_CAPTION:
        flags = [*flags, "--keep", str(first_captions(run))]
    train_tokenizer(run, folder, flags, seed)
    train_probe(run, folder, seed)
    train_captioner(run, folder, seed)
    measure(run, folder, name)


def first_captions(run: Ablation) -> Path:
    """Write the file that keeps the first caption of each training image alone."""
    dataset = open_dataset(run.data, "train")
    others = {example.id: range(1, len(example.captions)) for example in dataset.examples}
    file = run.runs / "first-captions.txt"
    write_keep(file, dataset, (), others)
    return file


def units_per_text(run: Ablation) -> str:
    """Return a sentence on how many units the texts of the training images hold."""
    counts = []
    examples = open_dataset(run.data, "train").examples
    for captions in ([example.captions[:1] for example in examples], [e.captions for e in examples]):
        units = [units_of(texts)[1:] for texts in captions]
        words, phrases, sentences = (mean(len(kinds[level]) for kinds in units) for level in range(3))
        counts.append(f"{words:.1f} words, {phrases:.1f} phrases and {sentences:.1f} sentences")
    return f"The first caption of an image has {counts[0]}; all its captions together have {counts[1]}."


def train_tokenizer(run: Ablation, folder: Path, flags: Sequence[str], seed: int) -> None:
    steps = run.images // run.batch_size
    arguments: list[object] = ["--preset", run.preset, "--data", run.data, "--out", folder / "tokenizer"]
    arguments += [*flags, "--training.seed", seed, "--training.batch-size", run.batch_size]
    if run.preset != "tiny":
        arguments += ["--model.num-heads", 4, "--model.channels", *run.channels]
        arguments += ["--model.image-size-px", run.image_size_px]
    if run.teacher:
        arguments += ["--perceptual", run.teacher]
    if "sgc" in flags:
        arguments += ["--classes", run.teacher]
    arguments += ["--losses.adversarial", 0, "--training.steps", steps]
    arguments += ["--training.evaluate-every", max(1, steps // 2)]
    tavq("train", "tokenizer", *arguments)


def train_probe(run: Ablation, folder: Path, seed: int) -> None:
    """Fit projections to the codes as they are, with the same method and steps for every variant."""
    image_size = TINY_IMAGE_SIZE_PX if run.preset == "tiny" else run.image_size_px
    arguments: list[object] = ["--base", f"tavq:{folder / 'tokenizer'}", "--probe-only"]
    arguments += ["--data", run.data, "--out", folder / "probed" / "tokenizer"]
    arguments += ["--training.seed", seed, "--training.batch-size", run.batch_size]
    arguments += ["--image-size-px", image_size, "--probe-steps", run.probe_steps]
    tavq("align", *arguments)


def train_captioner(run: Ablation, folder: Path, seed: int, *flags: object) -> None:
    tokens = folder / "tokens"
    tavq("tokenize", "--data", run.data, "--checkpoint", folder / "tokenizer", "--out", tokens, "--crops", 0)
    arguments: list[object] = ["--preset", run.preset, "--tokens", tokens, "--out", folder / "captioner"]
    arguments += ["--tokenizer", folder / "tokenizer", "--training.seed", seed]
    arguments += ["--training.steps", run.captioner_steps]
    arguments += ["--training.evaluate-every", run.captioner_steps]
    tavq("train", "captioner", *arguments, *flags)


def measure(run: Ablation, folder: Path, name: str) -> None:
    results = folder / "results"
    common: list[object] = ["--data", run.data, "--split", "val", "--label", name]
    network: list[object] = ["--features", run.features] if run.features else ["--no-frechet"]
    own = ["--checkpoint", folder, *common]
    classes: list[object] = ["--classes", run.teacher] if run.teacher else []
    probed = ["--checkpoint", folder / "probed", *common]
    evaluation("run_caption", *own, "--beam", 1, "--out", results / "caption.json")
    evaluation("run_tokenizer", *own, *network, *classes, "--out", results / "tokenizer.json")
    evaluation("run_tokenizer", *probed, "--no-frechet", "--out", results / "probed.json")


def folder_of(run: Ablation, name: str, seed: int) -> Path:
    """Return the directory of one variant and seed."""
    return run.runs / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def tavq(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "tavq", *map(str, arguments)], check=True)


def evaluation(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, ROOT / "eval" / f"{name}.py", *map(str, arguments)], check=True)


def document(run: Ablation) -> str:
    """Return the block of docs/ablation.md, from the result files that exist."""
    fields = dataclasses.asdict(run) | {"dataset": Path(run.data).name}
    fields["perceptual"] = "perceptual loss" if run.teacher else "no perceptual loss"
    settings = SETTINGS.format(**fields)
    earlier = run.out.read_text(encoding="utf-8") if run.out.is_file() else ""

    rows: dict[str, str] = {}
    for name in [*VARIANTS, *ON_PHOTOS, *TUNING]:
        results = [results_of(run, name, seed) for seed in run.seeds]
        results = [parts for parts in results if parts]
        old_row = next((line for line in earlier.splitlines() if line.startswith(f"| {name} |")), "")
        if old_row and settings in earlier and int(old_row.split("|")[2]) > len(results):
            rows[name] = old_row  # made elsewhere, with more seeds than there are here
        elif results:
            rows[name] = row(name, results, COLUMNS)

    table = "\n".join([*header(COLUMNS), *rows.values()])
    tuned = f"tuning run with the first seed ({len(rows.keys() & TUNING.keys())} of {len(TUNING)} done)."
    text = f"{settings}\nBeside its default setting, each method gets {tuning_runs()} {tuned}\n\n{table}"
    units = [units_per_text(run)] if FIRST_CAPTION in rows else []
    return "\n\n".join([text, *units, *meaning_of_codes(run)])


def meaning_of_codes(run: Ablation) -> list[str]:
    """Return the table of how codes and semantic classes go together, where runs have measured it."""
    rows: list[str] = []
    for name in [*VARIANTS, *ON_PHOTOS]:
        results = [parts for seed in run.seeds if (parts := results_of(run, name, seed))]
        results = [parts for parts in results if "code_purity" in parts["tokenizer"].metrics]
        if results:
            rows.append(row(name, results, MEANING_COLUMNS))
    return [MEANING, "\n".join([*header(MEANING_COLUMNS), *rows])] if rows else []


def header(columns: Columns) -> list[str]:
    """Return the first two lines of a table."""
    return ["| variant | seeds | " + " | ".join(columns) + " |", "| --- | ---: |" + " ---: |" * len(columns)]


def row(name: str, results: list[dict[str, Results]], columns: Columns) -> str:
    """Return the line of one variant."""
    cells = [cell(results, *column) for column in columns.values()]
    return f"| {name} | {len(results)} | " + " | ".join(cells) + " |"


def tuning_runs() -> int:
    """Return the number of tuning runs of each method; it must be the same for all, to be fair."""
    counts = {sum(name.startswith(f"{method},") for name in TUNING) for method in METHODS}
    if len(counts) != 1:
        raise ValueError(f"methods have {sorted(counts)} tuning runs, expected equally many")
    return counts.pop()


def results_of(run: Ablation, name: str, seed: int) -> dict[str, Results]:
    """Return the three result files of a run; empty where one is missing."""
    paths = {part: folder_of(run, name, seed) / "results" / f"{part}.json" for part in RESULTS}
    if not all(path.exists() for path in paths.values()):
        return {}
    return {part: read_results(path) for part, path in paths.items()}


def cell(results: list[dict[str, Results]], part: str, metric: str, factor: float, digits: int) -> str:
    """Return the mean of a metric over seeds, with the range where there are several."""
    values: list[float] = []
    for parts in results:
        for name, entry in parts[part].metrics.items():
            if name == metric or name.startswith(f"{metric}-"):  # rFD-NETWORK
                values.append(factor * entry["value"])
    if not values:
        return ""
    middle = f"{mean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


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
MEANING = """What codes mean, in per cent: positions whose class is the commonest of their code's, and how
evenly classes own codes (`--classes`: 64 clusters of the network's maps on val)."""


if __name__ == "__main__":
    main()
