"""Fit the projections to text once more, to codes that no longer change.

While a tokenizer trains, the g_l chase codes that move. Afterwards they are fitted to the codes as they
are, by the very score that retrieval uses. Ids, codes and decoded images stay the same.

Shapes: n images, N tokens an image, K codes, B batch, M text width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from tavq.alignment.aligner import MAX_LOG_SCALE
from tavq.alignment.config import LEVEL_NAMES
from tavq.alignment.unit_index import UnitIndex
from tavq.base.processes import num_processes
from tavq.data.dataset import ImageTextDataset

from .model import TAVQTokenizer
from .retrieval import scores_of_codes
from .training_images import of_whole_split, shared_image_batches

BATCH = 128
LEARNING_RATE = 5e-3
WARMUP_STEPS = 20
INITIAL_LOG_SCALE = 3.0


def codes_of_images(tokenizer: TAVQTokenizer, dataset: ImageTextDataset) -> tuple[Tensor, list[int]]:
    """Ids of all levels of each image and of its mirror image (n, 2, 3, N) int32, and the images' indices.

    Each process encodes its share of the images, and gets what all have encoded.
    """
    device = tokenizer.codebook.device
    found: list[tuple[list[int], list[Tensor]]] = []
    with tqdm(total=len(dataset), desc="encoding", unit="image", disable=None) as bar:
        for (images,), batch_indices in shared_image_batches(dataset, tokenizer.image_size_px):
            images = images.to(device)
            views = [tokenizer.encode_levels(view).flatten(2) for view in (images, images.flip(-1))]
            found.append((batch_indices, [torch.stack(views, dim=1).to("cpu", torch.int32)]))
            bar.update(len(batch_indices) * num_processes())
    indices, (codes,) = of_whole_split(found)
    return codes, indices


@torch.inference_mode(False)
@torch.enable_grad()
def fit_projections(
    tokenizer: TAVQTokenizer,
    dataset: ImageTextDataset,
    texts: UnitIndex,
    levels: Mapping[int, int],
    steps: int,
    seed: int = 0,
    *,
    per_code_embedding: bool = True,
) -> None:
    """Fit the g_l of `tokenizer` to its codes, in place, by InfoNCE over the images of a batch.

    All processes fit the same, so that none waits for another.

    Args:
        tokenizer: nothing but its projections changes.
        dataset: a training split; images without a caption are encoded and never drawn as a pair.
        texts: its units.
        levels: words (1), phrases (2), sentences (3) -> the level they are compared with.
        steps: of `BATCH` images; a few hundred are enough.
        seed: of the order of images and units.
        per_code_embedding: whether each code learns a vector of its own, too.
    """
    rng = torch.Generator().manual_seed(seed)
    codes, indices = codes_of_images(tokenizer.eval().requires_grad_(False), dataset)
    examples = torch.tensor(indices)
    device = tokenizer.codebook.device
    log_scale = nn.Parameter(torch.full((len(LEVEL_NAMES),), INITIAL_LOG_SCALE, device=device))
    tokenizer.projections.requires_grad_(True).per_code_embedding.requires_grad_(per_code_embedding)
    learned = [parameter for parameter in tokenizer.projections.parameters() if parameter.requires_grad]
    parameters = [*learned, log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    for step in tqdm(range(steps), desc="fitting g", unit="step", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / WARMUP_STEPS, 1 - step / steps)
        batch = torch.randperm(len(examples), generator=rng)[:BATCH]
        views = torch.randint(2, (len(batch),), generator=rng)

        losses = []
        for kind, level in levels.items():
            # One unit of each text: more would count texts by their length.
            unit_rows, mask = texts.sample_rows(examples[batch], kind, rng, 1)
            present = mask[:, 0]
            if int(present.sum()) < 2:  # such as phrases of captions that have none
                continue
            unit_rows = unit_rows[present, 0]
            ids = codes[batch, views, level - 1][present].long().to(device)
            scores = _scores(tokenizer, ids, texts.vectors_of(unit_rows).to(device), level)

            # Another image with the same unit, such as "dog", is no negative.
            same = (unit_rows[:, None] == unit_rows).fill_diagonal_(False).to(device)
            logits = log_scale[kind - 1].clamp(max=MAX_LOG_SCALE).exp() * scores
            losses.append(_info_nce(logits.masked_fill(same, -math.inf)))

        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    tokenizer.projections.requires_grad_(False)


def _scores(tokenizer: TAVQTokenizer, ids_BN: Tensor, vectors_BM: Tensor, level: int) -> Tensor:
    every_code = torch.arange(tokenizer.num_codes, device=ids_BN.device)
    projected_KM = tokenizer.project(every_code, level)
    return scores_of_codes(projected_KM, ids_BN, vectors_BM, tokenizer.config.transport_temperature)


def _info_nce(logits_BB: Tensor) -> Tensor:
    labels = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, labels) + F.cross_entropy(logits_BB.T, labels)) / 2
