"""Memory and speed with 8,000 to 800,000 made-up examples, each case in a process of its own.

python benchmarks/scale.py [--into docs/scale.md] [--plot docs/images/scale-memory.png]

Claim: memory does not grow with the data. Images, captions, tokenizer and text encoder are made up and tiny:
what is measured is how the data are held and read. The trainers are the real ones with the `tiny` presets.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tavq.base.arguments import parse, run_main
from tavq.base.journal import append_row, read_journal
from tavq.eval.table import with_block, write_block

CASES = {
    "tokenize": "tavq tokenize",
    "tokenizer": "tavq train tokenizer",
    "generator": "tavq train generator",
    "captioner": "tavq train captioner",
}
CODES = 64
GRID = 2
TEXT_WIDTH = 16
VALIDATION = 64  # examples
PER_SHARD = 5000
BATCH = 32
DIGITS = "red blue green small large old young wet happy white".split()


@dataclasses.dataclass(frozen=True)
class ScaleBenchmark:
    """Measure peak memory and examples per second at several sizes.

    Example: python benchmarks/scale.py --sizes 1000 10000 --cases generator
    """

    sizes: tuple[int, ...] = (8_000, 80_000, 800_000)
    """Numbers of training examples."""
    cases: tuple[str, ...] = tuple(CASES)
    """Which of tokenize, tokenizer, generator and captioner to measure."""
    batches: int = 200
    """Batches of 32 that are drawn and collated."""
    steps: int = 5
    """Training steps of the tiny model."""
    journal: Path = Path("runs/scale.jsonl")
    """File of the rows measured so far; what it holds is not measured again."""
    into: Path | None = None
    """Markdown file whose block `memory` is filled with the table."""
    plot: Path | None = None
    """PNG for the curve."""

    def __post_init__(self) -> None:
        if unknown := set(self.cases) - set(CASES):
            raise ValueError(f"no case {sorted(unknown)[0]!r}; choose among {', '.join(CASES)}")
        if self.into is not None:
            with_block(self.into, "memory", "")  # refused now, not after the work


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case at every size, and print a table."""
    run = parse(ScaleBenchmark, argv, prog="python benchmarks/scale.py")
    rows = {(row["case"], row["size"]): row for row in read_journal(run.journal)}
    for size in run.sizes:
        missing = [case for case in run.cases if (case, size) not in rows]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as folder:
            make_data(Path(folder), size, missing)
            for case in missing:
                row = in_a_process(case, size, Path(folder), run)
                print(json.dumps(row), flush=True)
                append_row(run.journal, row)
                rows[case, size] = row

    wanted = [rows[case, size] for case in run.cases for size in run.sizes]
    table = "\n".join(table_of(wanted, run.sizes[0]))
    print(table)
    if run.into is not None:
        write_block(run.into, "memory", table)
    if run.plot is not None:
        draw_curve(wanted, run.plot)


def table_of(rows: list[dict[str, Any]], smallest: int) -> list[str]:
    """Return the lines of the table."""
    lines = [
        f"| command | examples | peak memory, MiB | of that with {smallest:,} | opened in | examples/s |",
        "| --- |" + " ---: |" * 5,
    ]
    first = {row["case"]: row["peak_mib"] for row in rows if row["size"] == smallest}
    for row in rows:
        share = row["peak_mib"] / first[row["case"]]
        opened = "" if row["open_s"] is None else f"{row['open_s']:.1f} s"
        numbers = f"{row['peak_mib']:,.0f} | {share:.2f} | {opened} | {row['examples_per_s']:,.0f}"
        lines.append(f"| `{CASES[row['case']]}` | {row['size']:,} | {numbers} |")
    return lines


