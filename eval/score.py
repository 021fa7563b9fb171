"""tavq score captions RESULTS.json REFERENCES.json --out scores.json
tavq score images GENERATED/ REFERENCE/ [--features NETWORK.pt] --out scores.json

Score other people's output with the same code and the same protocol block as ours.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from tavq.base.arguments import parse, run_main
from tavq.base.cache import cache_directory
from tavq.base.device import Device, choose_device
from tavq.base.files import file_sha256
from tavq.eval.results import (
    caption_fields,
    format_comparison,
    make_protocol,
    measured,
    with_intervals,
    write_results,
)
from tavq.metrics.captions import Backend, caption_metrics

KARPATHY_IDS = ("cocoid", "imgid", "filename", "stem")


@dataclass(frozen=True)
class ScoreCaptions:
    """Score captions in COCO's result format against human captions."""

    results: Positional[Path]
    """JSON: [{"image_id": ..., "caption": ...}, ...], one caption an image."""
    references: Positional[Path]
    """JSON with the human captions: COCO annotations, or the Karpathy layout."""
    out: Path
    """The JSON to write."""
    split: str = "test"
    """Which split of a Karpathy file; COCO annotations have none."""
    backend: Backend = "auto"
    """Who tokenises; the tokens are the same. METEOR and SPICE need Java."""
    timeout_s: float = 600.0
    """The longest a Java process may take."""
    label: str | None = None
    """What tables call this row; the name of the results file if not given."""
    compare: Path | None = None
    """Another result file: print both with the difference and its interval."""


@dataclass(frozen=True)
class ScoreImages:
    """Compare a folder of generated images with a folder of reference images."""

    generated: Positional[Path]
    """Folder with png or jpg images."""
    reference: Positional[Path]
    """Folder with the real ones; as many as generated, best."""
    out: Path
    """The JSON to write."""
    features: Path | None = None
    """TorchScript feature network (uint8 B,3,H,W -> B,D); Inception v3 if not given."""
    image_size_px: int | None = None
    """Squash every image to this square first (antialiased bicubic); needed where sizes differ."""
    kid_subsets: int = 100
    """KID averages over so many random subsets."""
    kid_subset_size: int = 250
    """Images in each of them."""
    seed: int = 2020
    """Seed of KID's subsets and of IS's shuffle."""
    device: Device = "auto"
    """Where the feature network runs."""
    label: str | None = None
    """What tables call this row; the name of the folder if not given."""
    compare: Path | None = None
    """Another result file: print both with the difference."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    """Run `tavq score captions|images`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    kinds: dict[str, tuple[type, Callable[[Any], None]]] = {
        "captions": (ScoreCaptions, score_captions),
        "images": (ScoreImages, score_images),
    }
    if argv[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return
    if not argv or argv[0] not in kinds:
        raise ValueError(f"{' '.join(argv[:1]) or 'nothing'} to score; choose one of: captions, images")
    config_class, run = kinds[argv[0]]
    config: Any = parse(config_class, argv[1:], prog=f"tavq score {argv[0]}")
    if config.compare is not None and not config.compare.is_file():
        raise FileNotFoundError(f"no result file {config.compare} to compare with; check --compare")
    run(config)
    if config.compare is not None:
        print(format_comparison(config.compare, config.out))


def score_captions(config: ScoreCaptions) -> None:
    """Score a file of captions and write the result file."""
    started = time.monotonic()
    hypotheses = read_caption_results(config.results)
    references = read_references(config.references, config.split, hypotheses)
    scores = caption_metrics(hypotheses, references, backend=config.backend, timeout_s=config.timeout_s)
    metrics = with_intervals(scores.statistics)
    protocol = make_protocol(
        task="captions",
        ids=scores.ids,
        started=started,
        label=config.label or config.results.stem,
        split=config.split,
        generated_sha256=file_sha256(config.results),
        **caption_fields(references),
        backend=scores.backend,
        skipped=scores.skipped,
    )
    write_results(config.out, metrics, protocol, per_image=scores.statistics, ids=scores.ids)
    print(f"{len(scores.ids)} images, tokenised by {scores.backend}")
    _print_metrics(metrics, scores.skipped)


def score_images(config: ScoreImages) -> None:
    """Score a folder of images and write the result file."""
    from tavq.metrics.features import ImageSet, image_files, load_network
    from tavq.metrics.frechet import image_metrics

    started = time.monotonic()
    names = [path.name for path in image_files(config.generated)]
    generated, reference = (ImageSet(p, config.image_size_px) for p in (config.generated, config.reference))
    network = load_network(config.features)
    kid = {"kid_subsets": config.kid_subsets, "kid_subset_size": config.kid_subset_size, "seed": config.seed}
    scores = image_metrics(
        generated,
        reference,
        network,
        device=choose_device(config.device),
        cache_dir=cache_directory("image_features"),
        **kid,
    )
    metrics = {
        name: measured(value, scores.n_generated, deviation=scores.deviations.get(name))
        for name, value in scores.values.items()
    }
    protocol = make_protocol(
        task="images",
        ids=map(str, range(len(names))),
        started=started,
        label=config.label or config.generated.name,
        reference_sha256=reference.sha256,
        reference_n=scores.n_reference,
        generated_sha256=generated.sha256,
        resize=f"squashed to {config.image_size_px} px, antialiased bicubic"
        if config.image_size_px
        else "none",
        feature_network={"name": network.name, "sha256": network.sha256},
        kid=kid,
    )
    write_results(config.out, metrics, protocol)
    _print_metrics(metrics, {} if "IS" in metrics else {"IS": "needs a network that classifies"})


def read_caption_results(path: Path) -> dict[str, str]:
    """Read COCO-format results as image id -> caption."""
    items = _read_json(path)
    try:
        pairs = [(str(item["image_id"]), str(item["caption"])) for item in items]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f'{path} is no caption file ({error}); expected [{{"image_id", "caption"}}, ...]'
        ) from error
    captions = dict(pairs)
    if len(captions) != len(pairs):
        twice = next(i for i, _ in pairs if sum(i == other for other, _ in pairs) > 1)
        raise ValueError(f"{path} has several captions for image {twice}; give one an image")
    if not captions:
        raise ValueError(f"{path} holds no caption; give one an image")
    return captions


