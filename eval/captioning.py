"""python eval/run_caption.py [--checkpoint DIR] [--data DIR] [--split test] [--beam 5]

Caption the images of a split and score the captions: CIDEr, BLEU, METEOR, ROUGE-L, SPICE where it can run.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time

import numpy as np

from tavq.base.files import atomic_write
from tavq.base.progress import Progress
from tavq.captioner.config import DecodingConfig
from tavq.captioner.reward import ends_in_function_word
from tavq.data.dataset import ImageTextDataset, readable_images
from tavq.data.images import squash
from tavq.eval.config import CaptionEvaluation
from tavq.eval.evaluation import open_evaluation, print_report, protocol_fields
from tavq.eval.results import (
    caption_fields,
    make_protocol,
    measured,
    with_intervals,
    write_results,
)
from tavq.metrics.captions import caption_metrics
from tavq.metrics.ptb import tokenize
from tavq.pipeline import Pipeline

IMAGES_AT_ONCE = 20


def evaluate_captioner(run: CaptionEvaluation) -> None:
    """Caption a split, score the captions, and write the result file."""
    started = time.monotonic()
    pipeline, dataset = open_evaluation(run, ("tokenizer", "captioner"))
    captions = caption_split(pipeline, dataset, run.decoding)
    hypotheses = {dataset[index].id: text for index, text in captions.items()}
    references = {dataset[index].id: list(dataset[index].captions) for index in captions}

    scores = caption_metrics(hypotheses, references, backend=run.backend)
    is_incomplete = [ends_in_function_word(tokenize(hypotheses[name]).split()) for name in scores.ids]
    per_image = scores.statistics | {"ends in a function word": np.array(is_incomplete, dtype=float)[:, None]}
    metrics = with_intervals(per_image)
    metrics["distinct captions"] = measured(len(set(hypotheses.values())) / len(hypotheses), len(hypotheses))

    protocol = make_protocol(
        task="captions",
        ids=scores.ids,
        started=started,
        **protocol_fields(run, pipeline, dataset),
        **caption_fields(references),
        decoding=dataclasses.asdict(run.decoding),
        backend=scores.backend,
        skipped=scores.skipped,
        floors=human_scores(references),
    )
    path = run.result_path("caption")
    with atomic_write(path.with_suffix("") / "captions.json") as temporary:
        rows = [{"image_id": name, "caption": text} for name, text in hypotheses.items()]
        temporary.write_text(json.dumps(rows, indent=0, ensure_ascii=False) + "\n")
    write_results(path, metrics, protocol, per_image=per_image, ids=scores.ids)

    print_report(run, path, metrics, protocol)
    for metric, reason in scores.skipped.items():
        print(f"{metric} was left out: {reason}", file=sys.stderr)


def caption_split(pipeline: Pipeline, dataset: ImageTextDataset, decoding: DecodingConfig) -> dict[int, str]:
    """Return index of an image -> its best caption, for every image that can be read."""
    size = pipeline.tokenizer.image_size_px
    images = ((index, squash(image, size)) for index, image in readable_images(dataset))
    best: dict[int, str] = {}
    with Progress(total=len(dataset), desc="captioning", unit="image") as bar:
        while batch := list(itertools.islice(images, IMAGES_AT_ONCE)):
            candidates = pipeline.caption([image for _, image in batch], decoding)
            for (index, _), captions in zip(batch, candidates, strict=True):
                best[index] = captions[0].text
            bar.update(len(batch))
    return best


def human_scores(references: dict[str, list[str]]) -> dict[str, float]:
    """Return the CIDEr of human captions, as reference points for that of a model.

    Scored against the other captions of each image: its first caption, and that of the next image.
    """
    ids = [name for name, texts in references.items() if len(texts) > 1]
    if len(ids) < 2:
        return {}
    others = {name: references[name][1:] for name in ids}
    firsts = [references[name][0] for name in ids]
    candidates = {
        "human captions, against the image's others": dict(zip(ids, firsts, strict=True)),
        "human captions of the next image": dict(zip(ids, firsts[1:] + firsts[:1], strict=True)),
    }

    scores: dict[str, float] = {}
    for name, captions in candidates.items():
        cider = caption_metrics(captions, others, metrics=("CIDEr",), backend="python")
        scores[f"CIDEr of {name}"] = cider.values["CIDEr"]
    return scores
