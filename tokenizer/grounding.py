"""Does an image show what a text names? By alignment, against other images."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from tavq.alignment.units import split_units
from tavq.data.dataset import ImageTextDataset, readable_images
from tavq.data.images import to_tensor

from .heatmaps import check_aligned
from .model import TAVQTokenizer
from .retrieval import alignment_scores, text_encoder_of

REFERENCE_IMAGES = 256


class Grounding:
    """Compares the phrases of a text with its image and with other images.

    Args:
        tokenizer: aligned with text.
        dataset: some of its images, spread evenly, are the other images.
    """

    def __init__(self, tokenizer: TAVQTokenizer, dataset: ImageTextDataset):
        check_aligned(tokenizer)
        self.tokenizer = tokenizer
        self.encoder = text_encoder_of(tokenizer)
        step = max(1, len(dataset) // REFERENCE_IMAGES)
        some = ImageTextDataset(dataset.name, dataset.examples[::step][:REFERENCE_IMAGES])
        self.others = torch.cat([self._ids(image) for _, image in readable_images(some)])

    def __call__(self, image: Image.Image, text: str) -> dict[str, float]:
        """Return for each phrase the share of other images that it fits less than `image`."""
        phrases = list(split_units(text).phrases)
        if not phrases:
            return {}
        ids = torch.cat([self._ids(image), self.others])
        scores = alignment_scores(self.tokenizer, ids, self.encoder.encode(phrases))
        shares = (scores[0] > scores[1:]).float().mean(dim=0)
        return dict(zip(phrases, shares.tolist(), strict=True))

    def _ids(self, image: Image.Image) -> Tensor:
        pixels = to_tensor(image, self.tokenizer.image_size_px).unsqueeze(0)
        return self.tokenizer.encode(pixels.to(self.tokenizer.codebook.device))
