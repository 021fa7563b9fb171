"""tavq caption IMAGE: describe an image, or a folder of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import OmitArgPrefixes, Positional

from tavq.base.arguments import parse, print_json, run_main
from tavq.base.device import Device, choose_device
from tavq.base.engine import EngineConfig
from tavq.base.files import check_directory, check_file
from tavq.base.weights import CHECKPOINT, local_directory, part_hashes
from tavq.captioner.config import OUTPUT_SUFFIXES, DecodingConfig
from tavq.serve.config import check_ray

if TYPE_CHECKING:
    from tavq.captioner.caption_folder import ComputeRows
    from tavq.pipeline import Pipeline

BATCHES_PER_PART = 8
"""Batches of images that a task of --engine ray captions: half a minute on a core."""


@dataclasses.dataclass(frozen=True)
class CaptionRun:
    """Describe images.

    Examples: tavq caption photo.jpg --beam 5 --n-best 3;  tavq caption photos/ --out captions.jsonl
    """

    images: Positional[tuple[Path, ...]]
    """Images, or one folder of them. A folder needs --out."""
    out: Path | None = None
    """File (.jsonl, .json or .csv) or directory of .txt files for the captions. Images already described
    there are skipped."""
    show_scores: bool = False
    """Print the score of each caption and the probability of each word. For a folder, .jsonl and .json files
    hold them."""
    unsure_below: float = 0.0
    """Mark words less probable than this as [word?] where captions are printed."""
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/ and captioner/."""
    device: Device = "auto"
    """Device to run on."""
    json: bool = False
    """Print one line of JSON for each result, instead of text."""
    decoding: OmitArgPrefixes[DecodingConfig] = DecodingConfig()
    engine: OmitArgPrefixes[EngineConfig] = EngineConfig()


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CaptionRun, argv, prog="tavq caption")
    if not run.images:
        raise ValueError("no image; name one, as in: tavq caption photo.jpg")
    missing = [path for path in run.images if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no image {missing[0]}; check the path")
    is_folder = any(path.is_dir() for path in run.images)
    if is_folder and (len(run.images) > 1 or run.out is None):
        raise ValueError("a folder is described into a file: tavq caption photos/ --out captions.jsonl")
    if run.out is not None and (run.show_scores or run.unsure_below or run.json):
        raise ValueError(
            "--show-scores, --unsure-below and --json are for printing; leave them out with --out, whose "
            ".jsonl and .json files hold the probability of each word"
        )
    if run.out is not None:
        check_output(run.out)
    elif run.engine.engine == "ray":
        raise ValueError("--engine ray needs --out, a file or directory for the captions of a folder")

    from tavq.captioner.caption_folder import images_in
    from tavq.pipeline import Pipeline

    images = images_in(run.images[0]) if is_folder else {str(path): path for path in run.images}
    if run.out is not None:
        write_captions(run, images, run.out)
        return
    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    for path in run.images:
        print_captions(pipeline, path, run)


def check_output(out: Path) -> None:
    """Refuse a file that captions cannot be written to, before the models are loaded."""
    if out.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"cannot write {out}; name a .jsonl, .json or .csv file, or a directory")
    if out.suffix == "":
        check_directory(out)
    else:
        check_file(out)


def write_captions(run: CaptionRun, images: Mapping[str, Path], out: Path) -> None:
    """Write the captions of images, by name in the output, to `out`."""
    from tavq.captioner.caption_folder import caption_files

    if run.engine.engine == "ray":
        check_ray()
        from tavq.serve.ray_jobs import clear_parts

        parts = out.with_name(f"{out.name}.parts")
        count = caption_files(images, out, captioned_on_ray(run, parts))
        clear_parts(parts)
    else:
        count = caption_files(images, out, captioned_here(run))
    print(f"{count} image{'' if count == 1 else 's'} described in {out}")


def captioned_here(run: CaptionRun) -> ComputeRows:
    """Load the models, and return the function that captions in this process."""
    from tavq.captioner.caption_folder import caption_batches
    from tavq.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    return lambda left: caption_batches(
        left, lambda batch: pipeline.caption(batch, run.decoding), size_px=pipeline.tokenizer.image_size_px
    )


def captioned_on_ray(run: CaptionRun, parts: Path) -> ComputeRows:
    """Return the function that has images captioned on a Ray cluster."""
    from tavq.captioner.caption_folder import BATCH_SIZE
    from tavq.serve.ray_jobs import PartJob
    from tavq.serve.work import open_captioner

    checkpoint = local_directory(run.checkpoint).resolve()

    def compute(left: Sequence[tuple[str, Path]]) -> Iterable[Sequence[dict[str, Any]]]:
        job = PartJob(
            parts,
            [(name, path.resolve()) for name, path in left],
            BATCH_SIZE * BATCHES_PER_PART,
            open_captioner,
            (str(checkpoint), run.device, run.decoding),
            fingerprint=f"caption {run.decoding} {part_hashes(checkpoint)}",
        )
        return job.rows(run.engine) if left else ()

    return compute


def print_captions(pipeline: Pipeline, path: Path, run: CaptionRun) -> None:
    """Print the captions of one image, best first."""
    captions = pipeline.caption(path, run.decoding)[0]
    if run.json:
        print_json({"image": str(path), "captions": captions.to_json()})
        return
    for caption in captions:
        text = caption.marked(run.unsure_below) if run.unsure_below else caption.text
        print(text if len(run.images) == 1 else f"{path}\t{text}")
        if run.show_scores:
            words = "  ".join(f"{word.text} {word.probability:.2f}" for word in caption.words)
            print(f"  {caption.score:.3f}  {words}")
