"""Find captions that fit their image badly, copies, broken and tiny images in a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from tavq.base.arguments import print_json
from tavq.base.device import choose_device
from tavq.data.dataset import ImageTextDataset
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.images import UnreadableImageError, to_tensor
from tavq.data.keep import write_keep
from tavq.data.layouts import open_dataset
from tavq.data.thumbnail_page import Card, write_page

from .data_checks import caption_fit, near_duplicates, sibling_agreement
from .heatmaps import check_aligned
from .model import TAVQTokenizer
from .retrieval import text_encoder_of
from .run_config import CheckRun

SURE = 0.7  # probability from which a caption counts as one of another language; 0 of 3,893 English ones do
FEWEST_LETTERS = 20  # of shorter captions the language cannot be told
EVALUATED_SPLITS = ("test", "val", "train")  # a copy in two of them stays in the first


@dataclasses.dataclass(frozen=True)
class Images:
    """What reading every image of a dataset gave."""

    indices: list[int]
    """Of the images that can be read."""
    ids: Tensor
    """(n, N) int64, of those."""
    unreadable: dict[int, str]
    """Index -> reason."""
    tiny: dict[int, str]
    """Index -> size."""


def check_dataset(run: CheckRun) -> None:
    """Write the page, the table of captions and keep.txt; print what was found."""
    dataset = open_dataset(run.data)
    tokenizer = TAVQTokenizer.from_pretrained(run.tokenizer).to(choose_device(run.device))
    check_aligned(tokenizer)
    images = read_images(run, dataset, tokenizer)
    captions = [(i, k) for i in images.indices for k in range(len(dataset[i].captions))]
    fit = fit_of_captions(dataset, tokenizer, images, captions)
    copies = [
        (images.indices[a], images.indices[b], similarity)
        for a, b, similarity in near_duplicates(tokenizer, images.ids, run.duplicate_similarity)
    ]
    foreign = foreign_captions(run.language, dataset, captions)

    worst = [captions[row] for row in fit.argsort(stable=True).tolist()]
    dropped = {dataset[i].id for i in (*images.unreadable, *images.tiny)} | copies_to_drop(dataset, copies)
    dropped_captions: dict[str, set[int]] = {}
    for index, number in (*worst[: run.drop_worst], *foreign):
        dropped_captions.setdefault(dataset[index].id, set()).add(number)
    run.out.mkdir(parents=True, exist_ok=True)
    write_keep(run.out / "keep.txt", dataset, dropped, dropped_captions)
    write_table(run.out / "captions.tsv", dataset, captions, fit)
    write_report(run, dataset, images, worst, copies, foreign)

    found = {
        "captions": len(captions),
        "images": len(images.indices),
        "copies": len(copies),
        "copies_across_splits": sum(dataset[a].split != dataset[b].split for a, b, _ in copies),
        "unreadable": len(images.unreadable),
        "tiny": len(images.tiny),
        "foreign_captions": len(foreign),
    }
    print_found(run, found)


def print_found(run: CheckRun, found: Mapping[str, int]) -> None:
    """Print how much was found of each kind, and the files that say more."""
    files = {name: run.out / name for name in ("report.html", "captions.tsv", "keep.txt")}
    if run.json:
        print_json({**found, "files": [str(file) for file in files.values()]})
        return
    print(f"{found['captions']} captions of {found['images']} images, those that fit worst first on the page")
    print(f"{found['copies']} pairs of copies, {found['copies_across_splits']} of them across splits")
    print(f"{found['unreadable']} unreadable and {found['tiny']} tiny images")
    print(
        f"{found['foreign_captions']} captions in another language than {run.language or '(not looked for)'}"
    )
    print(files["report.html"])
    print(files["keep.txt"])


def read_images(run: CheckRun, dataset: ImageTextDataset, tokenizer: TAVQTokenizer) -> Images:
    """Read and encode every image, one at a time."""
    indices: list[int] = []
    ids: list[Tensor] = []
    unreadable: dict[int, str] = {}
    tiny: dict[int, str] = {}
    for index in tqdm(range(len(dataset)), desc="reading", unit="image", disable=None):
        try:
            image = dataset.load_image(index)
        except UnreadableImageError as error:
            unreadable[index] = str(error)
            continue
        if min(image.size) < run.min_side_px:
            tiny[index] = f"{image.width} x {image.height} px"
        pixels = to_tensor(image, tokenizer.image_size_px).unsqueeze(0)
        indices.append(index)
        ids.append(tokenizer.encode(pixels.to(tokenizer.codebook.device)).flatten(1))
    if not indices:
        raise ValueError(f"{run.data}: none of {len(dataset)} images can be read; check the files")
    return Images(indices, torch.cat(ids), unreadable, tiny)


def fit_of_captions(
    dataset: ImageTextDataset, tokenizer: TAVQTokenizer, images: Images, captions: list[tuple[int, int]]
) -> Tensor:
    """How well each caption fits: by its image's codes, and by the other captions of the image if any."""
    vectors = EmbeddingCache(text_encoder_of(tokenizer)).encode([dataset[i].captions[k] for i, k in captions])
    rows = {index: row for row, index in enumerate(images.indices)}
    image_of = torch.tensor([rows[index] for index, _ in captions])
    by_codes = caption_fit(tokenizer, images.ids, vectors.to(images.ids.device), image_of)
    return by_codes + sibling_agreement(vectors, image_of)


