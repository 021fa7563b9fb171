"""python benchmarks/alignment.py [--data DIR] [--preset flickr8k] [--into docs/speed.md]

Seconds and memory that the alignment adds to a training step of the tokenizer: none, Gaussian, sampled
transport, and the full problem (every code against every unit), batched by us and solved pair by pair by POT.
Writes a Markdown table.

All rows start from the same weights, photos and texts. Each row of each round is a process of its own, so
that its peak memory is its own; rows take turns and keep their best round, so that a busy machine slows all
alike (the full problem has one round). "solve" is finding the cost of all B x B image-text pairs of three
levels from given codes and units, all that POT does; "aligner" is a forward and backward pass of the aligner
by itself, without a bank of negatives; "step" is a whole training step, with the bank. POT solves one pair at
a time: its seconds are measured on `--pot-pairs` pairs and counted for all.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tavq.alignment.aligner import TextAligner, sample_texts
from tavq.alignment.config import AlignmentConfig
from tavq.alignment.transport import gaussian_cost, transport_cost
from tavq.alignment.unit_index import SampledTexts, UnitIndex
from tavq.base.arguments import parse, run_main
from tavq.data.images import to_tensor
from tavq.data.layouts import open_dataset
from tavq.data.text_encoder import TextEncoder
from tavq.eval.table import with_block, write_block
from tavq.tokenizer.config import RUN_PRESETS, TokenizerRun
from tavq.tokenizer.model import TAVQTokenizer
from tavq.tokenizer.train import TokenizerTrainer

LEVELS = (1, 2, 3)
OURS = ("none", "gaussian", "sampled", "full")
NAMES = {
    "none": "none",
    "gaussian": "Gaussian",
    "sampled": "sampled transport",
    "full": "full transport, batched",
    "converged": "full, POT pair by pair (`ot.unbalanced.sinkhorn_unbalanced`)",
    "iterations": "the same, stopped after as many iterations as ours",
    "exact": "full, POT pair by pair, exact and balanced (`ot.emd`)",
}


@dataclasses.dataclass(frozen=True)
class AlignmentBenchmark:
    """What the alignment costs in a training step."""

    data: str = "shapes"
    """Dataset whose training photos and texts are used: a directory, `shapes` or `scenes`."""
    preset: str = "flickr8k"
    """Preset of the tokenizer's training run."""
    perceptual: str | None = None
    """As in tavq train tokenizer; without it a step is L1 alone, and the alignment's share larger."""
    batch_sizes: tuple[int, ...] = (16, 64)
    steps: int = 16
    """Timed steps a round; 16 hold one measurement of the loss balance, as in training."""
    rounds: int = 2
    pot_pairs: int = 192
    threads: int = 1
    into: Path | None = None
    """Markdown file whose block between the marker lines of `alignment` the table replaces."""

    def __post_init__(self) -> None:
        if self.into is not None:
            with_block(self.into, "alignment", "")  # refused now, not after the work


@dataclasses.dataclass(frozen=True)
class Batch:
    """Photos and texts of one batch."""

    images: Tensor
    targets: Tensor
    index: UnitIndex

    def texts(self, config: AlignmentConfig) -> SampledTexts:
        return sample_texts(self.index, range(len(self.images)), torch.Generator().manual_seed(0), config)


def load_batch(bench: AlignmentBenchmark, batch_size: int) -> Batch:
    dataset = open_dataset(bench.data, "train").take(batch_size)
    model = RUN_PRESETS[bench.preset].model
    images, targets = (
        torch.stack([to_tensor(dataset.load_image(i), size) for i in range(batch_size)])
        for size in (model.image_size_px, model.decode_size_px)
    )
    return Batch(images, targets, UnitIndex.build(dataset, TextEncoder()))


