"""python benchmarks/caption.py --data DIR [--checkpoint DIR] [--images 1000] [--into FILE.md]

Images captioned a second at batch 1 and 32, greedy and beam 5, with the share of time of each part.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from tavq.base.arguments import parse, run_main
from tavq.base.weights import shipped_checkpoint
from tavq.captioner.config import GREEDY, DecodingConfig
from tavq.captioner.decoding import decode_word_ids, to_captions
from tavq.captioner.model import Captioner
from tavq.data.dataset import readable_images
from tavq.data.images import to_tensor
from tavq.data.layouts import open_dataset
from tavq.eval.table import with_block, write_block
from tavq.tokenizer.model import TAVQTokenizer

SETTINGS = {"greedy": GREEDY, "beam 5": DecodingConfig(beam=5)}
PARTS = ("reading", "tokenizer", "decoder", "words")


@dataclasses.dataclass(frozen=True)
class CaptionBenchmark:
    """Images captioned a second, from the file to the sentence with its probabilities."""

    data: str = "shapes"
    """Dataset whose test split is captioned: a directory in any known layout, `shapes` or `scenes`."""
    checkpoint: Path = shipped_checkpoint()
    """Directory that holds tokenizer/ and captioner/."""
    images: int = 1000
    batch_sizes: tuple[int, ...] = (1, 32)
    device: str = "cpu"
    into: Path | None = None
    """Markdown file whose block between the marker lines of `caption` the table replaces."""

    def __post_init__(self) -> None:
        if self.into is not None:
            with_block(self.into, "caption", "")  # refused now, not after the work


class Stopwatch:
    """Seconds spent in each part."""

    def __init__(self, device: str):
        self.device, self.seconds = device, dict.fromkeys(PARTS, 0.0)
        self.since = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap for `part`."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self.since
        self.since = now


def measure(
    tokenizer: TAVQTokenizer,
    captioner: Captioner,
    images: Iterator[Image.Image],
    settings: DecodingConfig,
    batch_size: int,
    device: str,
) -> tuple[int, dict[str, float]]:
    """Caption `images`; returns how many, and the seconds of each part."""
    watch, count, batch = Stopwatch(device), 0, []
    for image in itertools.chain(images, [None]):
        if image is not None:
            batch.append(to_tensor(image, tokenizer.image_size_px))
        watch.lap("reading")
        if batch and (image is None or len(batch) == batch_size):
            ids = tokenizer.encode(torch.stack(batch).to(device)).flatten(1)
            watch.lap("tokenizer")
            found = decode_word_ids(captioner, ids, settings)
            watch.lap("decoder")
            to_captions(captioner, ids, found, settings)
            watch.lap("words")
            count, batch = count + len(batch), []
    return count, watch.seconds


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CaptionBenchmark, argv, prog="python benchmarks/caption.py")
    tokenizer = TAVQTokenizer.from_pretrained(run.checkpoint / "tokenizer").to(run.device)
    captioner = Captioner.from_pretrained(run.checkpoint / "captioner").to(run.device)
    captioner.check_codebook(tokenizer.codebook_hash)
    dataset = open_dataset(run.data, "test").take(run.images)
    lines = [
        f"{len(dataset)} images, {run.device}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "",
        "| search | batch | images/s | " + " | ".join(PARTS) + " |",
        "| --- |" + " ---: |" * (2 + len(PARTS)),
    ]
    for name, settings in SETTINGS.items():
        warm_up = (dataset.load_image(0) for _ in range(2))
        measure(tokenizer, captioner, warm_up, settings, 1, run.device)
        for batch_size in run.batch_sizes:
            images = (image for _, image in readable_images(dataset))
            count, seconds = measure(tokenizer, captioner, images, settings, batch_size, run.device)
            total = sum(seconds.values())
            shares = " | ".join(f"{seconds[part] / total:.0%}" for part in PARTS)
            lines.append(f"| {name} | {batch_size} | {count / total:.1f} | {shares} |")
    table = "\n".join(lines)
    print(table)
    if run.into is not None:
        write_block(run.into, "caption", table)


if __name__ == "__main__":
    main()
