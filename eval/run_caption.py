"""python eval/run_caption.py [--checkpoint DIR] [--data DIR] [--split test] [--beam 5]

Caption the photos of a split and score the captions: CIDEr, BLEU, METEOR, ROUGE-L, SPICE where it can run.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image
from tqdm.auto import tqdm
from tyro.conf import OmitArgPrefixes

from tavq.base.arguments import parse, run_main
from tavq.base.files import atomic_write
from tavq.captioner.decoding import DecodingConfig
from tavq.captioner.reward import ends_in_function_word
from tavq.data.dataset import ImageTextDataset, readable_images
from tavq.eval.evaluation import EvaluationRun, print_metrics
from tavq.eval.results import (
    caption_fields,
    format_comparison,
    make_protocol,
    measured,
    with_intervals,
    write_results,
)
from tavq.metrics.captions import Backend, caption_metrics
from tavq.metrics.ptb import tokenize
from tavq.pipeline import Pipeline

PHOTOS_AT_ONCE = 20


@dataclasses.dataclass(frozen=True)
class CaptionEvaluation(EvaluationRun):
    """Caption the photos of a split and score the captions against the human ones.

    Example: python eval/run_caption.py --checkpoint runs/mine --split val --beam 5 --out results/caption.json
    """

    backend: Backend = "auto"
    """Who tokenises: java, python (the tokens are the same), or auto. METEOR and SPICE need Java."""
    decoding: OmitArgPrefixes[DecodingConfig] = DecodingConfig()


def captions_of(pipeline: Pipeline, dataset: ImageTextDataset, settings: DecodingConfig) -> dict[int, str]:
    """Index of a photo -> its best caption, for every photo that can be read."""
    found: dict[int, str] = {}
    batch: list[tuple[int, Image.Image]] = []
    bar = tqdm(total=len(dataset), desc="captioning", unit="photo", disable=None)

    def describe() -> None:
        for (index, _), captions in zip(
            batch, pipeline.caption([i for _, i in batch], settings), strict=True
        ):
            found[index] = captions[0].text
        bar.update(len(batch))
        batch.clear()

    for pair in readable_images(dataset):
        batch.append(pair)
        if len(batch) == PHOTOS_AT_ONCE:
            describe()
    if batch:
        describe()
    bar.close()
    return found


def human_scores(references: dict[str, list[str]]) -> dict[str, float]:
    """CIDEr of what people wrote, to frame that of a model: each image's first caption against its others,
    and the next image's against the same."""
    ids = [name for name, texts in references.items() if len(texts) > 1]
    others = {name: references[name][1:] for name in ids}
    firsts = [references[name][0] for name in ids]
    candidates = {
        "human captions, against the image's others": dict(zip(ids, firsts, strict=True)),
        "human captions of the next image": dict(zip(ids, firsts[1:] + firsts[:1], strict=True)),
    }
    return {
        f"CIDEr of {name}": caption_metrics(chosen, others, metrics=("CIDEr",), backend="python").values[
            "CIDEr"
        ]
        for name, chosen in (candidates.items() if len(ids) > 1 else ())
    }


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CaptionEvaluation, argv, prog="python eval/run_caption.py")
    started = time.monotonic()
    pipeline, dataset = run.open(("tokenizer", "captioner"))
    captions = captions_of(pipeline, dataset, run.decoding)
    hypotheses = {dataset[index].id: text for index, text in captions.items()}
    references = {dataset[index].id: list(dataset[index].captions) for index in captions}
    scores = caption_metrics(hypotheses, references, backend=run.backend)
    broken_off = [ends_in_function_word(tokenize(hypotheses[name]).split()) for name in scores.ids]
    per_image = scores.statistics | {"ends in a function word": np.array(broken_off, dtype=float)[:, None]}
    metrics = with_intervals(per_image)
    metrics["distinct captions"] = measured(len(set(hypotheses.values())) / len(hypotheses), len(hypotheses))
    protocol = make_protocol(
        task="captions",
        ids=scores.ids,
        started=started,
        **run.protocol_fields(pipeline, dataset),
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
    print_metrics(metrics, path)
    for name, value in protocol["floors"].items():
        print(f"beside it: {name} {value:.3f}")
    for metric, reason in scores.skipped.items():
        print(f"{metric} was left out: {reason}")
    if run.compare is not None:
        print(format_comparison(run.compare, path))


if __name__ == "__main__":
    main()