def run_of(bench: AlignmentBenchmark, method: str, batch: Batch) -> TokenizerRun:
    """The training run of a row: `full` draws every code and every unit."""
    run, changes = RUN_PRESETS[bench.preset], {}
    if method == "full":
        h, w = run.model.grid_size
        units = max(int(batch.index.count(level).max()) for level in LEVELS)
        changes = {"samples": h * w, "max_units": units}
    return dataclasses.replace(
        run,
        align={"none": "none", "gaussian": "gaussian"}.get(method, "ot"),
        perceptual=bench.perceptual,
        alignment=dataclasses.replace(run.alignment, **changes),
        losses=dataclasses.replace(run.losses, adversarial=0.0),
    )


def median_seconds(work: Callable[[int], Any], times: int) -> float:
    """Seconds a call: the median, after one call that does not count."""
    seconds = []
    for call in range(times + 1):
        began = time.perf_counter()
        work(call)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def mean_seconds(work: Callable[[int], Any], times: int) -> float:
    """Seconds a call: the mean over calls 1 .. `times`, after call 0, which does not count."""
    work(0)
    began = time.perf_counter()
    for call in range(1, times + 1):
        work(call)
    return (time.perf_counter() - began) / times


def training_step(run: TokenizerRun, batch: Batch) -> Callable[[int], None]:
    torch.manual_seed(0)
    trainee = TokenizerTrainer(run, TAVQTokenizer(run.model)).train()
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-4)
    inputs = {"image": batch.images, "target": batch.targets} | (
        {"texts": batch.texts(run.alignment)} if run.align != "none" else {}
    )

    def step(number: int) -> None:
        optimizer.zero_grad()
        trainee(inputs, number).loss.backward()
        optimizer.step()

    return step


def alignment_pass(run: TokenizerRun, batch: Batch) -> Callable[[int], None]:
    """Forward and backward of the aligner alone, on the latents of an untrained tokenizer."""
    torch.manual_seed(0)
    tokenizer = TAVQTokenizer(run.model)
    config = dataclasses.replace(run.alignment, bank_size=0)
    aligner = TextAligner(
        *tokenizer.codebook.shape,
        tokenizer.config.text_dim,
        config,
        method=run.align,
        projections=tokenizer.projections,
    )
    features = [level.detach().requires_grad_() for level in tokenizer.encoder(batch.images)]
    texts = batch.texts(config)
    return lambda _: aligner(features, tokenizer.quantizer.codebook, texts).loss.backward()


