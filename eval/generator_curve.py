"""python eval/generator_curve.py RUN --checkpoint DIR --features NETWORK.pt [--out curve.png]

Validation loss and Frechet distance of a generator against its training steps, as a picture and as JSON.
RUN was trained with --training.keep-evaluated.
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
from tavq.data.dataset import ImageTextDataset
from tavq.data.layouts import default_data, open_dataset
from tavq.eval.evaluation import at_reference_size, image_metric_options, open_network, reference_set
from tavq.eval.run_t2i import draw
from tavq.generator.sampling import SamplingConfig
from tavq.metrics.features import FeatureNetwork, ImageSet
from tavq.metrics.frechet import image_metrics
from tavq.pipeline import Pipeline
from tavq.training.checkpoint import shipped_checkpoint
from tavq.training.loop import EVALUATED_FOLDER
from tavq.training.run_folder import read_log


@dataclasses.dataclass(frozen=True)
class GeneratorCurve:
    """Draw validation loss and Frechet distance of a generator against its training steps.

    Example: python eval/generator_curve.py runs/flickr8k/generator --features mobilenet_v2_features.pt
    """

    run: Positional[Path]
    """Directory of a generator's training run, with the weights of its evaluations."""
    checkpoint: Path = shipped_checkpoint()
    """Directory that holds the tokenizer/ of that generator."""
    data: str = dataclasses.field(default_factory=default_data)
    """Dataset: a directory in any known layout, or `shapes`. By default the one that TAVQ_DATA names."""
    split: str = "val"
    limit: int = 500
    """Photos, with one picture each; a Frechet distance of so few is biased, alike for all steps."""
    features: Path | None = None
    """TorchScript feature network (uint8 B,3,H,W -> B,D); Inception v3 if not given."""
    out: Path = Path("generator_curve.png")
    """The picture; NAME.json beside it holds the numbers."""
    sampling: SamplingConfig = SamplingConfig()


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(GeneratorCurve, argv, prog="python eval/generator_curve.py")
    kept = sorted((run.run / "training" / EVALUATED_FOLDER).glob("step-*"))
    if not kept:
        raise FileNotFoundError(
            f"{run.run} kept no weights of its evaluations; train it with --training.keep-evaluated"
        )
    network = open_network(run.features, run.checkpoint)
    dataset = open_dataset(run.data, run.split).take(run.limit)
    distances = {int(f.name.split("-")[1]): distance(run, f, dataset, network) for f in kept}
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
        temporary.write_bytes(curve_png(losses, distances, f"{network.frechet_name}, n = {len(dataset)}"))
    print(run.out)


LOSSES = {"val/loss": "with its caption", "val/loss_null_text": "without text"}


def distance(run: GeneratorCurve, weights: Path, dataset: ImageTextDataset, network: FeatureNetwork) -> float:
    """Frechet distance of one picture a photo, drawn by the generator in `weights`."""
    with tempfile.TemporaryDirectory() as folder:
        os.symlink((run.checkpoint / "tokenizer").resolve(), Path(folder) / "tokenizer")
        os.symlink(weights.resolve(), Path(folder) / "generator")
        pipeline = Pipeline(Path(folder))
        prompts = [example.captions[0] for example in dataset.examples]
        pictures = draw(pipeline, prompts, 0, weights / "samples", run.sampling)
    reference, _ = reference_set(dataset)
    options = image_metric_options(len(reference))
    scores = image_metrics(ImageSet(at_reference_size(pictures)), reference, network, **options)
    found = scores.values[network.frechet_name]
    print(f"{weights.name}: {network.frechet_name} {found:.1f}", flush=True)
    return found


def curve_png(
    losses: dict[str, list[tuple[int, float]]], distances: dict[int, float], distance_name: str
) -> bytes:
    """Two panels over the training steps: the losses, and the distance."""
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
