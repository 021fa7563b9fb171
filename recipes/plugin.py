"""python recipes/plugin.py --data DIR --teacher NETWORK.pt --features NETWORK.pt [--seeds 0 1 2]

Does the alignment help VQ models of other libraries? Each is trained plainly, then further with and without
alignment, with one budget. Measured on val: reconstruction, retrieval by a probe that is fitted alike to
both, and the captions of a small captioner.

A finished run is skipped and a stopped one is resumed. After each run the table in docs/align.md is made
again from the result files in recipes/results/plugin/. A model whose library is not installed is left out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from plugin_models import SIZE_PX

from tavq.base.arguments import parse, run_main
from tavq.base.files import atomic_write
from tavq.data.config import default_data
from tavq.data.layouts import check_data_is_named
from tavq.eval.table import markdown_row, with_block, write_block
from tavq.training.run_folder import read_log

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = {
    "diffusers": "diffusers",
    "taming": "taming",
    "vector_quantize_pytorch": "vector_quantize_pytorch",
}
"""Function of plugin_models.py -> the package that it needs."""
SAVED_AS = {"diffusers": "", "taming": "model.ckpt", "vector_quantize_pytorch": "model.pt"}
"""What `tavq align` saves in its folder; diffusers takes the folder."""
ARMS = {"plain": 0.0, "aligned": 0.5}
"""Name -> share of the alignment's gradient (`--losses.align`)."""
COLUMNS = {
    "rFD": ("rFD", 1, 1),
    "PSNR": ("PSNR", 1, 2),
    "usage": ("usage", 100, 1),
    "text to image R@10": ("t2i_R@10", 100, 1),
    "image to text R@10": ("i2t_R@10", 100, 1),
    "CIDEr": ("CIDEr", 100, 1),
}
"""Title -> metric (or what it begins with), factor, digits."""


