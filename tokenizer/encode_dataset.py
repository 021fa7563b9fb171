"""Encode the images of a dataset once, with mirrored and cropped variants, into shards of ids from which
generator and captioner train.

Shapes: n images, V variants of an image, H W image size in px, h w token grid.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tavq.base.device import choose_device
from tavq.base.files import file_hash
from tavq.base.locks import only_writer
from tavq.base.progress import Progress
from tavq.base.seeding import mixed_seed
from tavq.base.weights import WEIGHTS_FILE, local_directory
from tavq.data.config import SPLITS
from tavq.data.dataset import ImageTextDataset, readable_images
from tavq.data.images import to_tensor
from tavq.data.keep import keep_only
from tavq.data.layouts import open_dataset
from tavq.data.tokens import TokenMeta, TokenRecord, write_tokens

from .model import TAVQTokenizer
from .run_config import TokenizeRun
from .training_images import SMALLEST_CROP

IMAGES_AT_ONCE = 32


def encode_dataset(run: TokenizeRun) -> None:
    """Encode the splits of a dataset into shards of ids."""
    directory = local_directory(run.checkpoint)
    tokenizer = TAVQTokenizer.from_pretrained(directory).to(choose_device(run.device))
    dataset = keep_only(open_dataset(run.data), run.keep)
    meta = TokenMeta(
        num_codes=tokenizer.num_codes,
        grid_size=tokenizer.grid_size,
        codebook_hash=tokenizer.codebook_hash,
        tokenizer=file_hash(directory / WEIGHTS_FILE),
        data=dataset.name,
        image_size_px=tokenizer.image_size_px,
    )
    splits = {split: dataset.select_split(split) for split in SPLITS}
    records = (
        record
        for split, examples in splits.items()
        if len(examples)
        for record in encode_split(tokenizer, examples, split, run.crops)
    )
    with only_writer(run.out):
        write_tokens(run.out, records, meta)


def encode_split(
    tokenizer: TAVQTokenizer, dataset: ImageTextDataset, split: str, crops: int
) -> Iterator[TokenRecord]:
    """Encode a split. Only training images are cropped; the others have their mirror image alone."""
    crops = crops if split == "train" else 0
    batch: list[tuple[int, Tensor]] = []
    with Progress(total=len(dataset), desc=f"tokenizing {split}", unit="image") as bar:
        for index, image in readable_images(dataset):
            views = variants(image, tokenizer.image_size_px, crops, mixed_seed(index, crops))
            batch.append((index, views))
            bar.update(1)
            if len(batch) == IMAGES_AT_ONCE:
                yield from _encode_batch(tokenizer, dataset, split, batch)
                batch = []
        if batch:
            yield from _encode_batch(tokenizer, dataset, split, batch)


def variants(image: Image.Image, size_px: int, crops: int, seed: int) -> Tensor:
    """Return an image, its mirror image, and random crops: (2 + crops, 3, size_px, size_px) in [-1, 1]."""
    whole = to_tensor(image, size_px)
    views = [whole, whole.flip(-1)]
    rng = np.random.default_rng(seed)
    for number in range(crops):
        width, height = (round(side * rng.uniform(SMALLEST_CROP, 1)) for side in image.size)
        left = int(rng.integers(image.width - width + 1))
        top = int(rng.integers(image.height - height + 1))
        view = to_tensor(image.crop((left, top, left + width, top + height)), size_px)
        views.append(view.flip(-1) if number % 2 else view)
    return torch.stack(views)


def _encode_batch(
    tokenizer: TAVQTokenizer, dataset: ImageTextDataset, split: str, batch: list[tuple[int, Tensor]]
) -> Iterator[TokenRecord]:
    device = next(tokenizer.parameters()).device
    ids = tokenizer.encode(torch.cat([views for _, views in batch]).to(device))
    ids_nVhw = ids.unflatten(0, (len(batch), -1)).cpu().numpy()
    for (index, _), ids_Vhw in zip(batch, ids_nVhw, strict=True):
        example = dataset[index]
        yield TokenRecord(example.id, split, ids_Vhw, example.captions, example.long_text)
