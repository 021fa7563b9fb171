"""The training loop: a killed run goes on bit for bit, and mistakes are named before time is lost."""

import dataclasses
import functools
import itertools
import json
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tavq.base.files import atomic_write
from tavq.base.seeding import mixed_seed
from tavq.commands import train_tokenizer
from tavq.training.config import TrainingConfig
from tavq.training.loop import train
from tavq.training.run_folder import RunLog, read_log
from tavq.training.state import save_state
from tavq.training.stream import ShuffledStream
from tavq.training.task import StepOutput, Task

STEPS = 12
FLAGS = [
    *("--preset", "tiny", "--align", "none", "--losses.adversarial-start", "0.3"),
    *("--training.steps", str(STEPS), "--training.evaluate-every", "4", "--training.log-every", "1"),
    *("--training.checkpoint-minutes", "0", "--training.optimizer", "muon"),
]


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def losses(folder) -> list[dict]:
    lines = read_log(folder / "training" / "log.jsonl")
    return [{k: v for k, v in line.items() if k != "examples_per_s"} for line in lines]


def signalled(run: Path, flags: list[str], number: signal.Signals) -> int:
    """Train into `run` in a process, send it a signal after a few steps, and return its exit code."""
    command = [sys.executable, "-m", "tavq.cli", "train", "tokenizer", *flags, "--out", str(run)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    log, deadline = run / "training" / "log.jsonl", time.monotonic() + 120
    while len(read_log(log)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    return process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_stopped_run_says_so_and_continues_as_if_nothing_had_happened(
    tmp_path, perceptual_network, number, exit_code
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [*FLAGS, "--perceptual", str(perceptual_network)]
    train_tokenizer.main([*flags, "--out", str(whole)])
    assert signalled(stopped, flags, number) == exit_code
    train_tokenizer.main([*flags, "--out", str(stopped)])
    assert any("discriminator/loss" in line for line in losses(whole))
    assert weights(stopped) == weights(whole)
    assert losses(stopped) == losses(whole)


@pytest.mark.slow
def test_a_finished_run_is_not_repeated_and_another_configuration_is_refused(tmp_path, capsys):
    flags = [*FLAGS[:4], "--training.steps", "1", "--out", str(tmp_path / "run")]
    train_tokenizer.main(flags)
    capsys.readouterr()
    train_tokenizer.main(flags)
    assert "has all 1 steps already" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        train_tokenizer.main([*flags, "--training.learning-rate", "0.5"])
    assert stopped.value.code == 2
    assert "another training.learning_rate" in capsys.readouterr().err


class Line(nn.Module):
    """y = a x, learned from batches of x; the smallest thing the loop can train."""

    def __init__(self, poison_at: int | None = None):
        super().__init__()
        self.slope, self.poison_at, self.seen = nn.Parameter(torch.zeros(1, 1)), poison_at, []

    def forward(self, batch, step):
        self.seen.append(batch.tolist())
        loss = ((self.slope * batch - 3 * batch) ** 2).mean()
        if step == self.poison_at:
            loss = loss * float("nan")
        return StepOutput(loss, {"loss": loss})


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, item):
        return torch.tensor([float(item[0] + 1)])


class LineTask(Task):
    name = "generator"

    def __init__(self, **options):
        self.model = self.shipped = Line(**options)
        self.dataset, self.saved = Points(), []

    def evaluate(self, model, step):
        return {"loss": float((model.slope - 3).abs())}

    def save(self, model, directory, card):
        self.saved.append(float(model.slope))


@dataclasses.dataclass(frozen=True)
class Run:
    training: TrainingConfig
    data: str = "points"


CONFIG = TrainingConfig(
    steps=30,
    batch_size=2,
    learning_rate=0.1,
    warmup_steps=1,
    weight_decay=0.0,
    ema_decay=0.5,
    evaluate_every=10,
)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    with pytest.raises(FloatingPointError, match="in step 4"):
        train(LineTask(poison_at=4), CONFIG, tmp_path, Run(CONFIG))


def test_accumulation_takes_as_many_batches_a_step_and_gives_the_mean_gradient(tmp_path):
    config = dataclasses.replace(CONFIG, steps=1, grad_clip_norm=1e9)
    twice, once = LineTask(), LineTask()
    accumulating = dataclasses.replace(config, accumulation_steps=2)
    train(twice, accumulating, tmp_path / "a", Run(accumulating))
    large = dataclasses.replace(config, batch_size=4)
    train(once, large, tmp_path / "b", Run(large))
    assert functools.reduce(operator.iadd, twice.model.seen, []) == functools.reduce(
        operator.iadd, once.model.seen, []
    )
    assert float(twice.model.slope) == pytest.approx(float(once.model.slope))


def test_early_stopping_keeps_the_best_weights(tmp_path):
    class Worsening(LineTask):
        def evaluate(self, model, step):
            return {"loss": float(step)}

    task = Worsening()
    config = dataclasses.replace(CONFIG, patience=1)
    train(task, config, tmp_path, Run(config))
    assert len(task.saved) == 1
    assert [line["step"] for line in read_log(tmp_path / "training" / "log.jsonl") if "val/loss" in line] == [
        10,
        20,
    ]


def test_the_averaged_weights_lag_behind_the_trained_ones_and_are_what_is_saved(tmp_path):
    task = LineTask()
    train(task, CONFIG, tmp_path, Run(CONFIG))
    assert task.saved[-1] != float(task.model.slope)
    slow = LineTask()
    config = dataclasses.replace(CONFIG, ema_decay=0.99)
    train(slow, config, tmp_path / "slow", Run(config))
    assert float(slow.model.slope) == float(task.model.slope), "averaging does not change training"
    assert abs(slow.saved[-1] - 3) > abs(task.saved[-1] - 3), "a longer average lags further behind"


def test_finish_changes_what_is_evaluated_and_saved_but_not_the_run(tmp_path):
    class Finishing(LineTask):
        def finish(self, model):
            torch.nn.init.constant_(model.slope, 7.0)

    task = Finishing()
    task.monitor = None
    config = dataclasses.replace(CONFIG, steps=20)
    train(task, config, tmp_path, Run(config))
    assert task.saved[0] != 7.0 and task.saved[-1] == 7.0
    longer = dataclasses.replace(CONFIG, steps=21)
    again, straight = LineTask(), LineTask()
    again.monitor = straight.monitor = None
    train(again, longer, tmp_path, Run(longer))
    train(straight, longer, tmp_path / "straight", Run(longer))
    assert abs(again.saved[-1] - straight.saved[-1]) < 0.5, "the average goes on as if nothing was finished"


def test_early_stopping_without_a_score_is_refused(tmp_path):
    task = LineTask()
    task.monitor = None
    with pytest.raises(ValueError, match="no score to stop early by"):
        train(task, dataclasses.replace(CONFIG, patience=1), tmp_path, Run(CONFIG))


def test_what_a_kill_between_two_renames_left_is_no_hindrance(tmp_path):
    for steps in (10, 20):
        config = dataclasses.replace(CONFIG, steps=steps)
        train(LineTask(), config, tmp_path, Run(config))
        left = tmp_path / "training" / "state.old"
        left.mkdir()
        (left / "half").touch()


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    """The old state was moved away, and the new one not yet put in its place."""
    config = dataclasses.replace(CONFIG, steps=10)
    killed, whole = LineTask(), LineTask()
    for task, out in ((killed, tmp_path / "killed"), (whole, tmp_path / "whole")):
        train(LineTask(), config, out, Run(config))
        if task is killed:
            (out / "training" / "state").rename(out / "training" / "state.old")
        train(task, CONFIG, out, Run(CONFIG))
    assert len(killed.model.seen) == 20, "the first ten steps are not repeated"
    assert float(killed.model.slope) == float(whole.model.slope)


def test_a_parameter_whose_first_gradient_comes_after_a_stop_learns_as_if_there_had_been_none(tmp_path):
    class Late(Line):
        def __init__(self, poison_at):
            super().__init__(poison_at)
            self.offset = nn.Parameter(torch.zeros(1))

        def forward(self, batch, step):
            output = super().forward(batch, step)
            loss = output.loss + (self.offset - 1).square().sum() if step >= 15 else output.loss
            return StepOutput(loss, {"loss": loss})

    class LateTask(LineTask):
        def __init__(self, poison_at=None):
            super().__init__()
            self.model = self.shipped = Late(poison_at)

    whole, stopped = LateTask(), LateTask()
    train(whole, CONFIG, tmp_path / "whole", Run(CONFIG))
    with pytest.raises(FloatingPointError):  # the state is that of the evaluation at step 10
        train(LateTask(poison_at=12), CONFIG, tmp_path / "stopped", Run(CONFIG))
    train(stopped, CONFIG, tmp_path / "stopped", Run(CONFIG))
    assert float(whole.model.offset) != 0
    assert float(stopped.model.offset) == float(whole.model.offset)


@pytest.mark.parametrize("file", ["model.safetensors", "values.json", "manifest.json"])
def test_a_damaged_state_is_named_and_not_taken_up(tmp_path, file):
    config = dataclasses.replace(CONFIG, steps=10)
    train(LineTask(), config, tmp_path, Run(config))
    damaged = tmp_path / "training" / "state" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"damaged|cannot be read|no state of this version"):
        train(LineTask(), CONFIG, tmp_path, Run(CONFIG))


def test_a_folder_that_was_removed_gets_no_state_without_its_log(tmp_path):
    folder = tmp_path / "removed" / "training" / "state"
    with pytest.raises(FileNotFoundError, match=r"removed/training was removed .* repeat the command"):
        save_state(folder, {}, {})
    assert not (tmp_path / "removed").exists()


def test_an_evaluation_that_is_made_again_is_not_logged_twice(tmp_path):
    log = RunLog(tmp_path, 0, 0)
    for step in (3, 4):
        log.write(step, {"loss": 1.0})
    log.write(4, {"val/loss": 2.0})
    log.write(5, {"loss": 0.5})
    killed_before_the_state_was_saved = RunLog(tmp_path, resumed_step=4, evaluated_step=2)
    assert killed_before_the_state_was_saved.lines == [{"step": 3, "loss": 1.0}, {"step": 4, "loss": 1.0}]


def test_a_run_goes_on_with_smaller_batches_if_its_steps_see_as_many_examples(tmp_path):
    begun = dataclasses.replace(CONFIG, steps=10)
    train(LineTask(), begun, tmp_path, Run(begun))
    larger = dataclasses.replace(CONFIG, batch_size=2 * CONFIG.batch_size)
    message = r"steps see 2 examples, here they would see 4; take --training\.batch-size 2"
    with pytest.raises(ValueError, match=message):
        train(LineTask(), larger, tmp_path, Run(larger))

    halves = dataclasses.replace(CONFIG, batch_size=1, accumulation_steps=2)
    task, whole = LineTask(), LineTask()
    train(task, halves, tmp_path, Run(halves))
    for config in (begun, CONFIG):
        train(whole, config, tmp_path / "whole", Run(config))
    pairs = [first + second for first, second in itertools.pairwise(task.model.seen)][::2]
    assert pairs == whole.model.seen[10:], "the same examples in the same steps"
    assert float(task.model.slope) == pytest.approx(float(whole.model.slope), abs=1e-4)


def test_a_state_with_pickles_is_refused_with_the_way_out(tmp_path):
    state = tmp_path / "training" / "state"
    state.mkdir(parents=True)
    (state / "custom_checkpoint_0.pkl").write_bytes(b"cos\nsystem\n(S'touch gotcha'\ntR.")
    with pytest.raises(ValueError, match=r"held pickles.*--start"):
        train(LineTask(), CONFIG, tmp_path, Run(CONFIG))


def test_the_weights_of_every_evaluation_are_kept_where_asked_for(tmp_path):
    class Worsening(LineTask):
        def evaluate(self, model, step):
            return {"loss": float(step)}

        def save(self, model, directory, card):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "slope").write_text(str(float(model.slope)))

    config = dataclasses.replace(CONFIG, keep_evaluated=True)
    train(Worsening(), config, tmp_path, Run(config))
    kept = sorted((tmp_path / "training" / "evaluated").iterdir())
    assert [folder.name for folder in kept] == ["step-000010", "step-000020", "step-000030"]
    assert (kept[0] / "slope").read_text() == (tmp_path / "slope").read_text()  # the best ones


