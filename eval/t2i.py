"""python eval/run_t2i.py [--checkpoint DIR] [--data DIR] [--split test] [--features NETWORK.pt]

Generate one image from the first caption of each image of a split, and compare the generated images with the
real ones: FID or FD, KID, precision, recall, IS. Rerunning resumes where a killed run stopped.

Shapes: n images, S image size in px.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tavq.base.progress import Progress
from tavq.data.dataset import ImageTextDataset
from tavq.data.images import grid, to_pixels
from tavq.data.layouts import open_dataset
from tavq.eval.config import T2IEvaluation
from tavq.eval.evaluation import (
    at_reference_size,
    image_metric_options,
    network_fields,
    open_evaluation,
    open_network,
    other_split,
    print_report,
    protocol_fields,
    reference_set,
    squashed_images,
    uint8_to_pil,
)
from tavq.eval.faithfulness import judge_images, nearest_training_images, photo_hits
from tavq.eval.judge import JUDGE_DISTANCE, JudgeDistance, judge_fields, open_judge
from tavq.eval.results import make_protocol, measured, with_intervals, write_results
from tavq.eval.work import HERE, Here, work_of
from tavq.generator.config import SamplingConfig
from tavq.metrics.features import REFERENCE_SIZE_PX, FeatureNetwork, ImageSet
from tavq.metrics.frechet import ImageScores, image_metrics
from tavq.metrics.spectral import WEAVE_FIELDS, flat_patches, weave_statistics
from tavq.pipeline import Pipeline, read_recipe

PROMPTS_AT_ONCE = 16
SAMPLES = 16  # images on the sheet beside the result file
SEED_STRIDE = 1_000_000  # image i of generation seed s has seed s * SEED_STRIDE + i


def evaluate_generator(run: T2IEvaluation) -> None:
    """Generate and compare the images of a split, and write the result file."""
    started = time.monotonic()
    pipeline, dataset = open_evaluation(run, ("tokenizer", "generator"))
    judge = open_judge(run.judge, pipeline) if run.judge else None
    network = open_network(run.features, pipeline.directory)
    path = run.result_path("t2i")
    work = work_of(run, path)
    reference, _ = reference_set(dataset)

    images_by_seed = [
        generate_images(
            pipeline,
            dataset,
            seed,
            path.with_suffix("") / f"seed{seed}",
            run.sampling,
            image_words=run.image_words,
            text=run.text,
            work=work,
        )
        for seed in range(run.seeds)
    ]
    scores = [score_images(pipeline, images, network, reference, work) for images in images_by_seed]
    for seed, score in enumerate(scores):
        print(f"seed {seed}: " + json.dumps(score.values), file=sys.stderr)
    metrics = {
        name: over_seeds([score.values[name] for score in scores], len(dataset)) for name in scores[0].values
    }

    floors = floor_scores(run, pipeline, dataset, network, reference, work) if run.floors else {}
    per_image = weave_of_generated(images_by_seed[0], dataset)
    fields: dict[str, Any] = {"weave": WEAVE_FIELDS}
    if judge is not None:
        distance = JudgeDistance(judge, dataset, work)
        metrics[JUDGE_DISTANCE] = over_seeds([distance(images) for images in images_by_seed], len(dataset))
        if run.floors:
            shrunk, _ = squashed_images(dataset, pipeline.tokenizer.decode_size_px)
            floors |= distance.floors(shrunk, other_split(run, len(reference)))

        judged, shuffled = scores_by_judge(judge, images_by_seed[0], dataset, work)
        per_image |= judged
        floors |= shuffled
        fields |= judge_fields(judge, pipeline, tuple(judge.hashes))
    metrics |= with_intervals(per_image)

    protocol = make_protocol(
        task="t2i",
        ids=dataset.ids,
        started=started,
        **protocol_fields(run, pipeline, dataset),
        **network_fields(network, len(reference)),
        **fields,
        sampling=dataclasses.asdict(run.sampling),
        seeds=list(range(run.seeds)),
        prompts=described_prompts(run),
        floors=floors,
    )
    write_results(path, metrics, protocol, per_image=per_image, ids=dataset.ids)
    work.clear()

    save_sheets(run, pipeline, images_by_seed[0], path)
    print_report(run, path, metrics, protocol)


def scores_by_judge(
    judge: Pipeline, images: Tensor, dataset: ImageTextDataset, work: Here
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Let a judge find prompts and photos of generated images (n, 3, S, S) uint8.

    Returns:
        Scores (n, 1) by metric, and as floors the means where each image has the next one's prompt or photo.
    """
    per_image: dict[str, np.ndarray] = {}
    floors: dict[str, float] = {}
    for measure in (functools.partial(judge_images, work=work), photo_hits):
        scores, shuffled = measure(judge, images, dataset)
        per_image |= scores
        floors |= {f"{name}, prompts shuffled": value for name, value in shuffled.items()}
    return per_image, floors


