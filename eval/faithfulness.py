"""Do generated images show what was asked for, and are they new? Measured without anybody else's model.

A judge, which is a checkpoint that generated none of the images, captions them and ranks the prompts. Both
scores must fall when the prompts are shuffled. The nearest training image in token space shows whether the
generator reproduces what it has seen.

Shapes: n images, S image size in px, h w token grid.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tavq.alignment.config import NUM_LEVELS
from tavq.base.progress import Progress
from tavq.captioner.config import GREEDY
from tavq.data.dataset import ImageTextDataset, readable_images
from tavq.data.images import grid, to_pixels
from tavq.eval.evaluation import CAPTIONED_AT_ONCE, best_captions, uint8_to_pil
from tavq.eval.work import HERE, Here
from tavq.metrics.captions import caption_metrics
from tavq.pipeline import Pipeline
from tavq.tokenizer.retrieval import alignment_scores, image_to_text_ranks

RANK = 10


def judge_images(
    judge: Pipeline, images: Tensor, dataset: ImageTextDataset, work: Here = HERE
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Score images generated from the first caption of each example.

    Args:
        judge: see `judge.open_judge`.
        images: (n, 3, S, S) uint8.
        dataset: n examples.
        work: where images are captioned.

    Returns:
        Scores (n, 1) by metric, and as floors the mean scores when each image has the next one's prompt.
    """
    captions = cycle_captions(judge, images, work)
    scores = {"cycle_CIDEr": cycle_cider(captions, dataset)}
    shuffled_captions = [*captions[1:], captions[0]]
    floors = {"cycle_CIDEr": float(cycle_cider(shuffled_captions, dataset).mean())}

    prompts = [example.captions[0] for example in dataset.examples]
    hits = prompt_hits(judge, images, prompts)
    shuffled_hits = prompt_hits(judge, images.roll(1, dims=0), prompts)
    if hits is not None and shuffled_hits is not None:
        scores[f"prompt_R@{RANK}"] = hits
        floors[f"prompt_R@{RANK}"] = float(shuffled_hits.mean())
    return scores, floors


def cycle_captions(judge: Pipeline, images: Tensor, work: Here = HERE) -> list[str]:
    """Return the judge's greedy caption of each image (n, 3, S, S) uint8."""
    return work(best_captions, judge, images, GREEDY, batch=CAPTIONED_AT_ONCE)["captions"].tolist()


def cycle_cider(captions: list[str], dataset: ImageTextDataset) -> np.ndarray:
    """Return the CIDEr of each caption against the human captions of its prompt's image: (n, 1)."""
    hypotheses = dict(zip(dataset.ids, captions, strict=True))
    references = {example.id: list(example.captions) for example in dataset.examples}
    scores = caption_metrics(hypotheses, references, backend="python", metrics=("CIDEr",))
    rows = {name: row for row, name in enumerate(scores.ids)}  # scores come sorted by id
    return scores.statistics["CIDEr"][[rows[name] for name in dataset.ids]]


def prompt_hits(judge: Pipeline, images: Tensor, prompts: list[str]) -> np.ndarray | None:
    """Return whether each image's prompt is among the ten that its codes fit best: (n, 1).

    None where the judge's codes are not aligned with text.
    """
    if NUM_LEVELS not in judge.tokenizer.aligned_levels.values():
        return None
    ids = judge.encode(uint8_to_pil(images))
    scores = alignment_scores(judge.tokenizer, ids, judge.alignment_encoder.encode(prompts))
    ranks = image_to_text_ranks(scores, torch.arange(len(prompts)))
    return (ranks < RANK).double().cpu().numpy()[:, None]


@torch.inference_mode()
def photo_hits(
    judge: Pipeline, images: Tensor, dataset: ImageTextDataset
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Score whether each image's own photo is among the ten whose codes the judge finds most like its own.

    Images are compared by the mean of their projected codes. A photo that cannot be read is never found.

    Args:
        judge: see `judge.open_judge`; aligned with text, else nothing is measured.
        images: (n, 3, S, S) uint8.
        dataset: n examples.

    Returns:
        Scores (n, 1) by metric, and as floors the mean scores when each image has the next one's photo.
    """
    if NUM_LEVELS not in judge.tokenizer.aligned_levels.values():
        return {}, {}
    every_code = torch.arange(judge.tokenizer.num_codes, device=judge.device)
    projected = judge.tokenizer.project(every_code)

    def vectors_of(pictures: list[Image.Image]) -> Tensor:
        ids = judge.encode(pictures).flatten(1)
        return torch.nn.functional.normalize(projected[ids].mean(1), dim=-1).cpu()

    photos = list(readable_images(dataset))
    photo_vectors = torch.full((len(dataset), projected.shape[1]), torch.nan)
    photo_vectors[[index for index, _ in photos]] = vectors_of([image for _, image in photos])
    similarity = vectors_of(uint8_to_pil(images)) @ photo_vectors.T

    def hits(likeness: Tensor) -> np.ndarray:
        own = likeness.diagonal().unsqueeze(1)
        return ((likeness >= own).sum(1) <= RANK).where(~own.isnan()[:, 0], False).double().numpy()[:, None]

    name = f"photo_R@{RANK}"
    return {name: hits(similarity)}, {name: float(hits(similarity.roll(1, dims=0)).mean())}


def nearest_training_images(pipeline: Pipeline, images: Tensor, training: ImageTextDataset) -> Image.Image:
    """Draw generated images above the training images whose codes are nearest, position by position.

    The sheet shows images of the dataset, so it is not for publication.

    Args:
        images: (n, 3, S, S) uint8.
        training: the split that the generator was trained on.
    """
    lookup = pipeline.tokenizer.quantizer.lookup
    size = images.shape[-1]
    queries = lookup(pipeline.encode(uint8_to_pil(images)).flatten(1)).flatten(1)
    best = [(-np.inf, 0)] * len(images)  # similarity and index of the nearest training image so far
    bar = Progress(readable_images(training), total=len(training), desc="nearest training images")
    for index, image in bar:
        codes = lookup(pipeline.encode([image]).flatten(1)).flatten(1)
        similarities = (queries @ codes.T)[:, 0].tolist()
        best = [max(old, (new, index)) for old, new in zip(best, similarities, strict=True)]

    neighbours = torch.stack([to_pixels(training.load_image(index), size) for _, index in best])
    return grid(uint8_to_pil(images) + uint8_to_pil(neighbours), columns=len(images))
