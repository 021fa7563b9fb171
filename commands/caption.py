"""tavq caption IMAGE: describe an image, or a folder of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from tavq.base.arguments import parse, run_main
from tavq.base.device import Device, choose_device
from tavq.captioner.caption_folder import caption_folder
from tavq.captioner.decoding import DecodingConfig
from tavq.data.images import load_image
from tavq.pipeline import CHECKPOINT, Pipeline


@dataclasses.dataclass(frozen=True)
class CaptionRun:
    """Describe images.

    Examples: tavq caption photo.jpg --beam 5 --n-best 3;  tavq caption photos/ --out captions.jsonl
    """

    images: Positional[tuple[Path, ...]]
    """Images, or one folder of them. A folder needs --out; images already described there are skipped."""
    out: Path | None = None
    """File (.jsonl, .json or .csv) or directory of .txt files for the captions of a folder."""
    show_scores: bool = False
    """Print the score of each caption and the probability of each word. For a folder, .jsonl and .json files
    hold them."""
    unsure_below: float = 0.0
    """Mark words less probable than this as [word?] where captions are printed."""
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/ and captioner/."""
    device: Device = "auto"
    """Device to run on."""
    decoding: OmitArgPrefixes[DecodingConfig] = DecodingConfig()


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CaptionRun, argv, prog="tavq caption")
    if not run.images:
        raise ValueError("no image; name one, as in: tavq caption photo.jpg")
    missing = [path for path in run.images if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no image {missing[0]}; check the path")
    is_folder = any(path.is_dir() for path in run.images)
    if is_folder and (len(run.images) > 1 or run.out is None or run.show_scores or run.unsure_below):
        raise ValueError(
            "a folder is described into a file (.jsonl and .json with the probability of each word): "
            "tavq caption photos/ --out captions.jsonl"
        )
    if not is_folder and run.out is not None:
        raise ValueError("captions of images are printed; give a folder, or leave out --out")

    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    if run.out is not None:
        describe_folder(pipeline, run, run.out)
    else:
        for path in run.images:
            print_captions(pipeline, path, run)


def describe_folder(pipeline: Pipeline, run: CaptionRun, out: Path) -> None:
    """Write the captions of a folder's images to `out`."""
    count = caption_folder(
        run.images[0],
        out,
        lambda images: pipeline.caption(images, run.decoding),
        size_px=pipeline.tokenizer.image_size_px,
    )
    print(f"{count} images described in {out}")


def print_captions(pipeline: Pipeline, path: Path, run: CaptionRun) -> None:
    """Print the captions of one image, best first."""
    for caption in pipeline.caption([load_image(path)], run.decoding)[0]:
        text = caption.marked(run.unsure_below) if run.unsure_below else caption.text
        print(text if len(run.images) == 1 else f"{path}\t{text}")
        if run.show_scores:
            words = "  ".join(f"{word.text} {word.probability:.2f}" for word in caption.words)
            print(f"  {caption.score:.3f}  {words}")
