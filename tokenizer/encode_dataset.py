"""Encode the images of a dataset once, with mirrored and cropped variants, into shards of ids from which
generator and captioner train.

Shapes: n images, V variants of an image, H W image size in px, h w token grid.
"""

from __future__ import annotations

import collections
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
from tavq.data.dataset import ImageTextDataset, check_unreadable, readable_images
from tavq.data.images import UnreadableImageError, to_tensor
from tavq.data.keep import keep_only
from tavq.data.layouts import open_dataset
from tavq.data.token_writer import IMAGES_PER_SHARD, unfinished_tokens
from tavq.data.tokens import TokenMeta, TokenRecord, TokenSet

from .model import TAVQTokenizer
from .run_config import TokenizeRun
from .training_images import SMALLEST_CROP

IMAGES_AT_ONCE = 32
EncodedRange = tuple[dict[int, np.ndarray], dict[int, str]]
EncodeRanges = Callable[[str, int], Iterable[EncodedRange]]
"""Name and length of a split -> its ranges in order, as `encode_range` returns them."""


def encode_dataset(
    run: TokenizeRun, images_per_shard: int = IMAGES_PER_SHARD, ranges: EncodeRanges | None = None
) -> None:
    """Encode the splits of a dataset into shards of ids. The same call resumes a stopped run.

    The result has the same bytes, whether or not a run was stopped on the way.

    Args:
        run: what to encode.
        images_per_shard: of each shard.
        ranges: computes what `encode_range` computes, elsewhere.
    """
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
    plan = {"crops": run.crops, "dataset": dataset.fingerprint()}
    with only_writer(run.out), unfinished_tokens(run.out, meta, plan, images_per_shard) as unfinished:
        for split in SPLITS:
            examples = dataset.select_split(split)
            if not len(examples):  # official COCO has no test split with captions
                continue
            done = find_done(examples, unfinished.finished(split))
            if ranges is None:
                records = encode_split(tokenizer, examples, split, run.crops, done)
            else:
                records = _gathered(ranges, examples, split, done)
            unfinished.write(records, {split: done.count})


def _gathered(
    ranges: EncodeRanges, dataset: ImageTextDataset, split: str, done: Done
) -> Iterator[TokenRecord]:
    """Yield the records of a split behind those of finished shards, encoded elsewhere."""
    reasons: list[str] = []
    for ids, unreadable in ranges(split, len(dataset)):
        reasons += [f"{dataset[index].id} ({reason})" for index, reason in unreadable.items()]
        yield from _records(dataset, split, ((i, ids_Vhw) for i, ids_Vhw in ids.items() if i >= done.next))
    check_unreadable(dataset.name, reasons, len(dataset))


@dataclasses.dataclass(frozen=True)
class Done:
    """What an earlier run has encoded of a split.

    Attributes:
        count: how many of its images.
        again: the last of them, whose batch was not full: it is encoded again as a whole, because what an
            image becomes may differ in the last bit with the images beside it.
        unreadable: the images that it left out.
        next: the first image that it did not come to.
    """

    count: int = 0
    again: tuple[int, ...] = ()
    unreadable: tuple[int, ...] = ()
    next: int = 0


