"""Write a dense description of each image of a dataset, by a vision-language model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tavq.base.arguments import print_json
from tavq.base.device import choose_device
from tavq.base.journal import append_row, read_journal
from tavq.base.progress import Progress
from tavq.data.annotations import numbered_lines, parse_object, read_text
from tavq.data.dataset import Example, ImageTextDataset, UnreadableImages, readable_images, tried_images
from tavq.data.description_filter import fault_of, whole_sentences
from tavq.data.images import UnreadableImageError
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


Question = tuple[int, str, str]
"""Index of an image in its dataset, its id, and the prompt."""
Describe = Callable[[Sequence[Question]], Iterable[dict[str, Any]]]
"""Questions -> a row each, see `Describer`."""


def describe_dataset(run: DescribeRun, describe: Describe | None = None) -> None:
    """Write a description of each image that has none yet.

    Args:
        run: what to describe, and how.
        describe: describes elsewhere; by default this process does. It may add rows of images that have a
            description, which are ignored.
    """
    out = run.output
    rejected = out.with_name(f"{out.stem}.rejected.jsonl")
    # Before the dataset is opened: it reads this file, too, and would refuse half a line.
    done = {row["id"] for row in (*read_journal(out), *read_journal(rejected))}
    dataset = open_dataset(run.data, run.split).take(run.limit)
    prompt_of = prompts(run)
    prompt_of(dataset[0])  # so that no mistake shows after the model is loaded
    if describe is None:
        describer = Describer(run, dataset, open_model(run.vlm, choose_device(run.device)))
        if run.sample:
            write_sample(run, describer, prompt_of, out.with_suffix(".sample.html"))
            return
        describe = describer

    left = {e.id: (index, prompt_of(e)) for index, e in enumerate(dataset.examples) if e.id not in done}
    reasons: Counter[str] = Counter()
    failed: list[str] = []
    unreadable = UnreadableImages(dataset.name, len(dataset))
    with Progress(total=len(dataset), initial=len(dataset) - len(left), unit="image") as bar:
        for row in describe([(index, id_, prompt) for id_, (index, prompt) in left.items()]):
            if row["id"] not in left:
                continue
            if "unreadable" in row:
                unreadable.add(row["id"], row["unreadable"])
                continue
            bar.update(1)
            if "failed" in row:
                failed.append(f"{row['id']} ({row['failed']})")
                continue
            # One line for each image, in one of the two files: a killed run loses and doubles none.
            append_row(rejected if "reason" in row else out, row)
            reasons[row.get("reason", "")] += 1
    unreadable.warn(len(left))
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
    model: VisionLanguageModel, questions: Iterable[tuple[int, Image.Image, str]]
) -> Iterator[tuple[int, Image.Image, str | AnswerError]]:
    """Yield (index, image, description or error) for questions (index, image, prompt), as answers come."""
    asked: dict[str, tuple[int, Image.Image]] = {}  # only what waits for an answer is held

    def noted() -> Iterator[tuple[str, Image.Image, str]]:
        for index, image, prompt in questions:
            asked[str(index)] = index, image
            yield str(index), image, prompt

    for key, answer in answer_all(model, noted()):
        yield *asked.pop(key), answer


class Describer:
    """Describes images of a dataset, and decides which descriptions stay.

    A row holds `id`, `text` and `model`, and `reason` where the description is dropped. Where there is none,
    it holds `id` and why: `unreadable` or `failed`.
    """

    def __init__(self, run: DescribeRun, dataset: ImageTextDataset, model: VisionLanguageModel):
        self.dataset = dataset
        self.model = model
        self.judge = Judge(run, dataset)

    def __call__(self, questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
        """Yield the rows of some images, as answers come."""
        unreadable: list[dict[str, Any]] = []

        def readable() -> Iterator[tuple[int, Image.Image, str]]:
            images = tried_images(self.dataset, [index for index, _, _ in questions])
            for (index, id_, prompt), (_, image) in zip(questions, images, strict=True):
                if isinstance(image, UnreadableImageError):
                    unreadable.append({"id": id_, "unreadable": str(image)})
                else:
                    yield index, image, prompt

        for index, image, answer in described(self.model, readable()):
            yield from unreadable
            unreadable.clear()
            example = self.dataset[index]
            if isinstance(answer, AnswerError):
                yield {"id": example.id, "failed": str(answer)}
            else:
                yield self.judge(example, image, answer)
        yield from unreadable


class Judge:
    """Decides which descriptions stay."""

    def __init__(self, run: DescribeRun, dataset: ImageTextDataset):
        self.run = run
        self.grounding: Grounding | None = None
        if run.min_grounding:
            tokenizer = TAVQTokenizer.from_pretrained(run.tokenizer).to(choose_device(run.device))
            self.grounding = Grounding(tokenizer, dataset)

    def __call__(self, example: Example, image: Image.Image, answer: str) -> dict[str, Any]:
        """Return the row to write, with the `reason` if the description is dropped."""
        text = whole_sentences(answer)
        row: dict[str, Any] = {"id": example.id, "text": text, "model": self.run.vlm.model}
        reason = fault_of(text)
        if reason is None and self.grounding is not None:
            shares = self.grounding(image, text)
            row["grounding"] = round(sum(shares.values()) / len(shares), 3) if shares else 1.0
            if row["grounding"] < self.run.min_grounding:
                reason = "not in the image"
                row["worst"] = sorted(shares, key=lambda phrase: shares[phrase])[:5]
        return row | {"reason": reason} if reason else row


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
    run: DescribeRun, describer: Describer, prompt_of: Callable[[Example], str], page: Path
) -> None:
    """Describe some images into a page, to try a model and a prompt."""
    dataset = describer.dataset
    chosen = range(0, len(dataset), max(1, len(dataset) // run.sample))[: run.sample]
    questions = (
        (index, image, prompt_of(dataset[index])) for index, image in readable_images(dataset, indices=chosen)
    )
    cards: dict[int, Card] = {}
    for index, image, answer in described(describer.model, questions):
        example = dataset[index]
        if isinstance(answer, AnswerError):
            lines = [f"no answer: {answer}"]
        else:
            row = describer.judge(example, image, answer)
            lines = [row["text"], *([f"would be dropped: {row['reason']}"] if "reason" in row else [])]
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
