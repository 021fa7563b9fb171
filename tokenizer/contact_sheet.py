"""The sheet of `tavq codebook`: how much of a codebook is in use, and for some codes the patches that use
them and the words near them.

Shapes: n images, h w token grid, K codes, V words, D text width.
"""

from __future__ import annotations

import collections
import dataclasses
import textwrap
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tavq.alignment.units import units_of
from tavq.base.arguments import print_json
from tavq.base.device import choose_device
from tavq.data.dataset import ImageTextDataset, readable_images
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.images import to_tensor, write_png
from tavq.data.layouts import open_dataset

from .codebook_usage import codebook_usage
from .model import TAVQTokenizer
from .retrieval import text_encoder_of
from .run_config import CodebookRun

PATCH_PX = 72
GAP_PX = 3
LABEL_PX = 190
MIN_IMAGES_PER_WORD = 3  # the captions of so many images must have a word; this leaves misspellings out


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
    """The ids of a split at one level."""

    indices: list[int]
    """Index of each image in the dataset."""
    ids: Tensor
    """(n, h, w) int64."""


def show_codebook(run: CodebookRun) -> None:
    """Print the use of a codebook, and write the sheet of codes."""
    tokenizer = TAVQTokenizer.from_pretrained(run.checkpoint).to(choose_device(run.device))
    dataset = open_dataset(run.data, run.split)
    encoded = encode_split(tokenizer, dataset, run.level)
    use = codebook_usage(encoded.ids, tokenizer.num_codes)
    counts = torch.bincount(encoded.ids.flatten(), minlength=tokenizer.num_codes)
    codes = select_codes(counts, run.codes, run.random_codes, run.seed)
    words = words_of_codes(tokenizer, dataset, encoded, codes, run)
    labels = {code: (int(counts[code]), words.get(code, ())) for code in codes}
    write_png(contact_sheet(dataset, encoded, labels, run), run.out)

    if run.json:
        rows = [{"code": code, "count": n, "words": list(near)} for code, (n, near) in labels.items()]
        print_json({"file": str(run.out), **dataclasses.asdict(use), "codes": rows})
        return
    print(
        f"usage {use.usage:.1%} ({use.dead} of {tokenizer.num_codes} codes dead), perplexity "
        f"{use.perplexity:.1f}, of {use.tokens:,} tokens of level {run.level} ({dataset.name} {run.split})"
    )
    for code, (count, near) in labels.items():
        print(f"code {code:5d}  {count:6d} times  {', '.join(near)}")
    print(run.out)


def encode_split(tokenizer: TAVQTokenizer, dataset: ImageTextDataset, level: int) -> EncodedSplit:
    """Encode every readable image, one at a time."""
    device = next(tokenizer.parameters()).device
    indices: list[int] = []
    ids: list[Tensor] = []
    for index, image in readable_images(dataset):
        pixels = to_tensor(image, tokenizer.image_size_px).unsqueeze(0).to(device)
        indices.append(index)
        ids.append(tokenizer.encode_levels(pixels)[0, level - 1].cpu())
    return EncodedSplit(indices, torch.stack(ids))


def select_codes(counts: Tensor, most_used: int, at_random: int, seed: int) -> list[int]:
    """Return the most used codes, then others in use, sampled with `seed`; counts (K,)."""
    used = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    others = used[most_used:]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    return [*used[:most_used].tolist(), *others[order[:at_random]].tolist()]


def words_of_codes(
    tokenizer: TAVQTokenizer,
    dataset: ImageTextDataset,
    encoded: EncodedSplit,
    codes: Sequence[int],
    run: CodebookRun,
) -> dict[int, list[str]]:
    """Return for each code the nearest words among those of the dataset; none for a level without text."""
    if run.level not in tokenizer.aligned_levels.values():
        return {}
    image_counts = collections.Counter(
        word
        for index in encoded.indices
        for word in units_of(dataset[index].captions, dataset[index].long_text)[1]
    )
    words = sorted(word for word, count in image_counts.items() if count >= MIN_IMAGES_PER_WORD)
    device = next(tokenizer.parameters()).device
    vectors = EmbeddingCache(text_encoder_of(tokenizer)).encode(words).to(device)
    used = encoded.ids.unique().to(device)
    nearest = nearest_words(tokenizer, codes, used, vectors, run.level, run.words)
    return {code: [words[number] for number in numbers] for code, numbers in nearest.items()}


