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
    """Describe photos.

    Example: tavq caption photo.jpg --beam 5 --n-best 3;  tavq caption photos/ --out captions.jsonl
    """

    images: Positional[tuple[Path, ...]]
    """Photos, or one folder of them (then --out is needed; photos already described there are skipped)."""
    out: Path | None = None
    """.jsonl, .json or .csv file, or a directory for .txt side-cars; a folder's captions go there."""
    show_scores: bool = False
    """Print the score of each caption and the probability of each word (a folder's .jsonl or .json file holds
    them)."""
    unsure_below: float = 0.0
    """Mark words less probable than this as [word?], where captions are printed."""
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/ and captioner/."""
    device: Device = "auto"
    decoding: OmitArgPrefixes[DecodingConfig] = DecodingConfig()


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CaptionRun, argv, prog="tavq caption")
    if not run.images:
        raise ValueError("no photo; name one, as in: tavq caption photo.jpg")
    missing = [path for path in run.images if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no photo {missing[0]}; check the path")
    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    if any(path.is_dir() for path in run.images):
        if len(run.images) > 1 or run.out is None or run.show_scores or run.unsure_below:
            raise ValueError(
                "a folder is described into a file (.jsonl and .json with the probability of each word): "
                "tavq caption photos/ --out captions.jsonl"
            )
        count = caption_folder(
            run.images[0],
            run.out,
            lambda images: pipeline.caption(images, run.decoding),
            size_px=pipeline.tokenizer.image_size_px,
        )
        print(f"{count} photos described in {run.out}")
        return
    if run.out is not None:
        raise ValueError("captions of photos are printed; give a folder, or leave out --out")
    for path in run.images:
        for found in pipeline.caption([load_image(path)], run.decoding)[0]:
            text = found.marked(run.unsure_below) if run.unsure_below else found.text
            print(text if len(run.images) == 1 else f"{path}\t{text}")
            if run.show_scores:
                print(
                    f"  {found.score:.3f}  " + "  ".join(f"{w.text} {w.probability:.2f}" for w in found.words)
                )
