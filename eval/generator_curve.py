"""python eval/generator_curve.py RUN --checkpoint DIR --features NETWORK.pt [--out curve.png]

Validation loss and Frechet distance of a generator over its training steps, as an image and as JSON. RUN was
trained with --training.keep-evaluated.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from tavq.base.arguments import parse, run_main
from tavq.base.files import atomic_write
from tavq.base.weights import shipped_checkpoint
from tavq.data.config import default_data
from tavq.data.dataset import ImageTextDataset
from tavq.data.layouts import open_dataset
from tavq.eval.evaluation import at_reference_size, image_metric_options, open_network, reference_set
from tavq.eval.t2i import generate_images
from tavq.generator.config import SamplingConfig
from tavq.metrics.features import FeatureNetwork, ImageSet
from tavq.metrics.frechet import image_metrics
from tavq.pipeline import Pipeline
from tavq.training.loop import EVALUATED_FOLDER
from tavq.training.run_folder import read_log

LOSSES = {"val/loss": "with its caption", "val/loss_null_text": "without text"}
"""Name in the training log -> label of the curve."""


@dataclasses.dataclass(frozen=True)
class GeneratorCurve:
    """Plot validation loss and Frechet distance of a generator over its training steps.

    Example: python eval/generator_curve.py runs/flickr8k/generator --features mobilenet_v2_features.pt
    """

    run: Positional[Path]
    """Directory of a generator's training run, with the weights of its evaluations."""
    checkpoint: Path = shipped_checkpoint()
    """Directory that holds the tokenizer/ of that generator."""
    data: str = dataclasses.field(default_factory=default_data)
    """Dataset: a directory in any known layout, hf:OWNER/NAME, `shapes` or `scenes`. By default that of
    TAVQ_DATA."""
    split: str = "val"
    """Split to measure on."""
    limit: int = 500
    """Number of images; one is generated for each. A Frechet distance of so few is biased, but equally at
    all steps."""
    features: Path | None = None
    """TorchScript feature network (uint8 B,3,H,W -> B,D). By default Inception v3.
    A program: it runs only if networks.lock or TAVQ_TRUST holds its SHA-256."""
    out: Path = Path("generator_curve.png")
    """File for the plot; NAME.json beside it holds the numbers."""
    sampling: SamplingConfig = SamplingConfig()


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(GeneratorCurve, argv, prog="python eval/generator_curve.py")
    checkpoints = sorted((run.run / "training" / EVALUATED_FOLDER).glob("step-*"))
    if not checkpoints:
        raise FileNotFoundError(
            f"{run.run} kept no weights of its evaluations; train it with --training.keep-evaluated"
        )

    network = open_network(run.features, run.checkpoint)
    dataset = open_dataset(run.data, run.split).take(run.limit)
    distances = {
        int(folder.name.removeprefix("step-")): frechet_distance(run, folder, dataset, network)
        for folder in checkpoints
    }
    log = read_log(run.run / "training" / "log.jsonl")
    losses = {name: [(int(line["step"]), line[name]) for line in log if name in line] for name in LOSSES}

    values: dict[str, Any] = {
        network.frechet_name: distances,
        "n": len(dataset),
        "split": run.split,
        **losses,
    }
    with atomic_write(run.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")
    with atomic_write(run.out) as temporary:
        temporary.write_bytes(plot_png(losses, distances, f"{network.frechet_name}, n = {len(dataset)}"))
    print(run.out)


def frechet_distance(
    run: GeneratorCurve, weights: Path, dataset: ImageTextDataset, network: FeatureNetwork
) -> float:
    """Measure images that the generator in `weights` makes of the first caption of each example."""
    with tempfile.TemporaryDirectory() as folder:
        # A pipeline is loaded from one directory: this one has the tokenizer, and the generator of that step.
        os.symlink((run.checkpoint / "tokenizer").resolve(), Path(folder) / "tokenizer")
        os.symlink(weights.resolve(), Path(folder) / "generator")
        pipeline = Pipeline(Path(folder))
        images = generate_images(pipeline, dataset, 0, weights / "samples", run.sampling)

    reference, _ = reference_set(dataset)
    options = image_metric_options(len(reference))
    scores = image_metrics(ImageSet(at_reference_size(images)), reference, network, **options)
    distance = scores.values[network.frechet_name]
    print(f"{weights.name}: {network.frechet_name} {distance:.1f}", flush=True)
    return distance


def plot_png(
    losses: dict[str, list[tuple[int, float]]], distances: dict[int, float], distance_name: str
) -> bytes:
    """Plot the losses and the distance over the training steps, side by side; return a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in losses.items():
        left.plot(*zip(*points, strict=True), marker="o", label=LOSSES[name])
    left.set_ylabel("validation loss, nats a token")
    left.legend(frameon=False)
    right.plot(list(distances), list(distances.values()), marker="o", color="tab:red")
    right.set_ylabel(distance_name)
    for axes in (left, right):
        axes.set_xlabel("training steps")
        axes.spines[["top", "right"]].set_visible(False)

    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


if __name__ == "__main__":
    main()
