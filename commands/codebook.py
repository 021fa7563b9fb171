"""tavq codebook CHECKPOINT --data DIR [--out codebook.png]

Show a codebook: how much of it is in use, and for some codes the patches that use them and the words near
them.

Legend: n photos, N = h*w tokens a photo, K codes, V words.
"""

from __future__ import annotations

import collections
import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tyro.conf import Positional

from tavq.alignment.projections import NUM_LEVELS
from tavq.alignment.unit_index import units_of
from tavq.base.arguments import parse, run_main
from tavq.base.device import Device, choose_device
from tavq.base.files import atomic_write
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.examples import ImageTextDataset, readable_images
from tavq.data.images import to_tensor
from tavq.data.layouts import open_dataset
from tavq.tokenizer.health import code_use
from tavq.tokenizer.heatmaps import aligned_levels
from tavq.tokenizer.model import TAVQTokenizer
from tavq.tokenizer.retrieval import text_encoder_of

PATCH_PX, GAP_PX, LABEL_PX = 72, 3, 190
RARE_WORD = 3  # photos that must name a word, lest slips of the pen stand beside a code


@dataclasses.dataclass(frozen=True)
class CodebookRun:
    """Show a codebook: its use, and a sheet of codes with the patches that use them and the words nearest to
    them.

    The sheet shows photos of the data set, which are not yours to publish: do not commit it. Example: tavq
    codebook runs/mine/tokenizer --data flickr8k/ --out codebook.png
    """

    checkpoint: Positional[str]
    """Tokenizer: a directory or hf:OWNER/NAME."""
    data: str
    """Data set: a directory in any known layout, or `shapes`."""
    out: Path = Path("codebook.png")
    """The sheet."""
    split: str = "val"
    level: int = NUM_LEVELS
    """3: the tokens themselves; 1 and 2: the codes that words and phrases are aligned with."""
    codes: int = 16
    """Most used codes to show."""
    random_codes: int = 16
    """Further codes, drawn among those in use with --seed."""
    patches: int = 12
    """Patches a code, of different photos as far as there are."""
    words: int = 5
    """Words a code."""
    context: int = 2
    """Tokens around the patch that are shown with it; a frame marks the patch itself."""
    seed: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.level <= NUM_LEVELS:
            raise ValueError(f"level is {self.level}, expected 1, 2 or 3")
        if self.codes + self.random_codes < 1 or self.patches < 1 or min(self.context, self.words) < 0:
            raise ValueError("expected at least one code and one patch, and no negative --words or --context")


