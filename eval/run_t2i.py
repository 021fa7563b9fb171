"""python eval/run_t2i.py [--checkpoint DIR] [--data DIR] [--split test] [--features NETWORK.pt]

Draw one picture for the first caption of each photo of a split, and compare the pictures with the photos: FID
or FD, KID, precision, recall, IS. A second call goes on where a killed one stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from tyro.conf import OmitArgPrefixes

from tavq.base.arguments import parse, run_main
from tavq.data.dataset import ImageTextDataset
from tavq.data.images import grid, to_pixels
from tavq.data.layouts import open_dataset
from tavq.eval.evaluation import (
    REFERENCE_SIZE_PX,
    EvaluationRun,
    at_reference_size,
    image_metric_options,
    network_fields,
    open_network,
    photos,
    print_metrics,
    reference_set,
)
from tavq.eval.faithfulness import judged, nearest_training_images, pictures_of
from tavq.eval.judge import JUDGE_DISTANCE, JudgeDistance, judge_fields, open_judge
from tavq.eval.results import format_comparison, make_protocol, measured, with_intervals, write_results
from tavq.generator.sampling import SamplingConfig
from tavq.metrics.features import FeatureNetwork, ImageSet
from tavq.metrics.frechet import image_metrics
from tavq.metrics.spectral import WEAVE_FIELDS, flat_patches, weave_statistics
from tavq.pipeline import Pipeline, read_recipe

PROMPTS_AT_ONCE = 16
SAMPLES = 16
SEED_STRIDE = 1_000_000  # image i of generation seed s has seed s * SEED_STRIDE + i


@dataclasses.dataclass(frozen=True)
class T2IEvaluation(EvaluationRun):
    """Draw the first caption of each photo and compare the pictures with the photos.

    Example: python eval/run_t2i.py --features mobilenet_v2_features.pt --out results/t2i.json
    """

    features: Path | None = None
    """TorchScript feature network (uint8 B,3,H,W -> B,D) that names the metric; Inception v3 if not given."""
    seeds: int = 3
    """Generation seeds 0, 1, ...: the Frechet distance is their mean, with its range."""
    floors: bool = True
    """Also measure what a good and a bad set would get: real photos, shrunk photos, noise, a constant
    image."""
    judge: str | None = None
    """Checkpoint that judges the pictures (cycle CIDEr, rank of the prompt, a second Frechet distance); never
    the one that drew them."""
    neighbours: int = 0
    """Show the nearest training photo in token space of so many pictures, in NAME.neighbours.png (not to be
    published: it shows photos of the dataset)."""
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}, expected 1 or more")


def draw(
    pipeline: Pipeline, prompts: Sequence[str], seed: int, folder: Path, settings: SamplingConfig
) -> Tensor:
    """Draw every prompt into `folder` as 000000.png, ...; pictures that an earlier call left there are kept.

    Returns:
        (n, 3, S, S) uint8.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:06d}.png" for index in range(len(prompts))]
    seeds = [seed * SEED_STRIDE + index for index in range(len(prompts))]
    parts = {part: pipeline.hashes[part] for part in ("tokenizer", "generator")}
    wanted = {"settings": dataclasses.asdict(settings), "checkpoints": parts}
    missing = [i for i, path in enumerate(paths) if not _is_drawn(path, prompts[i], seeds[i], wanted)]
    bar = tqdm(total=len(paths), initial=len(paths) - len(missing), desc=f"seed {seed}", disable=None)
    for start in range(0, len(missing), PROMPTS_AT_ONCE):
        part = missing[start : start + PROMPTS_AT_ONCE]
        drawn = pipeline.generate([prompts[i] for i in part], [seeds[i] for i in part], settings)
        for index, picture in zip(part, drawn, strict=True):
            picture.save(paths[index])
        bar.update(len(part))
    bar.close()
    return torch.stack([_read(path) for path in paths])


def _is_drawn(path: Path, prompt: str, seed: int, wanted: dict[str, Any]) -> bool:
    if not path.exists():
        return False
    recipe = read_recipe(path)
    made = {name: recipe[name] for name in wanted}
    return (recipe["prompt"], recipe["seed"], made) == (prompt, seed, wanted)


def _read(path: Path) -> Tensor:
    with Image.open(path) as image:
        return to_pixels(image, image.width)