def test_a_half_written_line_of_the_log_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]


def drawn(count: int, length: int = 10, batch_size: int = 4, **options) -> list[list[tuple[int, int]]]:
    """The examples of the first batches of one process."""
    stream = ShuffledStream(length, batch_size, **{"start": 0, "seed": 3} | options)
    return [draws.items[draws.own_rows] for draws in itertools.islice(stream, count)]


def joined(batches: list[list]) -> list:
    return functools.reduce(operator.iadd, batches, [])


def test_the_stream_visits_everything_once_a_pass_and_starts_anywhere():
    first = drawn(5)
    assert sorted(index for index, _ in joined(first)[:10]) == list(range(10))
    assert drawn(3, start=2) == first[2:]
    assert drawn(5, seed=4) != first
    draws = [draw for _, draw in joined(first)]
    assert len(set(draws)) == len(draws)


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
    steps=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4),
)
def test_no_example_comes_twice_or_never_in_a_pass_for_any_number_of_processes(
    length, batch_size, world_size, steps
):
    """`steps`: the run is resumed now and then, each time with another number of processes, which divide the
    same batch of 6 * batch_size."""
    size = 6 * batch_size
    visited = []
    for step, number in enumerate([world_size, *steps]):
        parts = [
            drawn(1, length, size // number, start=step, rank=rank, world_size=number)
            for rank in range(number)
        ]
        visited += joined([batch for part in parts for batch in part])
    assert visited == joined(drawn(1 + len(steps), length, size))
    passes = [visited[start : start + length] for start in range(0, len(visited), length)]
    for whole_pass in passes:
        indices = [index for index, _ in whole_pass]
        assert len(set(indices)) == len(indices), "twice"
        assert len(indices) < length or sorted(indices) == list(range(length)), "never"


def test_mixed_seeds_differ_by_place_and_fit_a_generator():
    seeds = {mixed_seed(a, b, c) for a in range(5) for b in range(20) for c in range(5)}
    assert len(seeds) == 500 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
