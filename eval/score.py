"""tavq score captions RESULTS.json REFERENCES.json --out scores.json
tavq score images GENERATED/ REFERENCE/ [--features NETWORK.pt] --out scores.json
tavq score faithfulness GENERATED/ [--model NAME [--endpoint URL]] --out scores.json

Score other people's output with the same code and the same protocol block as ours.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from tavq.base.arguments import parse, print_json, run_main
from tavq.base.cache import cache_directory
from tavq.base.device import Device, choose_device
from tavq.base.files import check_file, file_sha256
from tavq.data.annotations import check_string, parse_json, read_text
from tavq.eval.config import ScoreFaithfulness
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
    """Score captions in COCO's result format against human captions.

    Example: tavq score captions results.json dataset_flickr8k.json --out scores.json
    """

    results: Positional[Path]
    """JSON file [{"image_id": ..., "caption": ...}, ...] with one caption per image."""
    references: Positional[Path]
    """JSON file with the human captions: COCO annotations, or the Karpathy layout."""
    out: Path
    """Result file to write."""
    split: str = "test"
    """Split of a Karpathy file; COCO annotations have none."""
    backend: Backend = "auto"
    """PTB tokenizer: java, python (the tokens are the same), or auto. METEOR and SPICE need Java."""
    timeout_s: float = 600.0
    """Time limit of a Java process, in seconds."""
    label: str | None = None
    """Name of this result in tables. By default the name of the file with the captions."""
    compare: Path | None = None
    """Another result file to compare with: prints both with the difference and its interval."""
    json: bool = False
    """Print one line of JSON instead of text."""


@dataclass(frozen=True)
class ScoreImages:
    """Compare a folder of generated images with a folder of reference images.

    Example: tavq score images generated/ real/ --features mobilenet_v2_features.pt --out scores.json
    """

    generated: Positional[Path]
    """Folder with png or jpg images."""
    reference: Positional[Path]
    """Folder with the real images, best as many as generated ones."""
    out: Path
    """Result file to write."""
    features: Path | None = None
    """TorchScript feature network (uint8 B,3,H,W -> B,D). By default Inception v3.
    A program: it runs only if networks.lock or TAVQ_TRUST holds its SHA-256."""
    image_size_px: int | None = None
    """Side that every image is squashed to first (antialiased bicubic). Needed where sizes differ."""
    kid_subsets: int = 100
    """Number of random subsets that KID averages over."""
    kid_subset_size: int = 250
    """Images in each subset."""
    seed: int = 2020
    """Seed for the subsets of KID and the shuffle of IS."""
    device: Device = "auto"
    """Device that the feature network runs on."""
    label: str | None = None
    """Name of this result in tables. By default the name of the folder."""
    compare: Path | None = None
    """Another result file to compare with: prints both with the difference."""
    json: bool = False
    """Print one line of JSON instead of text."""


@run_main
def captions(argv: Sequence[str] | None = None) -> None:
    """Run `tavq score captions`."""
    config = parse(ScoreCaptions, argv, prog="tavq score captions")
    _check_paths(config)
    score_captions(config)
    _print_comparison(config)


@run_main
def images(argv: Sequence[str] | None = None) -> None:
    """Run `tavq score images`."""
    config = parse(ScoreImages, argv, prog="tavq score images")
    _check_paths(config)
    score_images(config)
    _print_comparison(config)


@run_main
def faithfulness(argv: Sequence[str] | None = None) -> None:
    """Run `tavq score faithfulness`."""
    config = parse(ScoreFaithfulness, argv, prog="tavq score faithfulness")
    _check_paths(config)

    from tavq.eval.score_faithfulness import score_faithfulness

    score_faithfulness(config)
    _print_comparison(config)


def _check_paths(config: ScoreCaptions | ScoreImages | ScoreFaithfulness) -> None:
    """Refuse what the flags name and is not there, before anything is computed."""
    if config.compare is not None and not config.compare.is_file():
        raise FileNotFoundError(f"no result file {config.compare} to compare with; check --compare")
    check_file(config.out, ".json")


def _print_comparison(config: ScoreCaptions | ScoreImages | ScoreFaithfulness) -> None:
    if config.compare is not None and not config.json:
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
    if config.json:
        print_json({"path": str(config.out), "metrics": metrics, "protocol": protocol})
        return
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
    kid: dict[str, Any] = {
        "kid_subsets": config.kid_subsets,
        "kid_subset_size": config.kid_subset_size,
        "seed": config.seed,
    }
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
    if config.json:
        print_json({"path": str(config.out), "metrics": metrics, "protocol": protocol})
        return
    _print_metrics(metrics, {} if "IS" in metrics else {"IS": "needs a network that classifies"})


def read_caption_results(path: Path) -> dict[str, str]:
    """Read captions in COCO's result format as image id -> caption."""
    rows = _read_json(path)
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"image_id", "caption"} <= row.keys() for row in rows
    ):
        raise ValueError(f'{path} is no caption file; expected [{{"image_id", "caption"}}, ...]')
    captions: dict[str, str] = {}
    for row in rows:
        image = str(row["image_id"])
        if image in captions:
            raise ValueError(f"{path} has several captions for image {image}; give one an image")
        captions[image] = check_string(row["caption"], f"{path}, image {image}")
    if not captions:
        raise ValueError(f"{path} holds no caption; give one an image")
    return captions


