"""Encode the images of a dataset once, with mirrored and cropped variants, into shards of ids from which
generator and captioner train.

Shapes: n images, V variants of an image, H W image size in px, h w token grid.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

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
from tavq.data.dataset import ImageTextDataset, UnreadableImages, tried_images
from tavq.data.images import UnreadableImageError, to_tensor
from tavq.data.keep import keep_only
from tavq.data.layouts import open_dataset
from tavq.data.token_writer import IMAGES_PER_SHARD, unfinished_tokens
from tavq.data.tokens import TokenMeta, TokenRecord, TokenSet

from .foreign import ForeignTokenizer, open_tokenizer
from .model import TAVQTokenizer
from .run_config import TokenizeRun
from .training_images import SMALLEST_CROP

IMAGES_AT_ONCE = 32
Encoded = tuple[int, np.ndarray | str]
"""Index of an image in its split, and its ids (V, h, w), or why it cannot be read."""
EncodeSplit = Callable[[str, int, int], Iterable[Encoded]]
"""Name of a split, the first image of a batch, the number of all images -> what `encode_range` yields."""


def encode_dataset(
    run: TokenizeRun, images_per_shard: int = IMAGES_PER_SHARD, encode: EncodeSplit | None = None
) -> None:
    """Encode the splits of a dataset into shards of ids. The same call resumes a stopped run.

    The result has the same bytes, whether or not a run was stopped on the way.

    Args:
        run: what to encode.
        images_per_shard: of each shard.
        encode: encodes elsewhere; by default this process does.
    """
    tokenizer = open_tokenizer(run.checkpoint, run.image_size_px).to(choose_device(run.device))
    dataset = keep_only(open_dataset(run.data), run.keep)
    meta = TokenMeta(
        num_codes=tokenizer.num_codes,
        grid_size=tokenizer.grid_size,
        codebook_hash=tokenizer.codebook_hash,
        tokenizer=weights_hash(tokenizer, run.checkpoint),
        data=dataset.name,
        image_size_px=tokenizer.image_size_px,
    )
    plan = {"crops": run.crops, "dataset": dataset.fingerprint()}
    with only_writer(run.out), unfinished_tokens(run.out, meta, plan, images_per_shard) as unfinished:
        for split in SPLITS:
            examples = dataset.select_split(split)
            if not len(examples):  # official COCO has no test split with captions
                continue
            done = find_done(examples, unfinished.finished(split))
            first = done.next // IMAGES_AT_ONCE * IMAGES_AT_ONCE
            encoded: Iterable[Encoded]
            if encode is None:
                crops = crops_of(split, run.crops)
                encoded = encode_range(tokenizer, examples, crops, first, len(examples))
            else:
                encoded = encode(split, first, len(examples))
            unfinished.write(_records(examples, split, done, first, encoded), {split: done.count})


def weights_hash(tokenizer: TAVQTokenizer, source: str) -> str:
    """Names the weights of a tokenizer that was opened from `source`."""
    if isinstance(tokenizer, ForeignTokenizer):  # which may come from a function instead of a file
        return tokenizer.weights_hash
    return file_hash(local_directory(source) / WEIGHTS_FILE)


def _records(
    dataset: ImageTextDataset, split: str, done: Done, first: int, encoded: Iterable[Encoded]
) -> Iterator[TokenRecord]:
    """Yield the records of a split that finished shards do not hold.

    Args:
        dataset: the split.
        split: its name.
        done: what finished shards hold.
        first: image from which on `encoded` holds all.
        encoded: the images in order. Those of a batch that was begun are encoded again, because what an image
            becomes may differ in the last bit with the images beside it.
    """
    unreadable = UnreadableImages(dataset.name, len(dataset))
    # Tried again, so that the warning at the end names the unreadable images of all runs.
    again = _tried_again(dataset, [index for index in done.unreadable if index < first])
    with Progress(total=len(dataset), initial=done.next, desc=f"tokenizing {split}", unit="image") as bar:
        for index, ids_Vhw in itertools.chain(again, encoded):
            example = dataset[index]
            if isinstance(ids_Vhw, str):
                unreadable.add(example.id, ids_Vhw)
            elif index in done.unreadable:
                raise ValueError(
                    f"{example.id} could not be read before, and now it can; remove the unfinished shards to "
                    "begin anew"
                )
            elif index >= done.next:
                yield TokenRecord(example.id, split, ids_Vhw, example.captions, example.long_text)
                bar.update(1)
    unreadable.warn(len(dataset))


def _tried_again(dataset: ImageTextDataset, indices: Iterable[int]) -> Iterator[Encoded]:
    for index, image in tried_images(dataset, indices):
        yield index, str(image) if isinstance(image, UnreadableImageError) else np.empty(0)


@dataclasses.dataclass(frozen=True)
class Done:
    """What an earlier run has encoded of a split.

    Attributes:
        count: how many of its images.
        unreadable: the images that it left out.
        next: the first image that it did not come to.
    """

    count: int = 0
    unreadable: frozenset[int] = frozenset()
    next: int = 0


def find_done(dataset: ImageTextDataset, tokens: TokenSet | None) -> Done:
    """Find the images of finished shards in their split.

    Raises:
        ValueError: the shards hold other images.
    """
    if tokens is None:
        return Done()
    unreadable: list[int] = []
    following = 0
    names = iter(tokens.names)
    name = next(names, None)
    for index, example in enumerate(dataset.examples):
        if name is None:
            break
        if example.id != name:
            unreadable.append(index)
            continue
        following = index + 1
        name = next(names, None)
    if name is not None:
        raise ValueError(f"the finished shards hold {name}, which is not among the images; remove them")
    return Done(len(tokens), frozenset(unreadable), following)


def crops_of(split: str, crops: int) -> int:
    """Return how many crops the images of a split have: those of training alone have some."""
    return crops if split == "train" else 0


def encode_range(
    tokenizer: TAVQTokenizer, dataset: ImageTextDataset, crops: int, first: int, last: int
) -> Iterator[Encoded]:
    """Encode the images from `first` up to `last` of a split, batch by batch.

    Args:
        tokenizer: in eval mode.
        dataset: the split.
        crops: of each image.
        first: begins a batch.
        last: ends one, or the split.
    """
    # By their place among all images, not among the readable ones: so any part of the images has the
    # batches that it has in the whole.
    for start in range(first, last, IMAGES_AT_ONCE):
        batch = []
        for index, image in tried_images(dataset, range(start, min(start + IMAGES_AT_ONCE, last))):
            if isinstance(image, UnreadableImageError):
                yield index, str(image)
                continue
            batch.append((index, variants(image, tokenizer.image_size_px, crops, mixed_seed(index, crops))))
        if batch:
            yield from _encode_batch(tokenizer, batch)


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


def _encode_batch(tokenizer: TAVQTokenizer, batch: list[tuple[int, Tensor]]) -> Iterator[Encoded]:
    device = next(tokenizer.parameters()).device
    ids = tokenizer.encode(torch.cat([views for _, views in batch]).to(device))
    ids_nVhw = ids.unflatten(0, (len(batch), -1)).cpu().numpy()
    return zip((index for index, _ in batch), ids_nVhw, strict=True)