def codes_and_units(run: TokenizerRun, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A level each: codes in text space (B, S, D), units (B, U, D) and their mask (B, U)."""
    torch.manual_seed(0)
    tokenizer, config = TAVQTokenizer(run.model), run.alignment
    texts = batch.texts(dataclasses.replace(config, bank_size=0)).units
    with torch.no_grad():
        ids = tokenizer.encode_levels(batch.images).flatten(2)[:, :, : config.samples]
        return [
            (tokenizer.project(ids[:, level - 1], level), texts[level - 1].vectors, texts[level - 1].mask)
            for level in LEVELS
        ]


def solving(run: TokenizerRun, batch: Batch) -> Callable[[int], Any]:
    """The costs of all pairs at all levels, from given codes and units."""
    levels, config = codes_and_units(run, batch), run.alignment
    if run.align == "gaussian":
        return lambda _: [gaussian_cost(*level) for level in levels]
    costs = [(1 - torch.einsum("isd,jud->ijsu", codes, units), mask) for codes, units, mask in levels]
    return lambda _: [
        transport_cost(
            cost,
            mask.unsqueeze(0),
            epsilon=config.epsilon * float(cost.mean()),
            relaxation=config.relaxation * float(cost.mean()),
            iterations=config.iterations,
        )
        for cost, mask in costs
    ]


def pot_seconds(bench: AlignmentBenchmark, run: TokenizerRun, batch: Batch) -> dict[str, float]:
    """Seconds that POT needs for all pairs of the batch at all levels, from the mean over some pairs."""
    import ot

    levels, config = codes_and_units(run, batch), run.alignment
    generator = torch.Generator().manual_seed(0)
    costs = []
    for number in range(bench.pot_pairs):
        codes, units, mask = levels[number % len(levels)]
        i, j = torch.randint(len(batch.images), (2,), generator=generator).tolist()
        costs.append((1 - codes[i] @ units[j][mask[j]].T).double().numpy())

    def entropic(cost: Any, **stop: int) -> None:
        a, b = ot.unif(cost.shape[0]), ot.unif(cost.shape[1])
        epsilon, relaxation = config.epsilon * cost.mean(), config.relaxation * cost.mean()
        ot.unbalanced.sinkhorn_unbalanced(a, b, cost, epsilon, (relaxation, math.inf), reg_type="kl", **stop)

    solvers = {
        "converged": entropic,
        "iterations": lambda cost: entropic(cost, numItermax=config.iterations),
        "exact": lambda cost: ot.emd(ot.unif(cost.shape[0]), ot.unif(cost.shape[1]), cost),
    }
    pairs = len(LEVELS) * len(batch.images) ** 2
    return {
        name: pairs * mean_seconds(lambda call, solve=solve: solve(costs[call - 1]), len(costs))
        for name, solve in solvers.items()
    }


def measure(bench: AlignmentBenchmark, method: str, batch_size: int, queue: Any) -> None:
    """One row of one round, in a process of its own."""
    torch.set_num_threads(bench.threads)
    batch = load_batch(bench, batch_size)
    run = run_of(bench, "full" if method == "pot" else method, batch)
    if method == "pot":
        queue.put(pot_seconds(bench, run, batch))
        return
    found = {"solve": 0.0, "aligner": 0.0}
    if method != "none":
        found["solve"] = median_seconds(solving(run, batch), 5)
        found["aligner"] = median_seconds(alignment_pass(run, batch), 5)
    found["step"] = mean_seconds(training_step(run, batch), bench.steps)
    found["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    queue.put(found)


def in_a_process(*arguments: Any) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=measure, args=(*arguments, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise ValueError(f"the row {arguments[1]!r} ended with exit code {process.exitcode}; see above")
    return queue.get()


def table_of(bench: AlignmentBenchmark, batch_size: int) -> list[str]:
    """The rows of one batch size."""
    rounds: dict[str, list[dict[str, float]]] = {method: [] for method in OURS}
    for number in range(bench.rounds):
        for method in OURS:
            if number == 0 or method != "full":  # which is slow, and has no goal
                rounds[method].append(in_a_process(bench, method, batch_size))
    best = {
        method: {name: min(found[name] for found in all_found) for name in all_found[0]}
        for method, all_found in rounds.items()
    }
    plain, sampled = best["none"], best["sampled"]["solve"]
    lines = []
    for method, row in best.items():
        share = "-" if method == "none" else f"{1 - plain['step'] / row['step']:+.1%}"
        memory = f"{row['gib']:.2f} GiB" if method == "none" else f"{row['gib'] - plain['gib']:+.2f} GiB"
        cells = (f"{row['solve']:.4f}", f"{row['solve'] / sampled:.1f}", f"{row['aligner']:.4f}")
        lines.append(markdown(NAMES[method], batch_size, *cells, f"{row['step']:.3f}", share, memory))
    for name, seconds in in_a_process(bench, "pot", batch_size).items():
        lines.append(markdown(NAMES[name], batch_size, f"{seconds:.4f}", f"{seconds / sampled:.1f}", *"----"))
    return lines


def markdown(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    bench = parse(AlignmentBenchmark, argv, prog="python benchmarks/alignment.py")
    if bench.preset not in RUN_PRESETS:
        raise ValueError(f"unknown preset {bench.preset!r}; choose one of: {', '.join(RUN_PRESETS)}")
    lines = [
        f"{bench.preset} on {Path(bench.data).name}, {bench.threads} thread(s), torch {torch.__version__}; "
        f"{'with' if bench.perceptual else 'without'} a perceptual loss",
        "",
        markdown("alignment", "batch", "solve s", "x sampled", "aligner s", "step s", "of a step", "memory"),
        markdown(*["---"] * 8),
    ]
    for batch_size in bench.batch_sizes:
        lines += table_of(bench, batch_size)
    table = "\n".join(lines)
    print(table)
    if bench.into is not None:
        write_block(bench.into, "alignment", table)


if __name__ == "__main__":
    main()
