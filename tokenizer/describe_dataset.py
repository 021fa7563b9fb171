"""Write a dense description of each image of a dataset, by a vision-language model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tavq.base.arguments import print_json
from tavq.base.device import choose_device
from tavq.base.journal import append_row, read_journal
from tavq.base.progress import Progress
from tavq.data.annotations import numbered_lines, parse_object, read_text
from tavq.data.dataset import Example, ImageTextDataset, readable_images
from tavq.data.description_filter import fault_of, whole_sentences
from tavq.data.layouts import open_dataset
from tavq.data.thumbnail_page import Card, write_page
from tavq.data.vision_language import AnswerError, VisionLanguageModel, answer_all, open_model

from .grounding import Grounding
from .model import TAVQTokenizer
from .run_config import DescribeRun

PROMPT = (
    "Describe this image in four to six sentences: each person, animal and object with its colour, material "
    "and number, what they do, where they are, and the background. Write only what can be seen. Do not begin "
    'with "The image shows".'
)
FUSE_PROMPT = (
    "People described this image as follows:\n{captions}\n{tags}"
    "Write one description of four to six sentences that keeps everything these people saw, and adds what "
    "they left out: colours, materials, numbers, places, the background. Write only what can be seen."
)


def describe_dataset(run: DescribeRun) -> None:
    """Write a description of each image that has none yet."""
    out = run.output
    rejected = out.with_name(f"{out.stem}.rejected.jsonl")
    # Before the dataset is opened: it reads this file, too, and would refuse half a line.
    done = {row["id"] for row in (*read_journal(out), *read_journal(rejected))}
    dataset = open_dataset(run.data, run.split).take(run.limit)
    prompt_of = prompts(run)
    prompt_of(dataset[0])  # so that no mistake shows after the model is loaded
    model = open_model(run.vlm, choose_device(run.device))
    if run.sample:
        write_sample(run, dataset, model, prompt_of, out.with_suffix(".sample.html"))
        return

    remaining = ImageTextDataset(dataset.name, [e for e in dataset.examples if e.id not in done])
    judge = Judge(run, dataset)
    reasons: Counter[str] = Counter()
    failed: list[str] = []
    with Progress(total=len(dataset), initial=len(dataset) - len(remaining), unit="image") as bar:
        for index, image, answer in described(remaining, model, prompt_of, total=len(dataset)):
            bar.update(1)
            example = remaining[index]
            if isinstance(answer, AnswerError):
                failed.append(f"{example.id} ({answer})")
                continue
            row, reason = judge(example, image, answer)
            # One line for each image, in one of the two files: a killed run loses and doubles none.
            append_row(rejected if reason else out, row)
            reasons[reason or ""] += 1
    report(reasons, failed, out, rejected, as_json=run.json)


def prompts(run: DescribeRun) -> Callable[[Example], str]:
    """Return the function that makes the prompt of an example.

    Raises:
        ValueError: captions shall be fused, but the prompt has no place for them.
    """
    template = read_text(run.prompt).strip() if run.prompt else FUSE_PROMPT if run.fuse else PROMPT
    if run.fuse and "{captions}" not in template:
        raise ValueError(f"{run.prompt} has no {{captions}}, where --fuse puts the captions; write it there")
    if run.tags and "{tags}" not in template:
        raise ValueError(f"{run.prompt} has no {{tags}}, where --tags are put; write it there")
    tags = read_tags(run.tags) if run.tags else {}

    def prompt_of(example: Example) -> str:
        named = f"It is known to show: {', '.join(tags[example.id])}.\n" if tags.get(example.id) else ""
        listed = "\n".join(f"- {caption}" for caption in example.captions)
        # No str.format: a prompt may hold other braces.
        return template.replace("{captions}", listed).replace("{tags}", named) if run.fuse else template

    return prompt_of


def read_tags(path: Path) -> dict[str, list[str]]:
    """Read JSON lines {"id", "tags"} as id -> tags."""
    rows = [(where, parse_object(line, where)) for where, line in numbered_lines(path)]
    for where, row in rows:
        if not isinstance(row.get("tags"), list) or "id" not in row:
            raise ValueError(f'{where} has keys {", ".join(row)}; expected {{"id", "tags": [...]}}')
    return {str(row["id"]): [str(tag) for tag in row["tags"]] for _, row in rows}


def described(
    dataset: ImageTextDataset,
    model: VisionLanguageModel,
    prompt_of: Callable[[Example], str],
    *,
    total: int | None = None,
) -> Iterator[tuple[int, Image.Image, str | AnswerError]]:
    """Yield (index, image, description or error) as answers come; see `readable_images` for `total`."""
    asked: dict[str, tuple[int, Image.Image]] = {}  # only what waits for an answer is held

    def questions() -> Iterator[tuple[str, Image.Image, str]]:
        for index, image in readable_images(dataset, total=total):
            asked[dataset[index].id] = index, image
            yield dataset[index].id, image, prompt_of(dataset[index])

    for key, answer in answer_all(model, questions()):
        yield *asked.pop(key), answer


class Judge:
    """Decides which descriptions stay."""

    def __init__(self, run: DescribeRun, dataset: ImageTextDataset):
        self.run = run
        self.grounding: Grounding | None = None
        if run.min_grounding:
            tokenizer = TAVQTokenizer.from_pretrained(run.tokenizer).to(choose_device(run.device))
            self.grounding = Grounding(tokenizer, dataset)

    def __call__(
        self, example: Example, image: Image.Image, answer: str
    ) -> tuple[dict[str, Any], str | None]:
        """Return the row to write, and why the description is dropped, None if it stays."""
        text = whole_sentences(answer)
        row: dict[str, Any] = {"id": example.id, "text": text, "model": self.run.vlm.model}
        reason = fault_of(text)
        if reason is None and self.grounding is not None:
            shares = self.grounding(image, text)
            row["grounding"] = round(sum(shares.values()) / len(shares), 3) if shares else 1.0
            if row["grounding"] < self.run.min_grounding:
                reason = "not in the image"
                row["worst"] = sorted(shares, key=lambda phrase: shares[phrase])[:5]
        return (row | {"reason": reason} if reason else row), reason


def report(
    reasons: Counter[str], failed: list[str], out: Path, rejected: Path, *, as_json: bool = False
) -> None:
    """Say how many descriptions were written, and what became of the others."""
    written = reasons.pop("", 0)
    if as_json:
        files = {"file": str(out), "rejected": str(rejected)}
        print_json({**files, "written": written, "dropped": dict(reasons), "unanswered": failed})
        return
    print(f"{written} descriptions written to {out}")
    if reasons:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        print(f"{reasons.total()} dropped ({counts}); see {rejected}")
    if failed:
        print(f"{len(failed)} images got no answer; run the command again to ask once more: {failed[0]}")


def write_sample(
    run: DescribeRun,
    dataset: ImageTextDataset,
    model: VisionLanguageModel,
    prompt_of: Callable[[Example], str],
    page: Path,
) -> None:
    """Describe some images into a page, to try a model and a prompt."""
    step = max(1, len(dataset) // run.sample)
    chosen = list(itertools.islice(dataset.examples, 0, None, step))[: run.sample]
    dataset = ImageTextDataset(dataset.name, chosen)
    judge = Judge(run, dataset)
    cards: dict[int, Card] = {}
    for index, image, answer in described(dataset, model, prompt_of):
        example = dataset[index]
        if isinstance(answer, AnswerError):
            lines = [f"no answer: {answer}"]
        else:
            row, reason = judge(example, image, answer)
            lines = [row["text"], *([f"would be dropped: {reason}"] if reason else [])]
        cards[index] = Card(image, example.id, [*lines, *(f"human: {text}" for text in example.captions)])
    prompt = prompt_of(dataset[0])
    write_page(
        page,
        f"Descriptions by {run.vlm.model}",
        f"Prompt of the first image: {prompt}",
        {f"{len(cards)} images": [cards[index] for index in sorted(cards)]},
    )
    if run.json:
        print_json({"file": str(page), "images": len(cards)})
    else:
        print(page)
