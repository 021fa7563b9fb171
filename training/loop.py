"""The one training loop: tokenizer, generator and captioner all run through `train`.

Everything random in step t comes from (seed, t), the order of the data from the seed alone, so that weights,
optimiser and step number are enough to resume bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, send_to_device
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from tavq.base.arguments import to_plain
from tavq.base.seeding import mixed_seed

from .card import model_card
from .optimizer import MuonAdamW
from .run_folder import RunLog, StopRequest, claim_folder
from .stream import ShuffledStream
from .task import StepOutput, Task, TrainingConfig

ESTIMATE_AT_STEP = 20
KEPT = "kept"  # folder of the weights of every evaluation


@dataclasses.dataclass
class LoopState:
    """What the loop itself must remember; saved with the weights."""

    step: int = 0
    best: float = math.nan
    evaluations_since_best: int = 0
    seconds: float = 0.0
    environment: str = ""

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)


def train(task: Task, config: TrainingConfig, out: Path, resolved: Any) -> None:
    """Train `task` into the directory `out`; the same call resumes a run that was stopped.

    `out` gets the checkpoint (the averaged weights that scored best in `evaluate`), `out/training` the
    resolved configuration, log, TensorBoard and the state to resume from.

    Args:
        task: model, data and evaluation.
        config: how long and how fast.
        out: the directory of the run, made when it does not exist.
        resolved: the dataclass of the whole run, printed once and saved.

    Raises:
        ValueError: `out` holds a run with another configuration.
        FloatingPointError: the loss is not finite; the message names the step.
        SystemExit: 128 + the signal that asked for a stop; the state is saved.
    """
    Trainer(task, config, out, resolved).run()


class Trainer:
    """State of one run of `train`."""

    def __init__(self, task: Task, config: TrainingConfig, out: Path, resolved: Any):
        self.task, self.config, self.out, self.resolved = task, config, out, resolved
        if config.patience and task.watch is None:
            raise ValueError(f"the {task.name} has no score to stop early by; leave out --training.patience")
        self.folder = out / "training"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulation_steps,
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=task.rests)],
        )
        self.is_main = self.accelerator.is_main_process
        claim_folder(self.folder, resolved, self.is_main)
        self.state = LoopState()
        torch.manual_seed(config.seed)
        groups = task.parameter_groups(config)
        optimizer = MuonAdamW(groups, lr=config.learning_rate, betas=config.betas)
        self.averaged = AveragedModel(task.model, multi_avg_fn=_moving_average(config.ema_decay))
        self.averaged.to(self.accelerator.device).requires_grad_(False)
        self.model, self.optimizer = self.accelerator.prepare(task.model, optimizer)
        self.critic = self.critic_optimizer = None
        if task.critic is not None:
            critic_optimizer = torch.optim.AdamW(
                task.critic.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=0.0
            )
            self.critic, self.critic_optimizer = self.accelerator.prepare(task.critic, critic_optimizer)
        self.accelerator.register_for_checkpointing(self.state, self.averaged)

    def run(self) -> None:
        resumed = self._resume()
        if resumed and self.state.step >= self.config.steps:
            print(f"{self.out} has all {self.config.steps} steps already; raise --training.steps to go on")
            return
        self.log = RunLog(self.folder, self.state.step) if self.is_main else None
        with StopRequest() as stop:
            self._steps(stop)

    def _steps(self, stop: StopRequest) -> None:
        config, state = self.config, self.state
        bar = tqdm(
            total=config.steps, initial=state.step, unit="step", disable=None if self.is_main else True
        )
        began, first, saved = time.monotonic(), state.step, time.monotonic()
        seconds_before = state.seconds
        batches = iter(self._loader())
        while state.step < config.steps and not self._anywhere(stop.requested):
            report = self._step(batches)
            state.step += 1
            state.seconds = seconds_before + time.monotonic() - began
            rate = (state.step - first) / (time.monotonic() - began)
            self._show(bar, report, rate, state.step - first)
            if state.step % config.evaluate_every == 0 or state.step == config.steps:
                self._evaluate(bar)
                state.best, state.evaluations_since_best = broadcast_object_list(
                    [state.best, state.evaluations_since_best]
                )
                if config.patience and state.evaluations_since_best >= config.patience:
                    bar.write(
                        f"stopped at step {state.step}: {config.patience} evaluations without a better one"
                    )
                    state.step = config.steps
            if time.monotonic() - saved > 60 * config.checkpoint_minutes:
                self._save_state()
                saved = time.monotonic()
        self._save_state()
        bar.close()
        if self._anywhere(stop.requested):
            print(f"stopped at step {state.step}; the same command goes on from there")
            raise SystemExit(stop.exit_code)

    def _anywhere(self, requested: bool) -> bool:
        """Whether any process was asked to stop; all must leave in the same step."""
        if self.accelerator.num_processes == 1:
            return requested
        flags = torch.tensor(float(requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, "sum"))

    def _step(self, batches: Any) -> dict[str, float]:
        """One optimiser step (of both players), over `accumulation_steps` forward passes."""
        step, config = self.state.step, self.config
        factor = config.learning_rate_at(step)
        critic_groups = self.critic_optimizer.param_groups if self.critic else []
        for group in self.optimizer.param_groups + critic_groups:
            group["lr"] = config.learning_rate * factor * group.get("lr_scale", 1.0)
        self.model.train()
        modules = [self.model] + ([self.critic] if self.critic else [])
        for micro in range(config.accumulation_steps):
            torch.manual_seed(mixed_seed(config.seed, step, micro, self.accelerator.process_index))
            batch = send_to_device(next(batches), self.accelerator.device, non_blocking=True)
            with self.accelerator.accumulate(*modules):
                output = self._update(self.model, self.optimizer, batch)
                report = dict(output.report)
                if self.critic is not None and output.for_critic is not None:
                    report |= self._update(self.critic, self.critic_optimizer, output.for_critic).report
        self.averaged.update_parameters(self.accelerator.unwrap_model(self.model))
        if self.state.step % config.log_every and self.state.step + 1 != config.steps:
            return {}
        return {name: torch.as_tensor(value).item() for name, value in report.items()}

    def _update(self, module: nn.Module, optimizer: Any, batch: Any) -> StepOutput:
        output = module(batch, self.state.step)
        if not torch.isfinite(output.loss):
            parts = ", ".join(f"{name} {float(value):.4g}" for name, value in output.report.items())
            raise FloatingPointError(
                f"the loss is not finite in step {self.state.step} ({parts}); "
                f"lower --training.learning-rate; the last state is in {self.folder}"
            )
        self.accelerator.backward(output.loss)
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(module.parameters(), self.config.grad_clip_norm)
            output.report[f"grad_norm/{'critic' if module is self.critic else 'model'}"] = norm
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return output

    def _loader(self) -> DataLoader:
        accelerator, config = self.accelerator, self.config
        stream = ShuffledStream(
            len(self.task.dataset),
            config.batch_size,
            start=self.state.step * config.accumulation_steps,
            seed=config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        return DataLoader(
            self.task.dataset,
            batch_sampler=stream,
            collate_fn=self.task.collate,
            num_workers=config.num_workers,
            pin_memory=accelerator.device.type == "cuda",
            persistent_workers=config.num_workers > 0,
        )

    @property
    def _per_step(self) -> int:
        """Examples of one step, of all processes."""
        return self.config.batch_size * self.config.accumulation_steps * self.accelerator.num_processes

    def _show(self, bar: tqdm, report: dict[str, float], rate: float, steps_now: int) -> None:
        if not self.is_main:
            return
        examples_per_s = rate * self._per_step
        bar.update(1)
        bar.set_postfix_str(f"{examples_per_s:.1f} examples/s", refresh=False)
        left = (self.config.steps - self.state.step) / rate
        if steps_now == ESTIMATE_AT_STEP:
            gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            speed = f"{examples_per_s:.1f} examples/s"
            bar.write(f"about {_minutes(left)} to go at {speed}; {gib:.1f} GiB so far")
        if report:
            self.log.write(self.state.step, report | {"examples_per_s": examples_per_s})
            if bar.disable:
                values = "  ".join(f"{name} {value:.4g}" for name, value in report.items())
                print(
                    f"step {self.state.step}/{self.config.steps}  {_minutes(left)} left  {values}", flush=True
                )

    def _evaluate(self, bar: tqdm) -> None:
        """Score the averaged weights; save them as the checkpoint when they are the best so far."""
        self.accelerator.wait_for_everyone()
        if not self.is_main:
            return
        state = self.state
        model = self.averaged.module.eval()
        metrics = self.task.evaluate(model, state.step)
        self.log.write(state.step, {f"val/{key}": value for key, value in metrics.items()})
        values = "  ".join(f"val/{key} {value:.4f}" for key, value in metrics.items())
        bar.write(f"step {state.step}  {values}")
        for title, picture in self.task.pictures(model).items():
            self.log.board.add_image(title, picture, state.step, dataformats="HWC")
        seen = state.step * self._per_step
        card = model_card(self.task.name, to_plain(self.resolved), self.log.lines, seen, state.seconds)
        if self.config.keep_evaluated:
            self.task.save(model, self.folder / KEPT / f"step-{state.step:06d}", card)
        if self._is_best(metrics):
            self.task.save(model, self.out, card)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        if self.task.watch is None:
            return True
        state, (name, direction) = self.state, self.task.watch
        score = metrics[name]
        better = math.isnan(state.best) or (score < state.best if direction == "min" else score > state.best)
        state.evaluations_since_best = 0 if better else state.evaluations_since_best + 1
        state.best = score if better else state.best
        return better

    def _save_state(self) -> None:
        """Write the state aside, then rename it over the old one."""
        self.accelerator.wait_for_everyone()
        new, old = self.folder / "state.new", self.folder / "state"
        if self.is_main:
            shutil.rmtree(new, ignore_errors=True)
        self.state.environment = self._environment()
        self.accelerator.save_state(str(new))
        self.accelerator.wait_for_everyone()
        if self.is_main:
            if old.exists():
                shutil.rmtree(self.folder / "state.old", ignore_errors=True)
                old.rename(self.folder / "state.old")
            new.rename(old)
            shutil.rmtree(self.folder / "state.old", ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> bool:
        found = [self.folder / name for name in ("state", "state.old") if (self.folder / name).exists()]
        if not found:
            return False
        self.accelerator.load_state(str(found[0]))
        print(f"resuming {self.out} at step {self.state.step}")
        if self.state.environment != self._environment():
            warnings.warn(
                f"the run began on {self.state.environment} and goes on on {self._environment()}: "
                "it continues, but not bit for bit",
                stacklevel=2,
            )
        return True

    def _environment(self) -> str:
        accelerator = self.accelerator
        return (
            f"{accelerator.device.type} with {torch.get_num_threads()} threads, "
            f"{accelerator.num_processes} process(es), torch {torch.__version__}"
        )


def _moving_average(decay: float) -> Callable[..., None]:
    """Exponential moving average whose decay grows to `decay`; the first weights are soon forgotten."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + int(updates)) / (10 + int(updates))))

    return update


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