@torch.inference_mode()
def nearest_words(
    tokenizer: TAVQTokenizer, codes: Sequence[int], used: Tensor, vectors: Tensor, level: int, count: int
) -> dict[int, list[int]]:
    """Return for each code the `count` words of largest cosine, less that word's mean over the codes in use.

    Without the mean the same few words ("wear", "something") would stand beside every code.

    Args:
        used: the codes in use, int64.
        vectors: (V, D), unit length.
    """
    mean_V = (tokenizer.project(used, level) @ vectors.T).mean(dim=0)
    projected = tokenizer.project(torch.tensor(codes, device=vectors.device), level)
    scores = projected @ vectors.T - mean_V
    numbers = scores.topk(min(count, len(vectors)), dim=1).indices.tolist()
    return dict(zip(codes, numbers, strict=True))


def contact_sheet(
    dataset: ImageTextDataset,
    encoded: EncodedSplit,
    labels: Mapping[int, tuple[int, Sequence[str]]],
    run: CodebookRun,
) -> Image.Image:
    """Draw one row per code: its number, its count, the words near it, and patches that use it.

    Args:
        labels: code -> (count, words).
    """
    pitch = PATCH_PX + GAP_PX
    sheet = Image.new("RGB", (LABEL_PX + run.patches * pitch, len(labels) * pitch), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (code, (count, words)) in enumerate(labels.items()):
        _write_label(pen, row * pitch, f"code {code}", f"{count:,} times", words)
        for column, (number, y, x) in enumerate(occurrences(encoded.ids, code, run.patches, run.seed)):
            image = dataset.load_image(encoded.indices[number])
            patch = patch_in_context(image, (y, x), encoded.ids.shape[1:], run.context)
            sheet.paste(patch, (LABEL_PX + column * pitch, row * pitch))
    return sheet


def occurrences(ids: Tensor, code: int, count: int, seed: int) -> list[tuple[int, int, int]]:
    """Sample `count` positions (image, y, x) of a code in ids (n, h, w).

    No image comes a second time before every image that has the code has come once.
    """
    positions = (ids == code).nonzero()
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
    shuffled = [tuple(position) for position in positions[order].tolist()]

    seen: collections.Counter[int] = collections.Counter()
    repetitions = []  # how often the image of each position has come before
    for image, _, _ in shuffled:
        repetitions.append(seen[image])
        seen[image] += 1
    by_repetition = sorted(range(len(shuffled)), key=repetitions.__getitem__)
    return [shuffled[number] for number in by_repetition[:count]]


def patch_in_context(
    image: Image.Image, position: tuple[int, int], grid_size: Sequence[int], context: int
) -> Image.Image:
    """Cut out the token at `position` (y, x) with `context` tokens on each side, and frame the token.

    At the edge of the image the part is shifted inwards.
    """
    side = min(2 * context + 1, *grid_size)
    top, left = (min(max(p - context, 0), n - side) for p, n in zip(position, grid_size, strict=True))
    cell_width = image.width / grid_size[1]
    cell_height = image.height / grid_size[0]
    box = (left * cell_width, top * cell_height, (left + side) * cell_width, (top + side) * cell_height)
    patch = image.resize((PATCH_PX, PATCH_PX), Image.Resampling.LANCZOS, box=box)

    cell = PATCH_PX / side
    x = (position[1] - left) * cell
    y = (position[0] - top) * cell
    pen = ImageDraw.Draw(patch)
    # Black outside, white inside: one of the two can be seen on any image.
    pen.rectangle((x - 1, y - 1, x + cell, y + cell), outline="black")
    pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline="white")
    return patch


def _write_label(pen: ImageDraw.ImageDraw, top: int, title: str, note: str, words: Sequence[str]) -> None:
    pen.text((4, top + 3), f"{title}  {note}", "black", ImageFont.load_default(12))
    text = textwrap.fill(", ".join(words), 30)
    pen.multiline_text((4, top + 20), text, (90, 90, 90), ImageFont.load_default(11), spacing=2)
