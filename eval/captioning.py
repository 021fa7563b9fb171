"""python eval/run_caption.py [--checkpoint DIR] [--data DIR] [--split test] [--beam 5]

Caption the images of a split and score the captions: CIDEr, BLEU, METEOR, ROUGE-L, SPICE where it can run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import numpy as np

from tavq.base.files import atomic_write
from tavq.captioner.reward import ends_in_function_word
from tavq.eval.config import CaptionEvaluation
from tavq.eval.evaluation import (
    CAPTIONED_AT_ONCE,
    best_captions,
    open_evaluation,
    print_report,
    protocol_fields,
    squashed_images,
)
from tavq.eval.results import (
    caption_fields,
    make_protocol,
    measured,
    with_intervals,
    write_results,
)
from tavq.eval.work import work_of
from tavq.metrics.captions import caption_metrics
from tavq.metrics.ptb import tokenize


def evaluate_captioner(run: CaptionEvaluation) -> None:
    """Caption a split, score the captions, and write the result file."""
    started = time.monotonic()
    pipeline, dataset = open_evaluation(run, ("tokenizer", "captioner"))
    path = run.result_path("caption")
    work = work_of(run, path)
    images, indices = squashed_images(dataset, pipeline.tokenizer.image_size_px)
    captions = work(best_captions, pipeline, images, run.decoding, batch=CAPTIONED_AT_ONCE)["captions"]
    examples = [dataset[index] for index in indices]
    hypotheses = {example.id: text for example, text in zip(examples, captions.tolist(), strict=True)}
    references = {example.id: list(example.captions) for example in examples}

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
    with atomic_write(path.with_suffix("") / "captions.json") as temporary:
        rows = [{"image_id": name, "caption": text} for name, text in hypotheses.items()]
        temporary.write_text(json.dumps(rows, indent=0, ensure_ascii=False) + "\n")
    write_results(path, metrics, protocol, per_image=per_image, ids=scores.ids)
    work.clear()

    print_report(run, path, metrics, protocol)
    for metric, reason in scores.skipped.items():
        print(f"{metric} was left out: {reason}", file=sys.stderr)


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