def save_sheets(run: T2IEvaluation, pipeline: Pipeline, images: Tensor, path: Path) -> None:
    """Write the first images as a sheet beside the result file, and the nearest training images if asked."""
    grid(uint8_to_pil(images[:SAMPLES]), columns=8).save(path.with_suffix(".samples.png"))
    if run.neighbours:
        training = open_dataset(run.data, "train")
        sheet = nearest_training_images(pipeline, images[: run.neighbours], training)
        sheet.save(path.with_suffix(".neighbours.png"))


def described_prompts(run: T2IEvaluation) -> str:
    """Say what the generator is given."""
    words = f"{run.image_words} words of each photo"
    caption = "the first caption of each photo"
    if not run.image_words:
        return caption
    return f"{words}, and {caption}" if run.text else words


@dataclasses.dataclass(frozen=True)
class ImageJob:
    """An image to generate."""

    index: int
    path: Path
    prompt: str
    seed: int


def generate_images(
    pipeline: Pipeline,
    dataset: ImageTextDataset,
    seed: int,
    folder: Path,
    sampling: SamplingConfig,
    *,
    image_words: int = 0,
    text: bool = True,
    work: Here = HERE,
) -> Tensor:
    """Generate an image from the first caption of every example into `folder` as 000000.png, ...

    With `image_words` the generator is given so many words of the example's image, too, and without `text`
    nothing else. An image that an earlier call has written with the same recipe is not generated again.

    Returns:
        (n, 3, S, S) uint8.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {part: pipeline.hashes[part] for part in ("tokenizer", "generator")}
    expected: dict[str, Any] = {"settings": dataclasses.asdict(sampling), "checkpoints": parts}
    if image_words:
        expected["image_words"] = image_words
    paths = [folder.resolve() / f"{index:06d}.png" for index in range(len(dataset))]
    jobs = [
        ImageJob(index, path, example.captions[0] if text else "", seed * SEED_STRIDE + index)
        for index, (path, example) in enumerate(zip(paths, dataset.examples, strict=True))
    ]
    missing = [job for job in jobs if not _has_recipe(job, expected)]
    if missing and image_words:
        write_images(pipeline, missing, sampling, text, image_words, dataset)
    elif missing:
        work(write_images, pipeline, missing, sampling, text, batch=PROMPTS_AT_ONCE)
    return torch.stack([_load(path) for path in paths])


def write_images(
    pipeline: Pipeline,
    jobs: Sequence[ImageJob],
    sampling: SamplingConfig,
    text: bool,
    image_words: int = 0,
    dataset: ImageTextDataset | None = None,
) -> dict[str, np.ndarray]:
    """Generate images and write their files; there are no arrays to return."""
    at_once = 1 if image_words else PROMPTS_AT_ONCE  # each photo has words of its own
    with Progress(total=len(jobs), desc="generating", unit="image") as bar:
        for start in range(0, len(jobs), at_once):
            batch = jobs[start : start + at_once]
            results = pipeline.generate_each(
                [job.prompt for job in batch] if text else None,
                [job.seed for job in batch],
                sampling,
                images=dataset.load_image(batch[0].index) if dataset is not None else None,
                image_words=image_words,
            )
            for job, result in zip(batch, results, strict=True):
                result.save(job.path)
                bar.update(1)
    return {}


def score_images(
    pipeline: Pipeline, images: Tensor, network: FeatureNetwork, reference: ImageSet, work: Here
) -> ImageScores:
    """Compare generated images (n, 3, S, S) uint8 with the real ones."""
    options = image_metric_options(len(reference), str(pipeline.device), work)
    return image_metrics(ImageSet(at_reference_size(images)), reference, network, **options)


def _has_recipe(job: ImageJob, expected: dict[str, Any]) -> bool:
    if not job.path.exists():
        return False
    recipe = read_recipe(job.path)
    same = recipe["prompt"] == job.prompt and recipe["seed"] == job.seed
    return same and all(recipe[name] == value for name, value in expected.items())


def _load(path: Path) -> Tensor:
    with Image.open(path) as image:
        return to_pixels(image, image.width)


def floor_scores(
    run: T2IEvaluation,
    pipeline: Pipeline,
    dataset: ImageTextDataset,
    network: FeatureNetwork,
    reference: ImageSet,
    work: Here,
) -> dict[str, float]:
    """Measure reference points for the Frechet distance, with as many images as were generated."""
    size = pipeline.tokenizer.decode_size_px
    originals, _ = squashed_images(dataset, pipeline.tokenizer.image_size_px)
    shrunk, _ = squashed_images(dataset, size)
    grey = torch.full((len(reference), 3, REFERENCE_SIZE_PX, REFERENCE_SIZE_PX), 127, dtype=torch.uint8)
    sets = {
        "photos of another split": squashed_images(other_split(run, len(reference)), REFERENCE_SIZE_PX)[0],
        f"the photos at {size} px": at_reference_size(shrunk),
        "the tokenizer's reconstructions": at_reference_size(_reconstructions(pipeline, originals)),
        "a constant grey image": grey,
        "noise": _noise(len(reference), size),
    }

    options = image_metric_options(len(reference), str(pipeline.device), work)
    name = network.frechet_name
    distances: dict[str, float] = {}
    for title, images in sets.items():
        if len(images) == len(reference):  # a Frechet distance depends on the number of images
            scores = image_metrics(ImageSet(images), reference, network, **options)
            distances[f"{name} of {title}"] = scores.values[name]
    return distances


def weave_of_generated(images: Tensor, dataset: ImageTextDataset) -> dict[str, np.ndarray]:
    """Measure the weave of generated images (n, 3, S, S) uint8, in the patches that are flat in themselves.

    Row i is compared with the real image i; one that cannot be read has no flat patch.
    """
    shrunk, indices = squashed_images(dataset, images.shape[-1])
    flat = flat_patches(images)
    real_images = torch.zeros_like(images)
    real_images[indices] = shrunk
    flat_in_real_images = torch.zeros_like(flat)
    flat_in_real_images[indices] = flat_patches(shrunk)
    return weave_statistics(images, flat, real_images, flat_in_real_images)


def _reconstructions(pipeline: Pipeline, images: Tensor) -> Tensor:
    results = pipeline.reconstruct(uint8_to_pil(images))
    return torch.stack([to_pixels(result.image, result.image.width) for result in results])


def _noise(count: int, size: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (count, 3, size, size), generator=rng, dtype=torch.uint8)
    return at_reference_size(noise)


def over_seeds(values: Sequence[float], n: int) -> dict[str, Any]:
    """Return mean and range over generation seeds."""
    return measured(float(np.mean(values)), n, low=min(values), high=max(values), over="generation seeds")
