"""python recipes/plan.py coco256 [--gpus 8] [--measure] [--into docs/training.md]

What a 256 px recipe takes: every model is built without values (on the meta device) and called, so that
shapes, parameters, work and memory are known before a GPU is rented. Hours and memory are estimates.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tyro.conf import Positional

from tavq.base.arguments import parse, run_main
from tavq.captioner.config import PRESETS as CAPTIONERS
from tavq.captioner.model import Captioner, CaptionerConfig
from tavq.eval.table import write_block
from tavq.generator.config import PRESETS as GENERATORS
from tavq.generator.model import GeneratorConfig, GeneratorModel
from tavq.tokenizer.config import PRESETS as TOKENIZERS
from tavq.tokenizer.model import TAVQTokenizer, TokenizerConfig

WORDS = 10_000  # of the captioner, about what COCO has
CAPTION_WORDS = 20
CAPTIONS = 5  # of each image, which the captioner learns in one pass
STATE_BYTES = 20  # a parameter in float32: value, gradient, two moments, moving average
TRAINING = 3  # a backward pass is twice the work of a forward pass
MEASURED_STEPS = 2
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training set, and how often each model sees it."""

    images: int
    tokenizer_passes: float
    generator_passes: float
    captioner_passes: float


DATASETS = {
    "coco256": Dataset(82_783, 150, 150, 60),  # train2014
    "cc3m256": Dataset(2_800_000, 10, 25, 10),  # what can still be downloaded of 3.3 million, about
}


@dataclasses.dataclass(frozen=True)
class PlanRun:
    """Estimate memory and hours of a 256 px recipe, from models that are built without values.

    Example: python recipes/plan.py coco256 --gpus 8
    """

    name: Positional[str]
    """coco256 or cc3m256."""
    gpus: int = 8
    """Processes, one for each GPU."""
    tflops: float = 100.0
    """Sustained TFLOP/s of a GPU in bf16. The default is a third of an A100's peak of 312."""
    steps: bool = False
    """Print the steps of tokenizer, generator and captioner alone, for the shell scripts."""
    measure: bool = False
    """Also train a step of each model on the CPU of this machine, with values, and report time and memory."""
    into: Path | None = None
    """Markdown file to write the table into, between its marker lines."""

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise ValueError(f"no recipe {self.name!r}; choose one of {', '.join(DATASETS)}")
        if self.gpus < 1 or self.tflops <= 0:
            raise ValueError("expected 1 or more GPUs, and a speed above 0")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training.

    Attributes:
        build: the model.
        batch: makes a batch of B examples.
        shape: of what the model returns for it, as the presets promise.
    """

    name: str
    preset: str
    batch_size: int
    passes: float
    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, ...]]
    forward: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
    shape: Callable[[int], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one example takes in training."""

    parameters: int
    flops: float
    """Forward and backward."""
    activation_bytes: float
    """Kept for the backward pass, in float32; in bf16 about half."""


def stages_of(dataset: Dataset) -> list[Stage]:
    """Return the three trainings of a recipe."""
    tokenizer = TokenizerConfig.of(TOKENIZERS["vqgan256"])
    with torch.device("meta"):
        example = TAVQTokenizer(tokenizer)
    h, w = example.grid_size
    size, codes = example.image_size_px, example.num_codes
    shared: dict[str, Any] = {"num_codes": codes, "grid_size": (h, w), "codebook_hash": ""}
    generator = GeneratorConfig.of(GENERATORS["base"], text_encoder_hash="", **shared)
    words = tuple(f"w{number}" for number in range(WORDS))
    captioner = CaptionerConfig(CAPTIONERS["base"], code_dim=example.codebook.shape[1], words=words, **shared)
    text = GENERATORS["base"].max_text_tokens

    def ids(count: int) -> Tensor:
        return torch.zeros(count, h * w, dtype=torch.int64)

    return [
        Stage(
            name="tokenizer",
            preset="vqgan256",
            batch_size=16,
            passes=dataset.tokenizer_passes,
            build=lambda: _without_restarts(TAVQTokenizer(tokenizer)),
            batch=lambda count: (torch.zeros(count, 3, size, size),),
            forward=lambda model, batch: model(*batch).images,
            shape=lambda count: (count, 3, size, size),
        ),
        Stage(
            name="generator",
            preset="base",
            batch_size=64,
            passes=dataset.generator_passes,
            build=lambda: GeneratorModel(generator),
            batch=lambda count: (
                ids(count),
                torch.zeros(count, text, generator.text_dim),
                torch.ones(count, text, dtype=torch.bool),
            ),
            forward=lambda model, batch: model(*batch),
            shape=lambda count: (count, h * w, codes),
        ),
        Stage(
            name="captioner",
            preset="base",
            batch_size=64,
            passes=dataset.captioner_passes,
            build=lambda: Captioner(captioner),
            batch=lambda count: (ids(count), torch.zeros(count, CAPTIONS, CAPTION_WORDS, dtype=torch.int64)),
            forward=lambda model, batch: model(*batch),
            shape=lambda count: (count, CAPTIONS, CAPTION_WORDS + 1, len(words) + 3),
        ),
    ]


