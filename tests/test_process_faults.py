"""Groups of processes that stop, die, save often and go on with another number of processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from tavq.generator.model import Block
from tavq.training.state import find_state, load_state

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow  # every test starts processes that train

# Warm-up until the end and no step that depends on the number of steps: a shorter run is the start of a
# longer one.
FLAGS = "--preset tiny --training.warmup-steps 1000 --training.evaluate-every 1000 --training.log-every 1"
FLAGS += " --random-order-until 0 --raster-order-from 0 --training.checkpoint-minutes 0"


def weights(out: Path, part: str) -> torch.Tensor:
    tensors = load_file(out / "training" / "state" / f"{part}.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_a_run_goes_on_sharded_and_with_another_number_of_processes_and_without_a_shared_folder(
    train_in_processes, small_tokens, tmp_path
):
    """Two processes, the same with sharded weights (FSDP2), then one: as one alone from the start, Muon and
    the moving average included. The second of two sees another folder: it has no state to read."""

    def run(count: int, steps: int, folder: str) -> tuple[str, list]:
        size = [
            "--training.batch-size",
            8 // count,
            "--training.steps",
            steps,
            "--training.optimizer",
            "muon",
        ]
        data = ["--training.optimizer", "muon", "--tokens", small_tokens, "--out", tmp_path / folder]
        return "generator", [*FLAGS.split(), *size, *data]

    train_in_processes(2, [run(2, 2, "rank{rank}")])
    printed = train_in_processes(2, [run(2, 4, "rank{rank}")], TAVQ_TEST_FSDP2="1")
    assert "at step 2" in printed
    train_in_processes(1, [run(1, 6, "rank0"), run(1, 6, "whole")])

    for part in ("model", "averaged"):
        got, expected = (weights(tmp_path / folder, part) for folder in ("rank0", "whole"))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-3)
    assert not (tmp_path / "rank1" / "training" / "state").exists()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "multi_node"])
def test_accelerate_takes_the_configurations(name):
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes > 1
    if name == "fsdp2":
        wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
        assert config.fsdp_config["fsdp_version"] == 2 and wrapped == Block.__name__


def test_a_process_that_dies_ends_the_run_and_the_run_goes_on(train_in_processes, small_tokens, tmp_path):
    out = tmp_path / "run"
    runs = [("generator", [*FLAGS.split(), "--tokens", small_tokens, "--training.steps", 6, "--out", out])]
    train_in_processes(2, runs, fails=True, TAVQ_TEST_DIES_AT="3")
    ended = time.time()
    state = find_state(out / "training" / "state")
    assert state is not None
    assert ended - (state / "manifest.json").stat().st_mtime < 60, "it was saved right before"
    assert load_state(state)[1]["loop"]["step"] == 3
    printed = train_in_processes(2, runs)
    assert f"resuming {out} at step 3" in printed and "step 6/6" in printed


MANY_CHECKPOINTS = """
import dataclasses, sys, time
from pathlib import Path
import torch
from tavq.training.config import TrainingConfig
from tavq.training.loop import Trainer
from tavq.training.task import StepOutput, Task


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(1, 1))

    def forward(self, batch, step):
        time.sleep(0.002 * (torch.distributed.get_rank() + 1))  # clocks that disagree
        return StepOutput(((self.slope - 3) * batch).square().mean(), {})


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, item):
        return torch.tensor([float(item[0] + 1)])


class LineTask(Task):
    name = "generator"

    def __init__(self):
        self.model = self.shipped = Line()
        self.dataset = Points()

    def evaluate(self, model, step):
        return {"loss": float((model.slope - 3).abs())}

    def save(self, model, directory, card):
        pass


@dataclasses.dataclass(frozen=True)
class Run:
    training: TrainingConfig
    data: str = "points"


steps, every_steps = int(sys.argv[2]), float(sys.argv[3])
config = TrainingConfig(steps=steps, batch_size=2, evaluate_every=steps, checkpoint_minutes=every_steps / 60)
trainer = Trainer(LineTask(), config, Path(sys.argv[1]), Run(config))
saves, save = [], trainer._save_state
trainer._save_state = lambda: (saves.append(trainer.state.step), save())
trainer.run()
sys.stdout.write(f"saved {len(saves)} times, last after step {saves[-1]}\\n")
"""


def test_many_checkpoints_by_clocks_that_disagree(run_processes, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(MANY_CHECKPOINTS)
    printed = run_processes(2, script, tmp_path / "run", 60, 0.03)
    lines = [line for line in printed.splitlines() if line.startswith("saved ")]
    assert len(lines) == 2 and len(set(lines)) == 1, printed
    assert int(lines[0].split()[1]) >= 5 and lines[0].endswith("step 60")