def read_references(path: Path, split: str, wanted: dict[str, str]) -> dict[str, list[str]]:
    """Read the human captions of the `wanted` image ids, from COCO annotations or a Karpathy file.

    As in COCO's own evaluation, images without a caption to score are left out, with a warning.
    """
    content = _read_json(path)
    if not isinstance(content, dict) or not {"annotations", "images"} & content.keys():
        raise ValueError(f"{path} holds no references; expected COCO annotations or a Karpathy file")
    try:
        if "annotations" in content:
            candidates = [_coco_references(content["annotations"])]
        else:
            # The ids of a Karpathy file have several names; those that most results carry are meant.
            candidates = [_karpathy_references(content["images"], split, key) for key in KARPATHY_IDS]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}); expected COCO annotations or a Karpathy file"
        ) from error

    references = max(candidates, key=lambda candidate: len(candidate.keys() & wanted.keys()))
    missing = [image for image in wanted if image not in references]
    if missing:
        raise ValueError(
            f"{path} has no captions for {len(missing)} of {len(wanted)} images (first: {missing[0]}); "
            "check the ids and --split"
        )
    if len(references) > len(wanted):
        warnings.warn(
            f"{len(wanted)} of the {len(references)} images in {path.name} are scored", stacklevel=2
        )
    return {
        image: [check_string(caption, f"{path}, image {image}") for caption in references[image]]
        for image in wanted
    }


def _coco_references(annotations: list[dict[str, Any]]) -> dict[str, list[str]]:
    references: dict[str, list[str]] = {}
    for annotation in annotations:
        references.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    return references


def _karpathy_references(images: list[dict[str, Any]], split: str, key: str) -> dict[str, list[str]]:
    references: dict[str, list[str]] = {}
    for image in images:
        entry = image | {"stem": Path(image.get("filename", "")).stem}
        if entry.get("split") == split and key in entry:
            references[str(entry[key])] = [sentence["raw"] for sentence in entry["sentences"]]
    return references


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a JSON of captions")
    return parse_json(read_text(path), str(path))


def _print_metrics(metrics: dict[str, dict[str, Any]], skipped: dict[str, str]) -> None:
    for name, entry in metrics.items():
        interval = f"  [{entry['low']:.5f}, {entry['high']:.5f}]" if "low" in entry else ""
        print(f"{name:<20}{entry['value']:>12.5f}{interval}")
    for name, reason in skipped.items():
        print(f"{name:<20}{'-':>12}  {reason}")