def foreign_captions(
    language: str, dataset: ImageTextDataset, captions: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the captions that are surely in another language."""
    if not language:
        return []
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    classify: Callable[[str], tuple[str, float]]
    classify = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify
    found = []
    for index, number in captions:
        text = dataset[index].captions[number]
        if sum(character.isalpha() for character in text) < FEWEST_LETTERS:
            continue
        guess, probability = classify(text)
        if guess != language and probability >= SURE:
            found.append((index, number))
    return found


def copies_to_drop(dataset: ImageTextDataset, copies: Sequence[tuple[int, int, float]]) -> set[str]:
    """Return the ids of the images that go, so that of each pair one stays: an evaluated one if there is."""
    dropped: set[str] = set()
    for a, b, _ in copies:
        if not {dataset[a].id, dataset[b].id} & dropped:
            _, second = sorted((a, b), key=lambda i: (EVALUATED_SPLITS.index(dataset[i].split), i))
            dropped.add(dataset[second].id)
    return dropped


def write_table(
    file: Path, dataset: ImageTextDataset, captions: Sequence[tuple[int, int]], fit: Tensor
) -> None:
    """Write all captions with their fit, the worst first."""
    lines = ["fit\tid\tcaption number\tcaption"]
    for row in fit.argsort(stable=True).tolist():
        index, number = captions[row]
        example = dataset[index]
        lines.append(f"{float(fit[row]):.3f}\t{example.id}\t{number}\t{example.captions[number]}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_report(
    run: CheckRun,
    dataset: ImageTextDataset,
    images: Images,
    worst: Sequence[tuple[int, int]],
    copies: Sequence[tuple[int, int, float]],
    foreign: Sequence[tuple[int, int]],
) -> None:
    """Write the page with thumbnails."""

    def card(index: int, *lines: str) -> Card:
        image: Image.Image | None = None if index in images.unreadable else dataset.load_image(index)
        return Card(image, f"{dataset[index].id} ({dataset[index].split})", lines)

    def caption_card(index: int, number: int) -> Card:
        others = [text for k, text in enumerate(dataset[index].captions) if k != number]
        return card(index, dataset[index].captions[number], *(f"other: {text}" for text in others))

    pairs = [
        pair
        for a, b, similarity in copies[: run.show]
        for pair in (card(a, f"similarity {similarity:.3f}"), card(b, f"copy of {dataset[a].id}"))
    ]
    sections = {
        "Captions that fit worst": [caption_card(*place) for place in worst[: run.show]],
        "Copies, two by two": pairs,
        "Unreadable": [card(i, why) for i, why in list(images.unreadable.items())[: run.show]],
        "Tiny": [card(i, size) for i, size in list(images.tiny.items())[: run.show]],
        "Other languages": [caption_card(*place) for place in foreign[: run.show]],
    }
    about = "keep.txt leaves out copies, unreadable and tiny images and captions in other languages."
    write_page(run.out / "report.html", f"Check of {dataset.name}", about, sections)