def read_references(path: Path, split: str, wanted: dict[str, str]) -> dict[str, list[str]]:
    """Read the human captions of the `wanted` image ids, from COCO annotations or a Karpathy file.

    As COCO's own evaluation does, images without a caption to score are left out; the count is warned about.
    """
    content = _read_json(path)
    if isinstance(content, dict) and "annotations" in content:
        candidates = [_coco_references(content["annotations"])]
    elif isinstance(content, dict) and "images" in content:
        candidates = [_karpathy_references(content["images"], split, key) for key in KARPATHY_IDS]
    else:
        raise ValueError(f"{path} holds no references; expected COCO annotations or a Karpathy file")
    known = max(candidates, key=lambda references: len(references.keys() & wanted.keys()))
    missing = [i for i in wanted if i not in known]
    if missing:
        raise ValueError(
            f"{path} has no captions for {len(missing)} of {len(wanted)} images (first: {missing[0]}); "
            "check the ids and --split"
        )
    if len(known) > len(wanted):
        warnings.warn(f"{len(wanted)} of the {len(known)} images in {path.name} are scored", stacklevel=2)
    return {i: known[i] for i in wanted}


def _coco_references(annotations: list[dict[str, Any]]) -> dict[str, list[str]]:
    references: dict[str, list[str]] = {}
    for annotation in annotations:
        references.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    return references


def _karpathy_references(images: list[dict[str, Any]], split: str, key: str) -> dict[str, list[str]]:
    images = [image | {"stem": Path(image.get("filename", "")).stem} for image in images]
    chosen = [image for image in images if image.get("split") == split and key in image]
    return {str(image[key]): [sentence["raw"] for sentence in image["sentences"]] for image in chosen}


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a JSON of captions")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected captions in COCO's format") from error


def _print_metrics(metrics: dict[str, dict[str, Any]], skipped: dict[str, str]) -> None:
    for name, entry in metrics.items():
        interval = f"  [{entry['low']:.5f}, {entry['high']:.5f}]" if "low" in entry else ""
        print(f"{name:<20}{entry['value']:>12.5f}{interval}")
    for name, reason in skipped.items():
        print(f"{name:<20}{'-':>12}  {reason}")


if __name__ == "__main__":
    main()
