"""python benchmarks/metrics.py [--sizes 1000 5000] [--into FILE.md]

Claim: the metrics cost no more than torch-fidelity and pycocoevalcap called plainly, and captions score
faster without Java. Seconds, CPU seconds (all threads, Java's included) and peak memory, each case in a
process of its own, on made-up images (64 px, a small network) and captions.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tavq.base.arguments import parse, run_main
from tavq.base.files import file_sha256
from tavq.eval.table import with_block, write_block

CASES = {
    "captions, pycocoevalcap": "captions, pycocoevalcap",
    "captions, java": "captions, pycocoevalcap",
    "captions, python": "captions, pycocoevalcap",
    "images, torch-fidelity": "images, torch-fidelity",
    "images, ours": "images, torch-fidelity",
    "images, ours, cached": "images, torch-fidelity",
}
"""Case -> the library called plainly that it is held against."""
PURE = ("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L")
FEATURE_WIDTH = 512
WORDS = """
a the two man woman dog black white young little boy girl in on with of at near red blue running sitting
standing playing holding wearing jumping street beach field water grass snow bench shirt ball camera
people group , building bike mountain rock wall tree and is are up down through front behind large small
brown
""".split()


@dataclass(frozen=True)
class Benchmark:
    """Time the metrics against the libraries below them, without METEOR (one Java program for all)."""

    sizes: tuple[int, ...] = (1000, 5000)
    """Numbers of images."""
    rounds: int = 2
    """Cases take turns and keep their best round."""
    into: Path | None = None
    """Markdown file whose block between the marker lines of `metrics` the table replaces."""

    def __post_init__(self) -> None:
        if self.into is not None:
            with_block(self.into, "metrics", "")  # refused now, not after the work


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    """Run every case at every size and print a table."""
    config = parse(Benchmark, argv, prog="benchmarks/metrics.py")
    lines = [
        "| case | images | seconds | of the library's | CPU s | peak MiB |",
        "| --- |" + " ---: |" * 5,
    ]
    with tempfile.TemporaryDirectory() as folder:
        for size in config.sizes:
            make_images(Path(folder), size)
            rounds = [
                {case: in_a_process(case, size, folder) for case in CASES} for _ in range(config.rounds)
            ]
            best = {case: min((r[case] for r in rounds), key=lambda row: row["seconds"]) for case in CASES}
            for case, library in CASES.items():
                row = best[case]
                ratio = row["seconds"] / best[library]["seconds"]
                numbers = (
                    f"{row['seconds']:.2f} | {ratio:.2f} | {row['cpu_seconds']:.2f} | {row['peak_mib']:.0f}"
                )
                lines.append(f"| {case} | {size:,} | {numbers} |")
    table = "\n".join(lines)
    print(table)
    if config.into is not None:
        write_block(config.into, "metrics", table)


def in_a_process(case: str, size: int, folder: str) -> dict[str, float]:
    """Run one case in a process of its own."""
    command = [sys.executable, __file__, "--case", case, str(size), folder]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def run_case(case: str, size: int, folder: Path) -> None:
    """Run one case and print its row; imports and the loading of the network are not timed."""
    work = captions_case(case, size) if case.startswith("captions") else images_case(case, size, folder)
    started, cpu_started = time.perf_counter(), sum(os.times()[:4])
    work()
    seconds, cpu_seconds = time.perf_counter() - started, sum(os.times()[:4]) - cpu_started
    peak = (
        sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        / 1024
    )
    row = {"case": case, "images": size, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak}
    print(json.dumps(row))


def captions_case(case: str, size: int):
    """Return the work: five references and one caption for each of `size` images."""
    from tavq.metrics.captions import caption_metrics

    draw = random.Random(0)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(7, 15))).capitalize() + "."

    references = {str(i): [sentence() for _ in range(5)] for i in range(size)}
    hypotheses = {i: sentence() for i in references}
    if case == "captions, pycocoevalcap":
        return lambda: plain_pycocoevalcap(hypotheses, references)
    backend = case.removeprefix("captions, ")
    return lambda: caption_metrics(hypotheses, references, backend=backend, metrics=PURE)


def plain_pycocoevalcap(hypotheses: dict[str, str], references: dict[str, list[str]]) -> None:
    """Call pycocoevalcap as its README does, without METEOR and SPICE."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    truth = PTBTokenizer().tokenize(
        {i: [{"caption": c} for c in captions] for i, captions in references.items()}
    )
    result = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in hypotheses.items()})
    Cider().compute_score(truth, result)
    Bleu(4).compute_score(truth, result, verbose=0)
    Rouge().compute_score(truth, result)


def images_case(case: str, size: int, folder: Path):
    """Return the work: FD, KID, precision and recall of two folders."""
    from tavq.metrics.features import load_network
    from tavq.metrics.frechet import image_metrics

    network = load_network(folder / "small_features.pt")
    generated, reference = folder / f"generated_{size}", folder / f"reference_{size}"
    if case == "images, torch-fidelity":
        import torch_fidelity

        options = {
            "fid": True,
            "kid": True,
            "prc": True,
            "kid_subset_size": 250,
            "cuda": False,
            "verbose": False,
        }
        return lambda: torch_fidelity.calculate_metrics(
            input1=str(generated),
            input2=str(reference),
            feature_extractor=network.extractor,
            cache=False,
            save_cpu_ram=True,
            **options,
        )
    cache = folder / "cache" if case.endswith("cached") else None
    if cache is not None:
        image_metrics(generated, reference, network, cache_dir=cache)
    return lambda: image_metrics(generated, reference, network, cache_dir=cache)


def make_images(folder: Path, size: int) -> None:
    """Write two folders of `size` random images and a small TorchScript network."""
    import numpy as np
    import torch
    from PIL import Image
    from torch import nn

    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 64, 8, 4),
        nn.ReLU(),
        nn.Conv2d(64, FEATURE_WIDTH, 5, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*layers)

        def forward(self, images):
            return self.layers(images.float() / 255)

    network = folder / "small_features.pt"
    torch.jit.trace(Small(), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).save(str(network))
    os.environ["TAVQ_TRUST"] = file_sha256(network)  # of the processes that measure, too
    draw = np.random.default_rng(0)
    for name in ("generated", "reference"):
        (folder / f"{name}_{size}").mkdir()
        for i in range(size):
            pixels = draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}_{size}" / f"{i:05}.png", compress_level=0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        run_case(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