@dataclasses.dataclass(frozen=True)
class Plugin:
    """Train VQ models of other libraries with and without alignment, and measure them.

    Example: python recipes/plugin.py --data flickr8k/ --teacher squeezenet_layers.pt --seeds 0 1 2
    """

    data: str = dataclasses.field(default_factory=default_data)
    """Dataset: a directory in any known layout, `shapes` or `scenes`. By default that of TAVQ_DATA."""
    teacher: Path | None = None
    """TorchScript network of the perceptual loss."""
    features: Path | None = None
    """TorchScript network that measures rFD. Without it rFD is left out."""
    models: tuple[str, ...] = tuple(LIBRARIES)
    """Functions of plugin_models.py."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training."""
    plain_steps: int = 1500
    """Steps of 16 images in which a model is trained before."""
    steps: int = 750
    """Steps of 16 images in which it goes on, with or without alignment."""
    probe_steps: int = 500
    """Steps of the probe."""
    captioner_steps: int = 600
    """Steps of the captioner."""
    captioner: str = "flickr8k"
    """Preset of the captioner: flickr8k or tiny."""
    runs: Path = Path("runs/plugin")
    """Directory for the runs."""
    results: Path = Path("recipes/results/plugin")
    """Directory for the result files."""
    out: Path = Path("docs/align.md")
    """File whose block `plugin` is filled with the table."""

    def __post_init__(self) -> None:
        check_data_is_named(self.data)
        if unknown := set(self.models) - set(LIBRARIES):
            raise ValueError(f"no model {sorted(unknown)[0]!r}; choose among {', '.join(LIBRARIES)}")
        with_block(self.out, "plugin", "")  # refused now, not after the work


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    """Train and measure every model, and fill the table."""
    run = parse(Plugin, argv, prog="python recipes/plugin.py")
    installed = [model for model in run.models if importlib.util.find_spec(LIBRARIES[model])]
    for model in sorted(set(run.models) - set(installed)):
        print(f"{model} is left out: {LIBRARIES[model]} is not installed; see recipes/plugin_models.py")
    for seed in run.seeds:
        for model in installed:
            for arm in ARMS:
                path = result_of(run, model, arm, seed)
                if path.exists():
                    print(f"== {model}, {arm}, seed {seed}: done before", flush=True)
                    continue
                print(f"== {model}, {arm}, seed {seed}", flush=True)
                scores = train_and_measure(run, model, arm, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as temporary:
                    temporary.write_text(json.dumps(scores, indent=1) + "\n")
                write_block(run.out, "plugin", table_of(run))
    write_block(run.out, "plugin", table_of(run))
    print(run.out)


def result_of(run: Plugin, model: str, arm: str, seed: int) -> Path:
    """Return the path of a result file."""
    return run.results / f"{model}-{arm}-seed{seed}.json"


def train_and_measure(run: Plugin, model: str, arm: str, seed: int) -> dict[str, float]:
    """Train one arm of one model, and return its metrics on val."""
    folder = run.runs / f"{model}-seed{seed}"
    plain, own = folder / "before", folder / arm
    align(run, model, seed, plain, None, *training(run.plain_steps, rate=1e-3, share=0))
    align(run, model, seed, own, plain, *training(run.steps, rate=3e-4, share=ARMS[arm]))
    probed = folder / f"{arm}-probed"
    measured: list[object] = ["--features", run.features] if run.features else []
    probe = ("--probe-only", "--probe-steps", run.probe_steps)
    align(run, model, seed, probed, own, *probe, *measured)
    scores: dict[str, float] = json.loads((probed / "report.json").read_text())["before"]
    return scores | {"CIDEr": caption(run, model, seed, own)}


def training(steps: int, rate: float, share: float) -> list[object]:
    """Return the flags of a training. Its own probe is kept short, since both arms are probed at the end."""
    flags: list[object] = ["--training.steps", steps, "--training.evaluate-every", steps, "--probe-steps", 1]
    return [*flags, "--training.learning-rate", rate, "--losses.align", share]


def align(run: Plugin, model: str, seed: int, out: Path, start: Path | None, *flags: object) -> None:
    """Run `tavq align` on a new model, or on the one that an earlier call saved in `start`."""
    arguments: list[object] = ["--base", f"call:plugin_models:{model}", "--data", run.data, "--out", out]
    arguments += ["--image-size-px", SIZE_PX, "--training.seed", seed]
    if run.teacher:
        arguments += ["--perceptual", run.teacher]
    tavq(model, seed, start, "align", *arguments, *flags)


def caption(run: Plugin, model: str, seed: int, start: Path) -> float:
    """Train a captioner on the ids of a model, and return its best CIDEr on val (greedy)."""
    tokens, out = start.with_name(f"{start.name}-tokens"), start.with_name(f"{start.name}-captioner")
    source = f"call:plugin_models:{model}"
    size = ("--image-size-px", SIZE_PX)
    tavq(
        model, seed, start, "tokenize", *("--data", run.data, "--crops", 0),
        *("--checkpoint", source, *size, "--out", tokens),
    )  # fmt: skip
    arguments: list[object] = ["--preset", run.captioner, "--tokens", tokens, "--out", out]
    arguments += ["--training.seed", seed, "--training.steps", run.captioner_steps]
    arguments += ["--training.evaluate-every", max(1, run.captioner_steps // 4)]
    tavq(model, seed, start, "train", "captioner", *arguments)
    log = read_log(out / "training" / "log.jsonl")
    return max(line["val/CIDEr"] for line in log if "val/CIDEr" in line)


def tavq(model: str, seed: int, start: Path | None, *arguments: object) -> None:
    """Run a command, in which plugin_models.py finds the seed and the weights."""
    paths = [str(ROOT / "recipes"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PLUGIN_SEED": str(seed)}
    if start is not None:
        environment["PLUGIN_WEIGHTS"] = str((start / SAVED_AS[model]).resolve())
    subprocess.run([sys.executable, "-m", "tavq", *map(str, arguments)], check=True, env=environment)


def table_of(run: Plugin) -> str:
    """Return the table, from the result files that exist."""
    settings = SETTINGS.format(**dataclasses.asdict(run), dataset=Path(run.data).name, size=SIZE_PX)
    lines = [
        markdown_row(["model", "seeds", *COLUMNS]),
        markdown_row(["---", *["---:"] * (len(COLUMNS) + 1)]),
    ]
    for model in LIBRARIES:
        for arm in ARMS:
            paths = [result_of(run, model, arm, seed) for seed in run.seeds]
            results = [json.loads(path.read_text()) for path in paths if path.exists()]
            if results:
                cells = [cell(results, *column) for column in COLUMNS.values()]
                lines.append(markdown_row([f"`{model}`, {arm}", str(len(results)), *cells]))
    return f"{settings}\n\n" + "\n".join(lines)


def cell(results: Sequence[dict[str, float]], metric: str, factor: float, digits: int) -> str:
    """Return the mean over seeds, with the range where there are several."""
    values = [
        factor * score for scores in results for name, score in scores.items() if name.startswith(metric)
    ]
    if not values:
        return ""
    middle = f"{mean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


SETTINGS = """Made by `python recipes/plugin.py`: validation split of {dataset}, {size} px, 8 x 8 tokens of
512 codes. Each model is trained for {plain_steps} steps of 16 images, then for {steps} with and without
alignment. A probe of {probe_steps} steps is fitted to the frozen codes of both, and a captioner of
{captioner_steps} steps trained on them. Recall in per cent (chance 1 %), CIDEr times 100, greedy. Mean over
seeds, and the range."""


if __name__ == "__main__":
    main()
