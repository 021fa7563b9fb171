"""python eval/run_tokenizer.py [--checkpoint DIR] [--data DIR] [--split test] [--features NETWORK.pt]

Measure a tokenizer: reconstruction (rFID, PSNR, SSIM, spectra), use of the codebook, retrieval by its codes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tavq.alignment.projections import NUM_LEVELS
from tavq.base.arguments import parse, run_main
from tavq.data.dataset import ImageTextDataset
from tavq.data.images import to_uint8
from tavq.eval.evaluation import (
    EvaluationRun,
    at_reference_size,
    image_metric_options,
    network_fields,
    open_network,
    photos,
    print_metrics,
    reference_set,
    resized,
)
from tavq.eval.judge import JUDGE_DISTANCE, JudgeDistance, judge_fields, open_judge
from tavq.eval.results import format_comparison, make_protocol, measured, with_intervals, write_results
from tavq.metrics.features import ImageSet
from tavq.metrics.frechet import image_metrics
from tavq.metrics.image import psnr, ssim
from tavq.metrics.spectral import WEAVE_FIELDS, flat_patches, octave_statistics, weave_statistics
from tavq.pipeline import Pipeline
from tavq.tokenizer.codebook_usage import codebook_usage
from tavq.tokenizer.retrieval import alignment_scores, image_to_text_ranks, text_to_image_ranks

RECALLS = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class TokenizerEvaluation(EvaluationRun):
    """Measure a tokenizer: reconstruction, use of the codebook, retrieval through the codes.

    Example: python eval/run_tokenizer.py --features mobilenet_v2_features.pt --out results/tokenizer.json
    """

    features: Path | None = None
    """TorchScript feature network (uint8 B,3,H,W -> B,D) that names the metric; Inception v3 if not given."""
    frechet: bool = True
    """Measure rFID or rFD; without it no feature network is needed."""
    judge: str | None = None
    """Checkpoint whose encoder measures a second Frechet distance; its codebook must be another."""
    retrieval: bool = True
    """Measure text-to-image and image-to-text recall, where the tokenizer is aligned with text."""


def reconstruct(pipeline: Pipeline, images: Tensor) -> tuple[Tensor, Tensor]:
    """Photos (n, 3, S, S) uint8 -> ids of all levels (n, 3, h, w) and reconstructions (n, 3, S', S') uint8,
    one at a time."""
    tokenizer, ids, rebuilt = pipeline.tokenizer, [], []
    for image in tqdm(images, desc="reconstructing", unit="image", disable=None):
        levels = tokenizer.encode_levels((image[None].float() / 127.5 - 1).to(pipeline.device))
        ids.append(levels)
        rebuilt.append(to_uint8(tokenizer.decode(levels[:, -1])).cpu())
    return torch.cat(ids), torch.cat(rebuilt)


def codebook_use(ids: Tensor, num_codes: int) -> dict[str, dict[str, Any]]:
    """Usage and perplexity, with the number of tokens counted (see `codebook_usage`)."""
    use = codebook_usage(ids, num_codes)
    return {
        name: measured(getattr(use, name), len(ids), tokens=use.tokens) for name in ("usage", "perplexity")
    }


def retrieval(pipeline: Pipeline, dataset: ImageTextDataset, ids: Tensor) -> dict[str, np.ndarray]:
    """Hits (n, 1) a query by metric: the first caption against all photos, and each photo against all
    captions.

    Args:
        ids: (n, 3, h, w). Those of the last level are the tokens; the others' recall is reported apart.
    """
    tokenizer, hits = pipeline.tokenizer, {}
    owners = [row for row, example in enumerate(dataset.examples) for _ in example.captions]
    captions = [caption for example in dataset.examples for caption in example.captions]
    vectors = pipeline.alignment_encoder.encode(captions)
    first = torch.tensor([owners.index(row) for row in range(len(ids))])
    for level in sorted(set(tokenizer.aligned_levels.values()), reverse=True):
        scores = alignment_scores(tokenizer, ids[:, level - 1], vectors, level).cpu()
        ranks = {"t2i": text_to_image_ranks(scores[:, first], torch.arange(len(ids)))}
        if level == NUM_LEVELS:
            ranks["i2t"] = image_to_text_ranks(scores, torch.tensor(owners))
        for way, found in ranks.items():
            for k in RECALLS if level == NUM_LEVELS else RECALLS[-1:]:
                name = f"{way}_R@{k}" if level == NUM_LEVELS else f"{way}_R@{k} of Z_{level}"
                hits[name] = (found < k).double().numpy()[:, None]
    return hits


def pixel_statistics(rebuilt: Tensor, originals: Tensor, shrunk: Tensor) -> dict[str, np.ndarray]:
    """Statistics of each reconstruction by metric that need no network.

    Args:
        rebuilt: (n, 3, S', S') uint8.
        originals: (n, 3, S, S) uint8, at the size that is read. PSNR and SSIM are taken there, so that
            tokenizers that decode at another size compare.
        shrunk: (n, 3, S', S') uint8, at the size that is decoded. Spectra are taken there.
    """
    small = resized(rebuilt, originals.shape[-1])
    flat = flat_patches(shrunk)
    return {
        "PSNR": psnr(small, originals)[:, None],
        "SSIM": ssim(small, originals)[:, None],
        **octave_statistics(rebuilt, shrunk),
        **weave_statistics(rebuilt, flat, shrunk, flat),
    }


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(TokenizerEvaluation, argv, prog="python eval/run_tokenizer.py")
    started = time.monotonic()
    pipeline, dataset = run.open(("tokenizer",))
    judge = open_judge(run.judge, pipeline) if run.judge else None
    network = open_network(run.features, pipeline.directory) if run.frechet else None
    size = pipeline.tokenizer.image_size_px
    decode_size = pipeline.tokenizer.decode_size_px

    originals, indices = photos(dataset, size)
    evaluated = readable_part(dataset, indices)
    shrunk = originals if decode_size == size else photos(evaluated, decode_size)[0]
    ids, rebuilt = reconstruct(pipeline, originals)

    per_image = pixel_statistics(rebuilt, originals, shrunk)
    if run.retrieval and pipeline.tokenizer.aligned_levels:
        per_image |= retrieval(pipeline, evaluated, ids)
    metrics: dict[str, Any] = {}
    floors: dict[str, float] = {}
    protocol = run.protocol_fields(pipeline, evaluated) | {"image_size_px": size, "weave": WEAVE_FIELDS}

    if network is not None:
        reference, _ = reference_set(evaluated)
        options = image_metric_options(len(reference), str(pipeline.device))
        rebuilt_scores = image_metrics(ImageSet(at_reference_size(rebuilt)), reference, network, **options)
        shrunk_scores = image_metrics(ImageSet(at_reference_size(shrunk)), reference, network, **options)
        name = network.frechet_name
        metrics[f"r{name}"] = measured(rebuilt_scores.values[name], len(ids))
        floors[f"{name} of photos at {decode_size} px"] = shrunk_scores.values[name]
        protocol |= network_fields(network, len(reference))
    if judge is not None:
        distance = JudgeDistance(judge, evaluated)
        metrics[f"r{JUDGE_DISTANCE}"] = measured(distance(rebuilt), len(ids))
        floors |= distance.floors(shrunk, run.other_split(len(ids)))
        protocol |= judge_fields(judge, pipeline, ("tokenizer",))

    metrics |= with_intervals(per_image) | codebook_use(ids[:, -1].cpu(), pipeline.tokenizer.num_codes)
    path = run.result_path("tokenizer")
    result = make_protocol(task="tokenizer", ids=evaluated.ids, started=started, **protocol, floors=floors)
    write_results(path, metrics, result, per_image=per_image, ids=evaluated.ids)
    print_metrics(metrics, path)
    for floor, value in floors.items():
        print(f"floor: {floor} {value:.1f}")
    if run.compare is not None:
        print(format_comparison(run.compare, path))


def readable_part(dataset: ImageTextDataset, indices: list[int]) -> ImageTextDataset:
    """The photos that could be read."""
    return ImageTextDataset(dataset.name, [dataset[index] for index in indices])


if __name__ == "__main__":
    main()
