"""python eval/run_tokenizer.py [--checkpoint DIR] [--data DIR] [--split test] [--features NETWORK.pt]

Measure a tokenizer: reconstruction (rFID, PSNR, SSIM, spectra), use of the codebook, retrieval by its codes.

Shapes: n images, S image size in px, h w token grid.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tavq.alignment.config import NUM_LEVELS
from tavq.base.progress import Progress
from tavq.data.dataset import ImageTextDataset
from tavq.data.images import to_uint8
from tavq.eval.config import TokenizerEvaluation
from tavq.eval.evaluation import (
    at_reference_size,
    image_metric_options,
    network_fields,
    open_evaluation,
    open_network,
    other_split,
    print_report,
    protocol_fields,
    reference_set,
    resized,
    squashed_images,
)
from tavq.eval.judge import JUDGE_DISTANCE, JudgeDistance, judge_fields, open_judge
from tavq.eval.results import make_protocol, measured, with_intervals, write_results
from tavq.eval.work import work_of
from tavq.metrics.features import ImageSet
from tavq.metrics.frechet import image_metrics
from tavq.metrics.image import psnr, ssim
from tavq.metrics.spectral import WEAVE_FIELDS, flat_patches, octave_statistics, weave_statistics
from tavq.pipeline import Pipeline
from tavq.tokenizer.codebook_usage import codebook_usage
from tavq.tokenizer.retrieval import alignment_scores, image_to_text_ranks, text_to_image_ranks
from tavq.tokenizer.semantic_classes import code_meaning, open_classes

RECALLS = (1, 5, 10)
RECONSTRUCTED_AT_ONCE = 32
"""Images that a task of --engine ray encodes and decodes."""


def evaluate_tokenizer(run: TokenizerEvaluation) -> None:
    """Measure a tokenizer on a split, and write the result file."""
    started = time.monotonic()
    pipeline, dataset = open_evaluation(run, ("tokenizer",))
    tokenizer = pipeline.tokenizer
    judge = open_judge(run.judge, pipeline) if run.judge else None
    network = open_network(run.features, pipeline.directory) if run.frechet else None

    originals, indices = squashed_images(dataset, tokenizer.image_size_px)
    evaluated = ImageTextDataset(dataset.name, [dataset[index] for index in indices])
    shrunk = originals  # at the size that is decoded
    if tokenizer.decode_size_px != tokenizer.image_size_px:
        shrunk, _ = squashed_images(evaluated, tokenizer.decode_size_px)
    path = run.result_path("tokenizer")
    work = work_of(run, path)
    images = work(reconstruct, pipeline, originals, batch=RECONSTRUCTED_AT_ONCE)
    ids, decoded = (torch.from_numpy(images[name]) for name in ("ids", "decoded"))

    per_image = pixel_statistics(decoded, originals, shrunk)
    if run.retrieval and tokenizer.aligned_levels:
        per_image |= retrieval_hits(pipeline, evaluated, ids.to(pipeline.device))

    metrics: dict[str, Any] = {}
    floors: dict[str, float] = {}
    protocol = protocol_fields(run, pipeline, evaluated)
    protocol |= {"image_size_px": tokenizer.image_size_px, "weave": WEAVE_FIELDS}
    if network is not None:
        reference, _ = reference_set(evaluated)
        name = network.frechet_name
        options = image_metric_options(len(reference), str(pipeline.device), work)
        distances = [
            image_metrics(ImageSet(at_reference_size(images)), reference, network, **options).values[name]
            for images in (decoded, shrunk)
        ]
        metrics[f"r{name}"] = measured(distances[0], len(ids))
        floors[f"{name} of photos at {tokenizer.decode_size_px} px"] = distances[1]
        protocol |= network_fields(network, len(reference))
    if judge is not None:
        judge_distance = JudgeDistance(judge, evaluated, work)
        metrics[f"r{JUDGE_DISTANCE}"] = measured(judge_distance(decoded), len(ids))
        floors |= judge_distance.floors(shrunk, other_split(run, len(ids)))
        protocol |= judge_fields(judge, pipeline, ("tokenizer",))
    metrics |= with_intervals(per_image) | usage_metrics(ids[:, -1], tokenizer.num_codes)
    if run.classes is not None:
        classes = open_classes(run.classes, evaluated, tokenizer.grid_size, run.num_classes)
        meaning = code_meaning(ids[:, -1], classes.ids, run.num_classes)
        metrics["code_purity"] = measured(meaning.purity, len(ids), classes=run.num_classes)
        metrics["class_evenness"] = measured(meaning.evenness, len(ids), classes=run.num_classes)
        floors["purity of shuffled codes"] = meaning.chance
        protocol |= {"classes": classes.source_hash}

    result = make_protocol(task="tokenizer", ids=evaluated.ids, started=started, **protocol, floors=floors)
    write_results(path, metrics, result, per_image=per_image, ids=evaluated.ids)
    work.clear()
    print_report(run, path, metrics, result)


def reconstruct(pipeline: Pipeline, images: Tensor) -> dict[str, np.ndarray]:
    """Encode and decode images, one at a time.

    Args:
        pipeline: whose tokenizer does it.
        images: (n, 3, S, S) uint8.

    Returns:
        "ids" of all levels (n, 3, h, w) int64, and "decoded" images (n, 3, S', S') uint8.
    """
    tokenizer = pipeline.tokenizer
    ids: list[Tensor] = []
    decoded: list[Tensor] = []
    for image in Progress(images, desc="reconstructing", unit="image"):
        levels = tokenizer.encode_levels((image[None].float() / 127.5 - 1).to(pipeline.device))
        ids.append(levels.cpu())
        decoded.append(to_uint8(tokenizer.decode(levels[:, -1])).cpu())
    return {"ids": torch.cat(ids).numpy(), "decoded": torch.cat(decoded).numpy()}


def pixel_statistics(decoded: Tensor, originals: Tensor, shrunk: Tensor) -> dict[str, np.ndarray]:
    """Return the statistics of each reconstruction, by metric, that need no network.

    Args:
        decoded: (n, 3, S', S') uint8.
        originals: (n, 3, S, S) uint8, at the size that is encoded. PSNR and SSIM are measured there, so that
            tokenizers that decode at another size can be compared.
        shrunk: (n, 3, S', S') uint8, the originals at the size that is decoded. Spectra are measured there.
    """
    small = resized(decoded, originals.shape[-1])
    flat = flat_patches(shrunk)
    return {
        "PSNR": psnr(small, originals)[:, None],
        "SSIM": ssim(small, originals)[:, None],
        **octave_statistics(decoded, shrunk),
        **weave_statistics(decoded, flat, shrunk, flat),
    }


def usage_metrics(ids: Tensor, num_codes: int) -> dict[str, dict[str, Any]]:
    """Return usage and perplexity as metrics, with the number of tokens counted (see `codebook_usage`)."""
    usage = codebook_usage(ids, num_codes)
    return {
        name: measured(getattr(usage, name), len(ids), tokens=usage.tokens)
        for name in ("usage", "perplexity")
    }


def retrieval_hits(pipeline: Pipeline, dataset: ImageTextDataset, ids: Tensor) -> dict[str, np.ndarray]:
    """Search with the first caption of each image among all images, and with each image among all captions.

    Args:
        ids: (n, 3, h, w). Those of the last level are the tokens; recall of the others is reported apart.

    Returns:
        Whether each query found its answer, (n, 1), by metric.
    """
    tokenizer = pipeline.tokenizer
    image_of_caption = [row for row, example in enumerate(dataset.examples) for _ in example.captions]
    captions = [caption for example in dataset.examples for caption in example.captions]
    vectors = pipeline.alignment_encoder.encode(captions)
    first_caption = torch.tensor([image_of_caption.index(row) for row in range(len(ids))])

    hits: dict[str, np.ndarray] = {}
    for level in sorted(set(tokenizer.aligned_levels.values()), reverse=True):
        scores = alignment_scores(tokenizer, ids[:, level - 1], vectors, level).cpu()
        ranks = {"t2i": text_to_image_ranks(scores[:, first_caption], torch.arange(len(ids)))}
        if level == NUM_LEVELS:
            ranks["i2t"] = image_to_text_ranks(scores, torch.tensor(image_of_caption))
        for task, task_ranks in ranks.items():
            for k in RECALLS if level == NUM_LEVELS else RECALLS[-1:]:
                name = f"{task}_R@{k}" if level == NUM_LEVELS else f"{task}_R@{k} of Z_{level}"
                hits[name] = (task_ranks < k).double().numpy()[:, None]
    return hits