def worst_and_best(
    run: T2IEvaluation,
    pipeline: Pipeline,
    dataset: ImageTextDataset,
    network: FeatureNetwork,
    reference: ImageSet,
) -> dict[str, float]:
    """Frechet distances that frame the result, at equal n: real, shrunk, reconstructed, grey, noise."""
    size = pipeline.tokenizer.decode_size_px
    originals, _ = photos(dataset, pipeline.tokenizer.image_size_px)
    shrunk, _ = photos(dataset, size)
    sets = {
        "photos of another split": photos(run.other_split(len(reference)), REFERENCE_SIZE_PX)[0],
        f"the photos at {size} px": at_reference_size(shrunk),
        "the tokenizer's reconstructions": at_reference_size(_reconstructed(pipeline, originals)),
        "a constant grey image": torch.full(
            (len(reference), 3, REFERENCE_SIZE_PX, REFERENCE_SIZE_PX), 127, dtype=torch.uint8
        ),
        "noise": _noise(len(reference), size),
    }
    options = image_metric_options(len(reference), str(pipeline.device))
    scores = {}
    for name, images in sets.items():
        if len(images) == len(reference):
            found = image_metrics(ImageSet(images), reference, network, **options)
            scores[f"{network.frechet_name} of {name}"] = found.values[network.frechet_name]
    return scores


def weave_of_generated(images: Tensor, dataset: ImageTextDataset) -> dict[str, np.ndarray]:
    """The weave of generated images (n, 3, S', S') uint8, in the patches that are flat in themselves.

    Row i is compared with photo i of the dataset; a photo that cannot be read has no flat patch.
    """
    shrunk, indices = photos(dataset, images.shape[-1])
    flat = flat_patches(images)
    photos_of_rows = torch.zeros_like(images)
    photos_of_rows[indices] = shrunk
    flat_in_photos = torch.zeros_like(flat)
    flat_in_photos[indices] = flat_patches(shrunk)
    return weave_statistics(images, flat, photos_of_rows, flat_in_photos)


def _reconstructed(pipeline: Pipeline, images: Tensor) -> Tensor:
    rebuilt = pipeline.reconstruct(pictures_of(images))
    return torch.stack([to_pixels(result.image, result.image.width) for result in rebuilt])


def _noise(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return at_reference_size(noise)


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(T2IEvaluation, argv, prog="python eval/run_t2i.py")
    started = time.monotonic()
    pipeline, dataset = run.open(("tokenizer", "generator"))
    judge = open_judge(run.judge, pipeline) if run.judge else None
    network = open_network(run.features, pipeline.directory)
    path = run.result_path("t2i")
    prompts = [example.captions[0] for example in dataset.examples]
    reference, _ = reference_set(dataset)
    options = image_metric_options(len(reference), str(pipeline.device))
    drawn, scores = [], []
    for seed in range(run.seeds):
        drawn.append(draw(pipeline, prompts, seed, path.with_suffix("") / f"seed{seed}", run.sampling))
        generated = ImageSet(at_reference_size(drawn[-1]))
        scores.append(image_metrics(generated, reference, network, **options))
        print(f"seed {seed}: " + json.dumps(scores[-1].values), flush=True)
    metrics = {
        name: over_seeds([score.values[name] for score in scores], len(prompts)) for name in scores[0].values
    }

    frames = worst_and_best(run, pipeline, dataset, network, reference) if run.floors else {}
    per_image = weave_of_generated(drawn[0], dataset)
    fields: dict[str, Any] = {"weave": WEAVE_FIELDS}
    if judge is not None:
        distance = JudgeDistance(judge, dataset)
        metrics[JUDGE_DISTANCE] = over_seeds([distance(images) for images in drawn], len(prompts))
        if run.floors:
            shrunk, _ = photos(dataset, pipeline.tokenizer.decode_size_px)
            frames |= distance.floors(shrunk, run.other_split(len(reference)))

        statistics, shuffled = judged(judge, drawn[0], dataset)
        per_image |= statistics
        frames |= {f"{name}, prompts shuffled": value for name, value in shuffled.items()}
        fields |= judge_fields(judge, pipeline, tuple(judge.hashes))
    metrics |= with_intervals(per_image)

    protocol = make_protocol(
        task="t2i",
        ids=dataset.ids,
        started=started,
        **run.protocol_fields(pipeline, dataset),
        **network_fields(network, len(reference)),
        **fields,
        sampling=dataclasses.asdict(run.sampling),
        seeds=list(range(run.seeds)),
        prompts="the first caption of each photo",
        floors=frames,
    )
    write_results(path, metrics, protocol, per_image=per_image, ids=dataset.ids)
    _sheet(drawn[0][:SAMPLES]).save(path.with_suffix(".samples.png"))
    if run.neighbours:
        training = open_dataset(run.data, "train")
        sheet = nearest_training_images(pipeline, drawn[0][: run.neighbours], training)
        sheet.save(path.with_suffix(".neighbours.png"))
    print_metrics(metrics, path)
    for name, value in frames.items():
        print(f"{name}: {value:.4g}")
    if run.compare is not None:
        print(format_comparison(run.compare, path))


def _sheet(images: Tensor) -> Image.Image:
    """The pictures of the first prompts."""
    return grid(pictures_of(images), columns=8)


def over_seeds(values: Sequence[float], n: int) -> dict[str, Any]:
    """Mean and range over generation seeds."""
    return measured(float(np.mean(values)), n, low=min(values), high=max(values), over="generation seeds")


if __name__ == "__main__":
    main()
