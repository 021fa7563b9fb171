"""What codes say about a dataset: captions that do not fit their image, and images that are nearly the same.

Shapes: n images, m captions, R references, N tokens an image, E code width, M text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .model import TAVQTokenizer
from .retrieval import alignment_scores

REFERENCES = 1000
ROWS_AT_ONCE = 512


@torch.inference_mode()
def caption_fit(
    tokenizer: TAVQTokenizer, ids: Tensor, vectors: Tensor, image_of: Tensor, seed: int = 0
) -> Tensor:
    """Measure how well each caption fits its image, against a thousand other images and captions.

    The alignment score of the pair is standardised twice: over the scores of the caption with other images,
    and over those of the image with other captions, since some captions and some images fit anything.

    Args:
        tokenizer: aligned with text.
        ids: (n, N) int64.
        vectors: (m, M), unit length.
        image_of: (m,) int64, the image that each caption belongs to.
        seed: of the choice of references.

    Returns:
        (m,) float32, the mean of both, in standard deviations; what fits worst is least.
    """
    rng = torch.Generator().manual_seed(seed)
    images = torch.randperm(len(ids), generator=rng)[:REFERENCES]
    captions = torch.randperm(len(vectors), generator=rng)[:REFERENCES]
    by_caption = _mean_and_spread(
        [alignment_scores(tokenizer, ids[images], part).T for part in vectors.split(ROWS_AT_ONCE)]
    )
    by_image = _mean_and_spread(
        [alignment_scores(tokenizer, part, vectors[captions]) for part in ids.split(ROWS_AT_ONCE)]
    )
    own = torch.cat(
        [
            alignment_scores(tokenizer, ids[image].unsqueeze(0), vectors[image_of == image])[0]
            for image in range(len(ids))
        ]
    )
    order = torch.cat([(image_of == image).nonzero()[:, 0] for image in range(len(ids))])
    scores = torch.empty_like(own)
    scores[order] = own
    among_images = (scores - by_caption[:, 0]) / by_caption[:, 1]
    among_captions = (scores - by_image[image_of, 0]) / by_image[image_of, 1]
    return ((among_images + among_captions) / 2).cpu()


def _mean_and_spread(scores: Sequence[Tensor]) -> Tensor:
    """Rows of scores (., R) -> (rows, 2)."""
    rows = torch.cat(list(scores))
    return torch.stack([rows.mean(dim=1), rows.std(dim=1).clamp_min(1e-6)], dim=1)


def sibling_agreement(vectors: Tensor, image_of: Tensor) -> Tensor:
    """Cosine of each caption to the mean of its image's other captions, standardised over all captions.

    Args:
        vectors: (m, M), unit length.
        image_of: (m,) int64.

    Returns:
        (m,) float32; 0, the mean, where an image has one caption alone.
    """
    count = int(image_of.max()) + 1
    totals = torch.zeros(count, vectors.shape[1]).index_add_(0, image_of, vectors)
    numbers = torch.bincount(image_of, minlength=count)[image_of]
    cosine = (normalize(totals[image_of] - vectors, dim=1) * vectors).sum(dim=1)
    has_siblings = numbers > 1
    result = torch.zeros(len(vectors))
    if int(has_siblings.sum()) > 1:
        known = cosine[has_siblings]
        result[has_siblings] = (known - known.mean()) / known.std().clamp_min(1e-6)
    return result


@torch.inference_mode()
def near_duplicates(tokenizer: TAVQTokenizer, ids: Tensor, threshold: float) -> list[tuple[int, int, float]]:
    """Find pairs of images whose codes agree, position by position.

    Args:
        tokenizer: gives the codes.
        ids: (n, N) int64.
        threshold: least mean cosine of the codes at the same position, less the mean code of all images
            there.

    Returns:
        (index, larger index, similarity), most alike first.
    """
    codes = tokenizer.quantizer.lookup(ids).flatten(1).float().cpu()
    features = normalize(codes - codes.mean(dim=0), dim=1)
    pairs = []
    for start in range(0, len(features), ROWS_AT_ONCE):
        similarity = features[start : start + ROWS_AT_ONCE] @ features.T
        later = torch.arange(len(features)) > torch.arange(start, start + len(similarity))[:, None]
        for row, column in ((similarity >= threshold) & later).nonzero().tolist():
            pairs.append((start + row, column, float(similarity[row, column])))
    return sorted(pairs, key=lambda pair: -pair[2])
