"""tavq blind TOKENIZER TOKENIZER --data DIR [--split val] [--out blind]

Lay the reconstructions of two tokenizers side by side in random order, so that somebody writes down what they
see before they know which is which. Frechet distances run ahead of the eye.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from tavq.base.device import choose_device
from tavq.base.files import atomic_write, file_hash
from tavq.base.weights import WEIGHTS_FILE, local_directory
from tavq.data.dataset import ImageTextDataset, readable_images
from tavq.data.images import grid, squash, to_pil, to_tensor, write_png
from tavq.data.layouts import open_dataset
from tavq.eval.config import BlindRun
from tavq.tokenizer.model import TAVQTokenizer

KEY_FILE = "key.json"
SIDES = ("left", "right")
ROWS_A_SHEET = 10
ROWS_SIDE_BY_SIDE = 2
MIN_CELL_PX = 192


def make_sheets(run: BlindRun) -> None:
    """Write the sheets and the key."""
    key_path = run.out / KEY_FILE
    if key_path.exists():
        raise FileExistsError(f"{key_path} is the key of sheets made before; name another folder with --out")
    weights = {source: file_hash(local_directory(source) / WEIGHTS_FILE) for source in run.tokenizers}
    if len(set(weights.values())) < 2:
        raise ValueError(f"{' and '.join(run.tokenizers)} have the same weights; name two that differ")
    device = choose_device(run.device)
    tokenizers = {source: TAVQTokenizer.from_pretrained(source).to(device) for source in weights}

    dataset = chosen_images(open_dataset(run.data, run.split), run.images, run.seed)
    cell_px = max(MIN_CELL_PX, *(tokenizer.decode_size_px for tokenizer in tokenizers.values()))
    key: list[dict[str, str | int]] = []
    cells: list[Image.Image] = []
    for index, image in readable_images(dataset):
        sources = list(run.tokenizers)
        if secrets.randbelow(2):
            sources.reverse()
        key.append({"row": len(key) + 1, "id": dataset.ids[index], **dict(zip(SIDES, sources, strict=True))})
        cells.append(numbered(squash(image, cell_px), len(key)))
        cells += [squash(reconstruction(tokenizers[source], image), cell_px) for source in sources]

    for number, sheet in enumerate(sheets(cells), start=1):
        path = run.out / f"sheet{number}.png"
        write_png(sheet, path)
        print(path)
    with atomic_write(key_path) as temporary:
        fields = {
            "tokenizers": weights,
            "data": dataset.name,
            "split": run.split,
            "seed": run.seed,
            "rows": key,
        }
        temporary.write_text(json.dumps(fields, indent=1) + "\n")
    print(f"{key_path}: open it when you have written down what you see in each row")


def chosen_images(dataset: ImageTextDataset, count: int, seed: int) -> ImageTextDataset:
    """`count` examples of a dataset, in random order."""
    if count > len(dataset):
        raise ValueError(f"{count} images are asked for and the split has {len(dataset)}; ask for fewer")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return ImageTextDataset(dataset.name, [dataset[index] for index in order[:count].tolist()])


@torch.inference_mode()
def reconstruction(tokenizer: TAVQTokenizer, image: Image.Image) -> Image.Image:
    """Encode and decode one image; it comes back square, at the tokenizer's `decode_size_px`."""
    device = next(tokenizer.parameters()).device
    tensor = to_tensor(image, tokenizer.image_size_px).unsqueeze(0).to(device)
    return to_pil(tokenizer.decode(tokenizer.encode(tensor)))[0]


def numbered(image: Image.Image, number: int) -> Image.Image:
    """A copy with a number in its corner."""
    labelled = image.copy()
    draw = ImageDraw.Draw(labelled)
    font = ImageFont.load_default(size=16)
    box = draw.textbbox((4, 2), str(number), font=font)
    draw.rectangle((0, 0, box[2] + 4, box[3] + 4), fill="white")
    draw.text((4, 2), str(number), fill="black", font=font)
    return labelled


def sheets(cells: Sequence[Image.Image]) -> list[Image.Image]:
    """Lay out rows of three cells (image, left, right), ten rows a sheet, two of them side by side."""
    columns = 1 + len(SIDES)
    step = ROWS_A_SHEET * columns
    pages = [cells[start : start + step] for start in range(0, len(cells), step)]
    return [grid(page, columns=ROWS_SIDE_BY_SIDE * columns) for page in pages]