@dataclasses.dataclass(frozen=True)
class EncodedPhotos:
    """The ids of a split at one level."""

    rows: list[int]
    """Index of each photo in the data set."""
    ids: Tensor
    """(n, h, w) int64."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CodebookRun, argv, prog="tavq codebook")
    tokenizer = TAVQTokenizer.from_pretrained(run.checkpoint).to(choose_device(run.device))
    dataset = open_dataset(run.data, run.split)
    photos = encode_split(tokenizer, dataset, run.level)
    use = code_use(photos.ids, tokenizer.num_codes)
    print(
        f"usage {use.usage:.1%} ({use.dead} of {tokenizer.num_codes} codes dead), perplexity "
        f"{use.perplexity:.1f}, of {use.tokens:,} tokens of level {run.level} ({dataset.name} {run.split})"
    )
    counts = torch.bincount(photos.ids.flatten(), minlength=tokenizer.num_codes)
    codes = chosen_codes(counts, run.codes, run.random_codes, run.seed)
    words = near_words(tokenizer, dataset, photos, codes, run)
    for code in codes:
        print(f"code {code:5d}  {int(counts[code]):6d} times  {', '.join(words.get(code, ()))}")
    sheet = contact_sheet(dataset, photos, {c: (int(counts[c]), words.get(c, ())) for c in codes}, run)
    with atomic_write(run.out) as temporary:
        sheet.save(temporary, format="PNG")
    print(run.out)


def encode_split(tokenizer: TAVQTokenizer, dataset: ImageTextDataset, level: int) -> EncodedPhotos:
    """Encode every readable photo, one at a time."""
    device = next(tokenizer.parameters()).device
    rows, ids = [], []
    for row, image in readable_images(dataset):
        pixels = to_tensor(image, tokenizer.image_size_px).unsqueeze(0).to(device)
        rows.append(row)
        ids.append(tokenizer.encode_levels(pixels)[0, level - 1].cpu())
    return EncodedPhotos(rows, torch.stack(ids))


def chosen_codes(counts: Tensor, most_used: int, at_random: int, seed: int) -> list[int]:
    """The most used codes, then others in use, drawn with `seed`; counts (K,)."""
    used = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    rest = used[most_used:]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    return [*used[:most_used].tolist(), *rest[order[:at_random]].tolist()]


def near_words(
    tokenizer: TAVQTokenizer,
    dataset: ImageTextDataset,
    photos: EncodedPhotos,
    codes: Sequence[int],
    run: CodebookRun,
) -> dict[int, list[str]]:
    """For each code the nearest words among those of the data set; none where the level is not aligned."""
    if run.level not in aligned_levels(tokenizer).values():
        return {}
    named = collections.Counter(
        word for row in photos.rows for word in units_of(dataset[row].captions, dataset[row].long_text)[1]
    )
    words = sorted(word for word, count in named.items() if count >= RARE_WORD)
    device = next(tokenizer.parameters()).device
    vectors = EmbeddingCache(text_encoder_of(tokenizer)).encode(words).to(device)
    used = photos.ids.unique().to(device)
    found = nearest_words(tokenizer, codes, used, vectors, run.level, run.words)
    return {code: [words[place] for place in places] for code, places in found.items()}


@torch.inference_mode()
def nearest_words(
    tokenizer: TAVQTokenizer, codes: Sequence[int], used: Tensor, vectors: Tensor, level: int, count: int
) -> dict[int, list[int]]:
    """For each code the `count` words of largest cosine beyond that word's mean over the codes in `used`.

    Without the mean the same few words ("wear", "something") stand beside every code.

    Args:
        vectors: (V, D), unit length.
    """
    usual = (tokenizer.project(used, level) @ vectors.T).mean(dim=0)
    chosen = tokenizer.project(torch.tensor(codes, device=vectors.device), level) @ vectors.T - usual
    places = chosen.topk(min(count, len(vectors)), dim=1).indices.tolist()
    return dict(zip(codes, places, strict=True))


def contact_sheet(
    dataset: ImageTextDataset,
    photos: EncodedPhotos,
    labels: dict[int, tuple[int, Sequence[str]]],
    run: CodebookRun,
) -> Image.Image:
    """One row a code: its number, how often it occurs, the words near it, and patches that use it."""
    height = PATCH_PX + GAP_PX
    sheet = Image.new("RGB", (LABEL_PX + run.patches * height, len(labels) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (code, (count, words)) in enumerate(labels.items()):
        _write_label(pen, row * height, f"code {code}", f"{count:,} times", words)
        for column, (photo, y, x) in enumerate(occurrences(photos.ids, code, run.patches, run.seed)):
            image = dataset.load_image(photos.rows[photo])
            patch = patch_in_context(image, (y, x), photos.ids.shape[1:], run.context)
            sheet.paste(patch, (LABEL_PX + column * height, row * height))
    return sheet


def occurrences(ids: Tensor, code: int, count: int, seed: int) -> list[tuple[int, int, int]]:
    """Places (photo, y, x) of a code in ids (n, h, w), drawn with `seed`; a photo comes again only when all
    have come."""
    places = (ids == code).nonzero()
    places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))].tolist()
    seen: collections.Counter[int] = collections.Counter()
    turns = []
    for place in places:
        turns.append(seen[place[0]])
        seen[place[0]] += 1
    order = sorted(range(len(places)), key=turns.__getitem__)
    return [tuple(places[index]) for index in order[:count]]


def patch_in_context(
    photo: Image.Image, place: tuple[int, int], grid_size: Sequence[int], context: int
) -> Image.Image:
    """The token at `place` (y, x) framed in the part of a photo around it, `context` tokens on each side; at
    the photo's edge the part is shifted inwards."""
    side = min(2 * context + 1, *grid_size)
    top, left = (min(max(p - context, 0), n - side) for p, n in zip(place, grid_size, strict=True))
    cell_w, cell_h = photo.width / grid_size[1], photo.height / grid_size[0]
    part = (left * cell_w, top * cell_h, (left + side) * cell_w, (top + side) * cell_h)
    patch = photo.resize((PATCH_PX, PATCH_PX), Image.Resampling.LANCZOS, box=part)
    cell = PATCH_PX / side
    x, y = (place[1] - left) * cell, (place[0] - top) * cell
    pen = ImageDraw.Draw(patch)
    pen.rectangle((x - 1, y - 1, x + cell, y + cell), outline="black")  # the white one shows on snow, too
    pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline="white")
    return patch


def _write_label(pen: ImageDraw.ImageDraw, top: int, title: str, note: str, words: Sequence[str]) -> None:
    pen.text((4, top + 3), f"{title}  {note}", "black", ImageFont.load_default(12))
    text = textwrap.fill(", ".join(words), 30)
    pen.multiline_text((4, top + 20), text, (90, 90, 90), ImageFont.load_default(11), spacing=2)