def draw_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw peak memory over the number of examples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for case in dict.fromkeys(row["case"] for row in rows):
        points = [(row["size"], row["peak_mib"]) for row in rows if row["case"] == case]
        axes.plot(*zip(*points, strict=True), marker="o", label=CASES[case])
    axes.set(xscale="log", xlabel="examples", ylabel="peak memory, MiB")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.6))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def in_a_process(case: str, size: int, folder: Path, run: ScaleBenchmark) -> dict[str, Any]:
    """Measure one case in a process and with a cache of its own."""
    command = [sys.executable, __file__, "--case", case, str(folder), str(run.batches), str(run.steps)]
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = os.environ | {"TAVQ_CACHE": cache, "OMP_NUM_THREADS": "1"}
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        ).stdout
    return {"case": case, "size": size, **json.loads(output.splitlines()[-1])}


# --- made-up data ---


def make_data(folder: Path, size: int, cases: Sequence[str]) -> None:
    """Write a dataset of images and a token set, as far as `cases` need them."""
    if {"tokenize", "tokenizer"} & set(cases):
        write_shards(folder / "images", size, image_members)
    if {"generator", "captioner"} & set(cases):
        write_shards(folder / "tokens", size, token_members)
        meta = {"num_codes": CODES, "grid_size": [GRID, GRID], "codebook_hash": "made up"}
        meta |= {"tokenizer": "made up", "data": "made up", "image_size_px": 16}
        (folder / "tokens" / "meta.json").write_text(json.dumps(meta))


def write_shards(folder: Path, size: int, members: Any) -> None:
    """Write shards of `size` training examples, and of a few for validation."""
    folder.mkdir()
    for split, count in (("train", size), ("val", VALIDATION)):
        for start in range(0, count, PER_SHARD):
            shard = folder / f"{split}-{start // PER_SHARD:06d}.tar"
            with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as archive:
                for number in range(start, min(start + PER_SHARD, count)):
                    for extension, content in members(split, number):
                        member = tarfile.TarInfo(f"{split}{number:08d}.{extension}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    for shard in folder.iterdir():
        os.utime(shard, (time.time() - 60,) * 2)  # as if written a minute ago: its index may be kept


def caption_of(number: int) -> str:
    """A caption that no other image has, of few different words."""
    digits = [DIGITS[int(digit)] for digit in f"{number:06d}"]
    return f"{' '.join(digits[:3])} dog and {' '.join(digits[3:])} cat."


def image_members(split: str, number: int) -> Iterator[tuple[str, bytes]]:
    from PIL import Image

    file = io.BytesIO()
    colour = (number % 256, number // 256 % 256, number // 65536)
    Image.new("RGB", (16, 16), colour).save(file, "BMP")
    yield "bmp", file.getvalue()
    yield "txt", caption_of(number).encode()


def token_members(split: str, number: int) -> Iterator[tuple[str, bytes]]:
    text = {"id": f"{split}{number}", "captions": [caption_of(number)], "long_text": None}
    yield "json", json.dumps(text).encode()
    file = io.BytesIO()
    np.save(file, (np.arange(GRID * GRID, dtype=np.int32).reshape(1, GRID, GRID) + number) % CODES)
    yield "npy", file.getvalue()


# --- one case, in a process of its own ---


def run_case(case: str, folder: Path, batches: int, steps: int) -> None:
    """Run one case and print its row."""
    row = tokenize(folder) if case == "tokenize" else train(case, folder, batches, steps)
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(row))


def tokenize(folder: Path) -> dict[str, Any]:
    """Tokenize the whole dataset with a made-up tokenizer."""
    from tavq.data.tar_shards import list_members
    from tavq.tokenizer import encode_dataset as module
    from tavq.tokenizer.run_config import TokenizeRun

    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "model.safetensors").write_bytes(b"made up")
    module.open_tokenizer = lambda *_: MadeUpTokenizer()  # type: ignore[assignment, return-value]
    out = folder / "tokenized"
    started = time.perf_counter()
    module.encode_dataset(
        TokenizeRun(data=str(folder / "images"), out=out, checkpoint=str(checkpoint), crops=0, device="cpu")
    )
    seconds = time.perf_counter() - started
    # Shard by shard: to open the token set would build its index, which is a trainer's memory.
    members = sum(len(list_members(shard)) for shard in out.glob("train-*.tar"))
    return {"open_s": None, "examples_per_s": members / 2 / seconds}  # ids and text of each image