def find_done(dataset: ImageTextDataset, tokens: TokenSet | None) -> Done:
    """Find the images of finished shards in their split.

    Raises:
        ValueError: the shards hold other images.
    """
    if tokens is None:
        return Done()
    encoded: collections.deque[int] = collections.deque(maxlen=IMAGES_AT_ONCE)
    unreadable: list[int] = []
    names = iter(tokens.names)
    name = next(names, None)
    for index, example in enumerate(dataset.examples):
        if name is None:
            break
        if example.id != name:
            unreadable.append(index)
            continue
        encoded.append(index)
        name = next(names, None)
    if name is not None:
        raise ValueError(f"the finished shards hold {name}, which is not among the images; remove them")

    following = encoded[-1] + 1
    begun = following // IMAGES_AT_ONCE if following < len(dataset) else -1
    again = tuple(index for index in encoded if index // IMAGES_AT_ONCE == begun)
    return Done(len(tokens), again, tuple(unreadable), following)


def encode_split(
    tokenizer: TAVQTokenizer, dataset: ImageTextDataset, split: str, crops: int, done: Done
) -> Iterator[TokenRecord]:
    """Encode what is left of a split. Only training images are cropped; the others have their mirror image
    alone."""
    records = _encode_from(tokenizer, dataset, split, crops_of(split, crops), done)
    return itertools.islice(records, len(done.again), None)


def crops_of(split: str, crops: int) -> int:
    """Return how many crops the images of a split have: those of training alone have some."""
    return crops if split == "train" else 0


def _encode_from(
    tokenizer: TAVQTokenizer, dataset: ImageTextDataset, split: str, crops: int, done: Done
) -> Iterator[TokenRecord]:
    # Unreadable images are tried again, so that the warning at the end names those of all runs.
    indices = itertools.chain(done.unreadable, done.again, range(done.next, len(dataset)))
    with Progress(total=len(dataset), initial=done.next, desc=f"tokenizing {split}", unit="image") as bar:
        readable = readable_images(dataset, indices=indices)
        # By their place among all images, not among the readable ones: so any part of the images has the
        # batches that it has in the whole.
        for _, group in itertools.groupby(readable, key=lambda found: found[0] // IMAGES_AT_ONCE):
            batch = []
            for index, image in group:
                if index < done.next and index not in done.again:
                    raise ValueError(
                        f"{dataset[index].id} could not be read before, and now it can; remove the "
                        "unfinished shards to begin anew"
                    )
                views = variants(image, tokenizer.image_size_px, crops, mixed_seed(index, crops))
                batch.append((index, views))
                bar.update(1)
            yield from _encode_batch(tokenizer, dataset, split, batch)


def encode_range(
    tokenizer: TAVQTokenizer, dataset: ImageTextDataset, crops: int, first: int, last: int
) -> EncodedRange:
    """Encode the images from `first` up to `last` of a split, as `encode_split` does in one go.

    Args:
        tokenizer: in eval mode.
        dataset: the split.
        crops: of each image.
        first: begins a batch.
        last: ends one, or the split.

    Returns:
        The ids (V, h, w) of each image by its index, and why an image could not be read.
    """
    ids: dict[int, np.ndarray] = {}
    unreadable: dict[int, str] = {}
    for start in range(first, last, IMAGES_AT_ONCE):
        batch = []
        for index in range(start, min(start + IMAGES_AT_ONCE, last)):
            try:
                image = dataset.load_image(index)
            except UnreadableImageError as error:
                unreadable[index] = str(error)
                continue
            batch.append((index, variants(image, tokenizer.image_size_px, crops, mixed_seed(index, crops))))
        if batch:
            ids |= dict(_ids_of_batch(tokenizer, batch))
    return ids, unreadable


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
    return _records(dataset, split, _ids_of_batch(tokenizer, batch))


def _ids_of_batch(
    tokenizer: TAVQTokenizer, batch: list[tuple[int, Tensor]]
) -> Iterator[tuple[int, np.ndarray]]:
    device = next(tokenizer.parameters()).device
    ids = tokenizer.encode(torch.cat([views for _, views in batch]).to(device))
    ids_nVhw = ids.unflatten(0, (len(batch), -1)).cpu().numpy()
    return zip((index for index, _ in batch), ids_nVhw, strict=True)


def _records(
    dataset: ImageTextDataset, split: str, encoded: Iterable[tuple[int, np.ndarray]]
) -> Iterator[TokenRecord]:
    for index, ids_Vhw in encoded:
        example = dataset[index]
        yield TokenRecord(example.id, split, ids_Vhw, example.captions, example.long_text)
