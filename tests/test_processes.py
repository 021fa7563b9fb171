"""Two and four real processes under torchrun (gloo, CPU) train as one does that has the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.slow  # every test starts processes that train

STEPS = "--training.steps 3 --training.evaluate-every 2 --training.log-every 1 --training.warmup-steps 0"
IMAGES = f"{STEPS} --losses.adversarial-start 0.25 --losses.augmentation 0.5"

# Name -> command, examples of a step, flags. Some once ended with parameters that took no part in the loss of
# a step, which DDP refuses.
RUNS = {
    "ot": ("tokenizer", 8, f"{IMAGES} --preset tiny --align ot --fit-steps 2"),
    "plain, cvq": ("tokenizer", 8, f"{IMAGES} --preset tiny --align none --model.quantizer.name cvq"),
    "lgvq, texture": (
        "tokenizer",
        8,
        f"{IMAGES} --preset tiny --align lgvq --lgvq.width 16 --lgvq.layers 1 --losses.texture 1",
    ),
    "gaussian, a level left out, simvq, muon": (
        "tokenizer",
        8,
        f"{IMAGES} --preset tiny --align gaussian --alignment.level-weights 0 1 1 --fit-steps 0 "
        "--model.quantizer.name simvq --training.optimizer muon",
    ),
    "fsq": (
        "tokenizer",
        8,
        f"{IMAGES} --preset tiny --align none --model.quantizer.name fsq --model.quantizer.num-codes 1000",
    ),
    "filip, one example a process": (
        "tokenizer",
        2,
        f"{IMAGES} --preset tiny --align filip --fit-steps 0 --losses.decode-every 2",
    ),
    "decoder": ("decoder", 8, IMAGES),
    "generator": (
        "generator",
        8,
        f"{STEPS} --preset tiny --null-text-rate 0.5 --random-order-until 0.4 --raster-order-from 1",
    ),
    "captioner": ("captioner", 8, f"{STEPS} --preset tiny --model.token-dropout 0.3"),
    "self-critical": ("captioner", 8, f"{STEPS} --preset tiny --stage self-critical"),
}

# One of each trainer, for the time it takes.
BY_FOUR = ("ot", "decoder", "generator", "captioner", "self-critical")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train_in_processes, small_tokens, perceptual_network) -> Path:
    """A folder of runs, NAME-1, NAME-2 and NAME-4, by one, two and four processes."""
    out = tmp_path_factory.mktemp("trained")
    inputs = {
        "tokenizer": ["--perceptual", perceptual_network],
        "decoder": ["--perceptual", perceptual_network, "--tokenizer", out / "ot-1"],
        "generator": ["--tokens", small_tokens],
        "captioner": ["--tokens", small_tokens],
    }
    for count, names in ((1, RUNS), (2, RUNS), (4, BY_FOUR)):
        runs = []
        for name in names:
            command, examples, flags = RUNS[name]
            more = ["--start", out / "captioner-1"] if name == "self-critical" else []
            more += ["--training.batch-size", examples // count, "--out", out / f"{name}-{count}"]
            runs.append((command, [*flags.split(), *inputs[command], *more]))
        train_in_processes(count, runs)
    return out


@pytest.mark.parametrize(("count", "name"), [*((2, name) for name in RUNS), *((4, name) for name in BY_FOUR)])
def test_processes_train_as_one_with_the_whole_batch(trained, count, name):
    """Order of the data, noise, negatives, restarts, use of codes, averages and the balance of gradients
    included: all that a run resumes from is compared. The processes had the same after every step."""
    one, several = (trained / f"{name}-{number}" / "training" / "state" for number in (1, count))
    for file in sorted(one.glob("*.safetensors")):
        expected, got = flat(load_file(file)), flat(load_file(several / file.name))
        # Moments are sums of gradients. Adam divides them by their size, so that a weight whose gradient is
        # nothing but rounding moves by chance.
        tolerance = 5e-3 if file.stem.endswith("-optimizer") else 3e-4
        assert float((got - expected).norm()) <= tolerance * float(expected.norm()), file.stem


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All values one after the other, without the number of steps; NaN, of what was not measured, is 0."""
    kept = [tensors[name].double().flatten() for name in sorted(tensors) if not name.endswith("|step")]
    return torch.cat([*kept, torch.zeros(1)]).nan_to_num()