def train(case: str, folder: Path, batches: int, steps: int) -> dict[str, Any]:
    """Open the dataset as a trainer does, draw batches, and train a few steps."""
    from tavq.training.stream import Batches, ShuffledStream

    started = time.perf_counter()
    task = {"tokenizer": tokenizer_task, "generator": generator_task, "captioner": captioner_task}[case](
        folder
    )
    open_s = time.perf_counter() - started

    stream = iter(ShuffledStream(len(task.dataset), BATCH, start=0, seed=0))
    next(stream)  # which shuffles
    dataset = Batches(task)
    started = time.perf_counter()
    for draws in itertools.islice(stream, batches):
        dataset.__getitems__(draws)
    seconds = time.perf_counter() - started

    for step, draws in enumerate(itertools.islice(stream, steps)):
        task.model(dataset.__getitems__(draws), step).loss.backward()
    return {"open_s": open_s, "examples_per_s": batches * BATCH / seconds}


def tokenizer_task(folder: Path) -> Any:
    from tavq.tokenizer import train as module
    from tavq.tokenizer.config import RUN_PRESETS

    module.TextEncoder = MadeUpEncoder  # type: ignore[assignment, misc]
    losses = dataclasses.replace(RUN_PRESETS["tiny"].losses, adversarial=0.0)
    return module.TokenizerTask(
        dataclasses.replace(RUN_PRESETS["tiny"], data=str(folder / "images"), losses=losses)
    )


def generator_task(folder: Path) -> Any:
    from tavq.generator import train as module
    from tavq.generator.config import RUN_PRESETS

    module.TextEncoder = MadeUpEncoder  # type: ignore[assignment, misc]
    return module.GeneratorTask(dataclasses.replace(RUN_PRESETS["tiny"], tokens=folder / "tokens"))


def captioner_task(folder: Path) -> Any:
    from tavq.captioner.config import RUN_PRESETS
    from tavq.captioner.train import CaptionerTask

    return CaptionerTask(dataclasses.replace(RUN_PRESETS["tiny"], tokens=folder / "tokens"))


class MadeUpTokenizer:
    """Gives each image ids that depend on its first pixels."""

    num_codes = CODES
    grid_size = (GRID, GRID)
    codebook_hash = "made up"
    image_size_px = 16

    def to(self, device: Any) -> MadeUpTokenizer:
        return self

    def parameters(self) -> Iterator[Any]:
        import torch

        yield torch.zeros(1)

    def encode(self, images: Any) -> Any:
        return ((images[:, 0, :GRID, :GRID] + 1) / 2 * (CODES - 1)).long()


class MadeUpEncoder:
    """Gives each text vectors that depend on its hash."""

    dim = token_dim = TEXT_WIDTH
    name = "made up"
    hash = "made up"
    special_ids = ()

    def __init__(self, name: str = ""):
        pass

    def encode(self, texts: Sequence[str]) -> Any:
        import torch

        digests = b"".join(hashlib.sha256(text.encode()).digest()[:TEXT_WIDTH] for text in texts)
        vectors = torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, TEXT_WIDTH).float() - 127.5
        return torch.nn.functional.normalize(vectors, dim=-1)

    def token_states(self, texts: Sequence[str], max_tokens: int) -> Any:
        import torch

        from tavq.data.text_encoder import TokenStates

        states = self.encode(texts)[:, None].expand(-1, max_tokens, -1)
        lengths = torch.tensor([len(text.split()) for text in texts])
        return TokenStates(states, torch.arange(max_tokens) < lengths[:, None])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        run_case(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
