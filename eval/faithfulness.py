"""Do generated pictures show what was asked for, and are they new? Without any foreign model.

A judge, a checkpoint that drew none of the pictures, captions them and ranks the prompts; both scores must
fall when the prompts are shuffled. The nearest training image in token space shows whether the
generator recites.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from tavq.alignment.projections import NUM_LEVELS
from tavq.captioner.decoding import GREEDY
from tavq.data.dataset import ImageTextDataset, readable_images
from tavq.data.images import grid, to_pil, to_pixels
from tavq.metrics.captions import caption_metrics
from tavq.pipeline import Pipeline
from tavq.tokenizer.retrieval import alignment_scores, image_to_text_ranks

PHOTOS_AT_ONCE = 20
RANK = 10


def pictures_of(images: Tensor) -> list[Image.Image]:
    """(n, 3, S, S) uint8 -> n pictures."""
    return to_pil(images.float() / 127.5 - 1)


def cycle_captions(judge: Pipeline, images: Tensor) -> list[str]:
    """The judge's greedy caption of each picture; images (n, 3, S, S) uint8."""
    pictures, captions = pictures_of(images), []
    for start in tqdm(range(0, len(pictures), PHOTOS_AT_ONCE), desc="judging", disable=None):
        part = judge.caption(pictures[start : start + PHOTOS_AT_ONCE], GREEDY)
        captions += [found[0].text for found in part]
    return captions


def cycle_cider(captions: list[str], dataset: ImageTextDataset) -> np.ndarray:
    """CIDEr of each caption against the human captions of its prompt's photo: (n, 1)."""
    hypotheses = dict(zip(dataset.ids, captions, strict=True))
    references = {example.id: list(example.captions) for example in dataset.examples}
    scores = caption_metrics(hypotheses, references, backend="python", metrics=("CIDEr",))
    rows = {name: row for row, name in enumerate(scores.ids)}  # they come sorted
    return scores.statistics["CIDEr"][[rows[name] for name in dataset.ids]]


def prompt_hits(judge: Pipeline, images: Tensor, prompts: list[str]) -> np.ndarray | None:
    """Whether each picture's own prompt is among the ten that the judge's codes are nearest to: (n, 1).

    None where the judge's codes are not aligned with text.
    """
    if NUM_LEVELS not in judge.tokenizer.aligned_levels.values():
        return None
    ids = judge.encode(pictures_of(images))
    scores = alignment_scores(judge.tokenizer, ids, judge.alignment_encoder.encode(prompts))
    ranks = image_to_text_ranks(scores, torch.arange(len(prompts)))
    return (ranks < RANK).double().cpu().numpy()[:, None]


def judged(
    judge: Pipeline, images: Tensor, dataset: ImageTextDataset
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Scores a picture by metric, (n, 1) each, and the same with every picture given the next one's
    prompt."""
    captions = cycle_captions(judge, images)
    prompts = [example.captions[0] for example in dataset.examples]
    scores = {"cycle_CIDEr": cycle_cider(captions, dataset)}
    shuffled = {"cycle_CIDEr": float(cycle_cider([*captions[1:], captions[0]], dataset).mean())}
    hits = prompt_hits(judge, images, prompts)
    shuffled_hits = prompt_hits(judge, images.roll(1, dims=0), prompts)
    if hits is not None and shuffled_hits is not None:
        scores[f"prompt_R@{RANK}"] = hits
        shuffled[f"prompt_R@{RANK}"] = float(shuffled_hits.mean())
    return scores, shuffled


def nearest_training_images(pipeline: Pipeline, images: Tensor, training: ImageTextDataset) -> Image.Image:
    """Generated pictures above the training photos whose codes are nearest, position by position.

    Shows photos of the dataset: not for publication.

    Args:
        images: (n, 3, S, S) uint8.
        training: the split that the generator learned from.
    """
    tokenizer, size = pipeline.tokenizer, images.shape[-1]
    wanted = tokenizer.quantizer.lookup(pipeline.encode(pictures_of(images)).flatten(1)).flatten(1)
    best = [(-np.inf, 0)] * len(images)
    pairs = tqdm(readable_images(training), total=len(training), desc="nearest training images", disable=None)
    for index, photo in pairs:
        ids = pipeline.encode([photo]).flatten(1)
        nearness = (wanted @ tokenizer.quantizer.lookup(ids).flatten(1).T)[:, 0].tolist()
        best = [max(old, (new, index)) for old, new in zip(best, nearness, strict=True)]
    photos = torch.stack([to_pixels(training.load_image(index), size) for _, index in best])
    return grid(pictures_of(images) + pictures_of(photos), columns=len(images))
