"""tavq score faithfulness GENERATED/ --out scores.json [--model NAME [--endpoint URL]]

Do images show what their prompts ask for? By a captioner of ours, or by questions to a vision-language model
as in TIFA (Hu et al. 2023, arXiv:2303.11897).

Shapes: n images.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tavq.alignment.units import split_units
from tavq.base.arguments import print_json
from tavq.base.device import choose_device
from tavq.base.journal import append_row, read_journal
from tavq.base.progress import Progress
from tavq.data.annotations import numbered_lines, parse_object
from tavq.data.dataset import Example, ImageTextDataset
from tavq.data.images import load_image, to_pixels
from tavq.data.vision_language import AnswerError, answer_all, open_model
from tavq.eval.config import ScoreFaithfulness
from tavq.eval.faithfulness import judge_images
from tavq.eval.results import make_protocol, with_intervals, write_results
from tavq.pipeline import Pipeline

QUESTION = 'Does this image show "{unit}"? Answer yes or no.'
YES_SHARE = "faithfulness"
JUDGED_SIZE_PX = 256


def score_faithfulness(run: ScoreFaithfulness) -> None:
    """Score a folder of generated images and write the result file."""
    started = time.monotonic()
    recipes = read_recipes(run.generated)
    images = [
        Example(row["file"], run.generated / row["file"], (row["prompt"],), None, "test") for row in recipes
    ]
    dataset = ImageTextDataset(run.generated.name, images)
    if run.vlm.model:
        statistics, floors, fields = by_questions(run, dataset)
    else:
        statistics, floors, fields = by_captioner(run, dataset, recipes)
    metrics = with_intervals(statistics)
    protocol = make_protocol(
        task="faithfulness",
        ids=dataset.ids,
        started=started,
        label=run.label or run.generated.name,
        **fields,
        floors=floors,
    )
    write_results(run.out, metrics, protocol, per_image=statistics, ids=dataset.ids)
    if run.json:
        print_json({"path": str(run.out), "metrics": metrics, "protocol": protocol})
        return
    for name, entry in metrics.items():
        print(f"{name:<24}{entry['value']:>10.4f}  [{entry['low']:.4f}, {entry['high']:.4f}]  n={entry['n']}")
        if name in floors:
            print(f"  with the next image's prompt: {floors[name]:.4f}")
    print(run.out)


def read_recipes(folder: Path) -> list[dict[str, Any]]:
    """Read the recipes of generated images that have a prompt."""
    file = folder / "result.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}; name a folder that tavq generate wrote")
    rows = [parse_object(line, where) for where, line in numbered_lines(file)]
    rows = [row for row in rows if row.get("prompt") and (folder / str(row.get("file"))).is_file()]
    if len(rows) < 2:
        raise ValueError(f"{file} names {len(rows)} images with a prompt, at least 2 are needed")
    return rows


def by_captioner(
    run: ScoreFaithfulness, dataset: ImageTextDataset, recipes: Sequence[dict[str, Any]]
) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, Any]]:
    """CIDEr of the judge's captions against the prompts, and how often it finds the prompt again."""
    judge = Pipeline.from_pretrained(run.judge, choose_device(run.device))
    own = {row.get("checkpoints", {}).get("tokenizer") for row in recipes}
    if judge.hashes["tokenizer"] in own:
        raise ValueError(
            f"{run.judge} generated these images itself; name a --judge with another codebook, or a --model"
        )
    images = torch.stack([to_pixels(dataset.load_image(i), JUDGED_SIZE_PX) for i in range(len(dataset))])
    statistics, floors = judge_images(judge, images, dataset)
    return statistics, floors, {"judge": {part: judge.hashes[part] for part in ("tokenizer", "captioner")}}


def by_questions(
    run: ScoreFaithfulness, dataset: ImageTextDataset
) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, Any]]:
    """Share of a prompt's units that the model sees, and as a floor that of units of the next prompt.

    Raises:
        ValueError: some questions were not answered.
    """
    answers_file = run.out.with_suffix(".answers.jsonl")
    asked = {
        (row["file"], row["unit"]): bool(row["yes"])
        for row in read_journal(answers_file)
        if row["model"] == run.vlm.model
    }
    own = [units_of_prompt(example.captions[0]) for example in dataset.examples]
    others = [[unit for unit in own[(i + 1) % len(own)] if unit not in units] for i, units in enumerate(own)]
    wanted = [
        (example.id, unit)
        for example, its_units, other_units in zip(dataset.examples, own, others, strict=True)
        for unit in (*its_units, *other_units)
    ]
    remaining = [key for key in dict.fromkeys(wanted) if key not in asked]

    def questions() -> Iterator[tuple[str, Image.Image, str]]:
        for file, unit in remaining:
            image = load_image(run.generated / file)
            yield json.dumps([file, unit]), image, QUESTION.format(unit=unit)

    unanswered: list[str] = []
    unclear = 0
    answers: Iterable[tuple[str, str | AnswerError]] = ()
    if remaining:
        answers = answer_all(open_model(run.vlm, choose_device(run.device)), questions())
    with Progress(total=len(wanted), initial=len(wanted) - len(remaining), unit="question") as bar:
        for key, answer in answers:
            bar.update(1)
            if isinstance(answer, AnswerError):
                unanswered.append(f"{key} ({answer})")
                continue
            file, unit = json.loads(key)
            said = re.search(r"\b(yes|no)\b", answer.lower())
            unclear += said is None
            asked[file, unit] = said is not None and said[1] == "yes"
            row = {"file": file, "unit": unit, "yes": asked[file, unit], "answer": answer}
            append_row(answers_file, row | {"model": run.vlm.model})
    if unanswered:
        raise ValueError(
            f"{len(unanswered)} of {len(wanted)} questions got no answer, such as {unanswered[0]}; run the "
            "command again: it asks these alone"
        )
    if unclear:
        print(f"{unclear} answers were neither yes nor no; they count as no")

    seen = [
        np.mean([asked[e.id, unit] for unit in units]) for e, units in zip(dataset.examples, own, strict=True)
    ]
    foreign = [asked[e.id, unit] for e, units in zip(dataset.examples, others, strict=True) for unit in units]
    floors = {YES_SHARE: float(np.mean(foreign))} if foreign else {}
    fields = {"vision_language_model": run.vlm.model, "question": QUESTION, "questions": len(wanted)}
    return {YES_SHARE: np.array(seen)[:, None]}, floors, fields


def units_of_prompt(prompt: str) -> list[str]:
    """Phrases and words of a prompt, of which the model is asked one by one; the prompt if it has none."""
    units = split_units(prompt)
    return list(dict.fromkeys([*units.phrases, *units.words])) or [prompt]