def _without_restarts(tokenizer: TAVQTokenizer) -> TAVQTokenizer:
    tokenizer.quantizer.eval()  # counting which codes are used needs values
    return tokenizer


def cost_of(stage: Stage) -> Cost:
    """Build and call the model of a stage on the meta device.

    Raises:
        ValueError: it returns another shape than the presets promise.
    """
    count = 2
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.device("meta"):
        model = stage.build()
        batch = stage.batch(count)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, FlopCounterMode(display=False) as counter:
            output = stage.forward(model, batch)
    if tuple(output.shape) != stage.shape(count):
        raise ValueError(
            f"the {stage.name} of preset {stage.preset} returns {tuple(output.shape)} for {count} examples, "
            f"expected {stage.shape(count)}"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # Weights are kept for the backward pass, too, and counted with the parameters already.
    activations = max(0.0, kept - 4 * parameters) / count
    return Cost(parameters, TRAINING * counter.get_total_flops() / count, activations)


def steps_of(stage: Stage, dataset: Dataset, gpus: int) -> int:
    return round(stage.passes * dataset.images / (stage.batch_size * gpus))


@dataclasses.dataclass(frozen=True)
class Measured:
    """A training step on the CPU of this machine."""

    batch_size: int
    seconds: float
    peak_gib: float


def measure(stage: Stage, batch_size: int = 2) -> Measured:
    """Train a few steps with values, in a process of its own, whose memory nothing else took."""
    import torch.multiprocessing as multiprocessing

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_measure, args=(stage, batch_size, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise ValueError(f"the {stage.name} could not be trained here; is the memory too small?") from None
    finally:
        process.join()


def _measure(stage: Stage, batch_size: int, sender: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = stage.build()
    averaged = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = stage.batch(batch_size)
    for number in range(MEASURED_STEPS + 1):
        if number == 1:  # the first one is to warm up
            started = time.monotonic()
        stage.forward(model, batch).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(averaged, list(model.parameters()), 0.1)
    seconds = (time.monotonic() - started) / MEASURED_STEPS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sender.send(Measured(batch_size, seconds, (peak - before) * 1024 / GIB))


def document(run: PlanRun) -> str:
    """Return the plan as a Markdown table, with what it rests on."""
    dataset = DATASETS[run.name]
    head = ["model", "preset", "output", "parameters", "examples a GPU and step", "steps", "work an example"]
    head += ["memory a GPU", "hours"]
    if run.measure:
        head += ["here: s a step of 2", "TFLOP/s", "memory", "estimated"]
    rows = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    total = 0.0
    for stage in stages_of(dataset):
        cost = cost_of(stage)
        steps = steps_of(stage, dataset, run.gpus)
        hours = steps * stage.batch_size * cost.flops / (run.tflops * 1e12) / 3600
        total += hours
        row = [
            stage.name,
            f"`{stage.preset}`",
            " x ".join(map(str, stage.shape(1)[1:])),
            f"{cost.parameters / 1e6:,.0f} M",
            str(stage.batch_size),
            f"{steps:,}",
            f"{cost.flops / 1e9:,.0f} GFLOP",
            f"{memory_gib(cost, stage.batch_size):.0f} GiB",
            f"{hours:.1f}",
        ]
        if run.measure:
            here = measure(stage)
            speed = here.batch_size * cost.flops / here.seconds / 1e12
            row += [f"{here.seconds:.1f}", f"{speed:.3f}", f"{here.peak_gib:.1f} GiB"]
            row.append(f"{memory_gib(cost, here.batch_size):.1f} GiB")
        rows.append(row)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    basis = (
        f"`{run.name}` on {run.gpus} GPUs, {dataset.images:,} training images: about {total:.0f} hours of "
        f"training, if a GPU sustains {run.tflops:g} TFLOP/s. An estimate: work and activations are counted "
        f"on models without values; memory is {STATE_BYTES} bytes a parameter, and activations in float32, "
        "of which bf16 takes about half. Frozen networks, discriminator, alignment, reading images and "
        "evaluations come on top."
    )
    return f"{table}\n\n{basis}"


def memory_gib(cost: Cost, batch_size: int) -> float:
    return (STATE_BYTES * cost.parameters + batch_size * cost.activation_bytes) / GIB


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(PlanRun, argv, prog="python recipes/plan.py")
    if run.steps:
        dataset = DATASETS[run.name]
        print(*(steps_of(stage, dataset, run.gpus) for stage in stages_of(dataset)))
        return
    text = document(run)
    print(text)
    if run.into is not None:
        write_block(run.into, run.name, text)


if __name__ == "__main__":
    main()
