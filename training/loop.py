"""The one training loop: tokenizer, generator and captioner all run through `train`.

Everything random in step t comes from (seed, t), the order of the data from the seed alone, so that weights,
optimizer and step number are enough to resume bit for bit.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import dataclasses
import datetime
import functools
import math
import resource
import time
import warnings
from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    send_to_device,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from tavq.base.arguments import to_plain
from tavq.base.locks import only_writer
from tavq.base.processes import common_random_numbers
from tavq.base.seeding import mixed_seed

from .average import Whole, moving_average
from .card import model_card
from .config import TrainingConfig
from .optimizer import MuonAdamW, whole
from .run_folder import RunLog, StopRequest, claim_folder
from .state import (
    Tensors,
    find_state,
    forget_other_moments,
    join_optimizer_state,
    load_state,
    save_state,
    split_optimizer_state,
)
from .stream import Batches, ShuffledStream
from .task import StepOutput, Task

ESTIMATE_AT_STEP = 20
EVALUATED_FOLDER = "evaluated"  # of the weights of every evaluation
PATIENT = datetime.timedelta(hours=24)  # the others wait while the main process draws samples and saves


@dataclasses.dataclass
class LoopState:
    """What the loop itself must remember; saved with the weights."""

    step: int = 0
    best: float = math.nan
    evaluations_since_best: int = 0
    seconds: float = 0.0
    evaluated_step: int = 0
    environment: str = ""
    examples_per_step: int = 0  # 0 in states that did not note it


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

    log: RunLog
    """Of the main process alone."""

    def __init__(self, task: Task, config: TrainingConfig, out: Path, resolved: Any):
        if config.patience and task.monitor is None:
            raise ValueError(f"the {task.name} has no score to stop early by; leave out --training.patience")
        self.task = task
        self.config = config
        self.out = out
        self.resolved = resolved
        self.folder = out / "training"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulation_steps,
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[
                # Losses are on in some steps only, and with them some parameters.
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=PATIENT),
            ],
        )
        _leave_group_at_exit()
        self.is_main = self.accelerator.is_main_process
        claim_folder(self.folder, resolved, self.is_main)
        self.state = LoopState()
        torch.manual_seed(config.seed)
        self._prepare_model()
        self._prepare_discriminator()

    def _prepare_model(self) -> None:
        config = self.config
        groups = self.task.parameter_groups(config)
        optimizer = MuonAdamW(groups, lr=config.learning_rate, betas=config.betas)
        self.averaged = moving_average(self.task.shipped, config.ema_decay)
        self.averaged.to(self.accelerator.device).requires_grad_(False)
        self.model, self.optimizer = self.accelerator.prepare(self.task.model, optimizer)

    def _prepare_discriminator(self) -> None:
        config, discriminator = self.config, self.task.discriminator
        self.discriminator = self.discriminator_optimizer = None
        if discriminator is None:
            return
        rate = self.task.discriminator_rate or config.learning_rate
        group = {"params": list(discriminator.parameters()), "lr_scale": rate / config.learning_rate}
        # Slow second moments: the players' gradients change their meaning as the other one learns.
        optimizer = torch.optim.AdamW([group], lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.discriminator, self.discriminator_optimizer = self.accelerator.prepare(discriminator, optimizer)

    def run(self) -> None:
        """Resume where there is something to resume, and train to the last step."""
        with only_writer(self.out) if self.is_main else contextlib.nullcontext():
            self._run()

    def _run(self) -> None:
        self._resume()
        if self.state.evaluated_step >= self.config.steps:
            if self.is_main:
                print(
                    f"{self.out} has all {self.config.steps} steps already; raise --training.steps to go on"
                )
            return
        if self.is_main:
            self.log = RunLog(self.folder, self.state.step, self.state.evaluated_step)
        with StopRequest() as stop:
            self._train_steps(stop)

    def _train_steps(self, stop: StopRequest) -> None:
        config, state = self.config, self.state
        bar = tqdm(
            total=config.steps, initial=state.step, unit="step", disable=None if self.is_main else True
        )
        began = saved = time.monotonic()
        first_step = state.step
        seconds_before = state.seconds
        batches = iter(self.loader())
        stopping = self._agree(stop.requested)
        if state.step and self._evaluation_due():
            self._evaluate(bar)  # a kill came between the last step and its evaluation

        while state.step < config.steps and not stopping:
            report = self.train_step(batches)
            state.step += 1
            state.seconds = seconds_before + time.monotonic() - began
            rate = (state.step - first_step) / (time.monotonic() - began)
            self._show(bar, report, rate, state.step - first_step)

            if self._evaluation_due():
                self._save_state()  # an evaluation can take long and fail: what was trained is safe first
                self._evaluate(bar)

            # One process decides: by clocks of their own, some would save while others wait for ever.
            due = time.monotonic() - saved > 60 * config.checkpoint_minutes
            if self._agree(due and self.is_main):
                self._save_state()
                saved = time.monotonic()
            stopping = self._agree(stop.requested)

        self._save_state()
        bar.close()
        if stopping:
            if self.is_main:
                print(f"stopped at step {state.step}; the same command goes on from there")
            raise SystemExit(stop.exit_code)

    def _evaluation_due(self) -> bool:
        step = self.state.step
        ends_here = step % self.config.evaluate_every == 0 or step == self.config.steps
        return ends_here and self.state.evaluated_step < step

    def _agree(self, flag: bool) -> bool:
        """Whether `flag` is set in any process: all take the same turn in the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, "sum"))

    def train_step(self, batches: Any) -> dict[str, float]:
        """Take one optimizer step of both players over `accumulation_steps` batches; return what to log."""
        step, config = self.state.step, self.config
        self._set_learning_rates(config.learning_rate * config.learning_rate_at(step))
        self.model.train()
        players = [self.model] if self.discriminator is None else [self.model, self.discriminator]

        for micro in range(config.accumulation_steps):
            # Each process its own dropout, all the same negatives, crops and restarts.
            torch.manual_seed(mixed_seed(config.seed, step, micro, self.accelerator.process_index))
            common = common_random_numbers(mixed_seed(config.seed, step, micro, 0))
            batch = send_to_device(next(batches), self.accelerator.device, non_blocking=True)
            with common, self.accelerator.accumulate(*players):
                report = self._update_players(batch)

        self.averaged.update_parameters(Whole(self.task.shipped))
        if step % config.log_every and step + 1 != config.steps:
            return {}
        return self._mean_of_processes(report)

    def _mean_of_processes(self, report: dict[str, Any]) -> dict[str, float]:
        """What is logged: each process has seen other examples."""
        values = torch.stack([whole(torch.as_tensor(value)).cpu().float() for value in report.values()])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values.to(self.accelerator.device), "mean").cpu()
        return dict(zip(report, values.tolist(), strict=True))

    def _update_players(self, batch: Any) -> dict[str, Any]:
        step = self.state.step
        if self.discriminator is None:
            return self._update(self.model, self.optimizer, batch, step).report
        opponent = self.accelerator.unwrap_model(self.discriminator).discriminator
        output = self._update(self.model, self.optimizer, batch, step, opponent)
        if output.for_discriminator is None:
            return output.report
        features = output.for_discriminator
        answer = self._update(self.discriminator, self.discriminator_optimizer, features, step)
        return output.report | answer.report

    def _update(self, module: nn.Module, optimizer: Any, *inputs: Any) -> StepOutput:
        """Forward, backward, clip, step."""
        output = module(*inputs)
        if not torch.isfinite(output.loss):
            parts = ", ".join(f"{name} {float(value):.4g}" for name, value in output.report.items())
            raise FloatingPointError(
                f"the loss is not finite in step {self.state.step} ({parts}); "
                f"lower --training.learning-rate; the last state is in {self.folder}"
            )
        self.accelerator.backward(output.loss)
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(module.parameters(), self.config.grad_clip_norm)
            player = "discriminator" if module is self.discriminator else "model"
            output.report[f"grad_norm/{player}"] = norm
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return output

    def _set_learning_rates(self, rate: float) -> None:
        groups = list(self.optimizer.param_groups)
        if self.discriminator_optimizer is not None:
            groups += self.discriminator_optimizer.param_groups
        for group in groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def loader(self) -> DataLoader:
        """Batches from the step on that the run has reached, without end."""
        accelerator, config = self.accelerator, self.config
        stream = ShuffledStream(
            len(cast(Sized, self.task.dataset)),  # torch's Dataset promises no length
            config.batch_size,
            start=self.state.step * config.accumulation_steps,
            seed=config.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        return DataLoader(
            Batches(self.task),
            batch_sampler=cast("Any", stream),  # torch's type knows lists of indices alone
            collate_fn=_as_it_is,
            num_workers=config.num_workers,
            pin_memory=accelerator.device.type == "cuda",
            persistent_workers=config.num_workers > 0,
        )

    @property
    def _examples_per_step(self) -> int:
        """Examples of one step, of all processes."""
        return self.config.batch_size * self.config.accumulation_steps * self.accelerator.num_processes

    def _show(self, bar: tqdm, report: dict[str, float], rate: float, steps_now: int) -> None:
        if not self.is_main:
            return
        examples_per_s = rate * self._examples_per_step
        bar.update(1)
        bar.set_postfix_str(f"{examples_per_s:.1f} examples/s", refresh=False)
        left = (self.config.steps - self.state.step) / rate
        if steps_now == ESTIMATE_AT_STEP:
            gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            bar.write(
                f"about {duration(left)} to go at {examples_per_s:.1f} examples/s; {gib:.1f} GiB so far"
            )
        if report:
            self.log.write(self.state.step, report | {"examples_per_s": examples_per_s})
            if bar.disable:
                values = "  ".join(f"{name} {value:.4g}" for name, value in report.items())
                print(
                    f"step {self.state.step}/{self.config.steps}  {duration(left)} left  {values}", flush=True
                )

    def _evaluate(self, bar: tqdm) -> None:
        """Score the averaged weights; save them as the checkpoint when they are the best so far."""
        state, patience = self.state, self.config.patience
        model = self.averaged.module.eval()
        if state.step == self.config.steps:
            model = copy.deepcopy(model)  # a longer run goes on from weights that were never finished
            self.task.finish(model)
        metrics = self.task.evaluate(model, state.step)
        if self.is_main:
            self._keep(model, metrics, bar)
        state.best, state.evaluations_since_best = broadcast_object_list(
            [state.best, state.evaluations_since_best]
        )
        state.evaluated_step = state.step
        if patience and state.evaluations_since_best >= patience:
            bar.write(f"stopped at step {state.step}: {patience} evaluations without a better one")
            state.step = state.evaluated_step = self.config.steps

    def _keep(self, model: nn.Module, metrics: dict[str, float], bar: tqdm) -> None:
        """Log an evaluation, and save what is to be kept of it."""
        state, task = self.state, self.task
        self.log.write(state.step, {f"val/{key}": value for key, value in metrics.items()})
        values = "  ".join(f"val/{key} {value:.4f}" for key, value in metrics.items())
        bar.write(f"step {state.step}  {values}")
        for title, image in task.sample_images(model).items():
            self.log.board.add_image(title, image, state.step, dataformats="HWC")

        seen = state.step * self._examples_per_step
        card = model_card(
            task.name, to_plain(self.resolved), self.log.lines, seen, state.seconds, task.earlier_card
        )
        if self.config.keep_evaluated:
            task.save(model, self.folder / EVALUATED_FOLDER / f"step-{state.step:06d}", card)
        if self._is_best(metrics):
            task.save(model, self.out, card)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        if self.task.monitor is None:
            return True
        state = self.state
        name, direction = self.task.monitor
        score = metrics[name]
        if math.isnan(state.best):
            better = True
        elif direction == "min":
            better = score < state.best
        else:
            better = score > state.best
        state.evaluations_since_best = 0 if better else state.evaluations_since_best + 1
        state.best = score if better else state.best
        return better

    def _save_state(self) -> None:
        """Gather the state of all processes and write it, from the main process alone."""
        self.state.environment = self._environment()
        self.state.examples_per_step = self._examples_per_step
        tensors: Tensors = {"averaged": dict(self.averaged.state_dict()), "memory": self.task.memory()}
        values: dict[str, Any] = {"loop": dataclasses.asdict(self.state)}
        # By name, whole and on the CPU: so it fits any number of processes, sharded or not.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        for name, module, optimizer in self._players():
            tensors[name] = cast("dict[str, Tensor]", get_model_state_dict(module, options=options))
            moments = get_optimizer_state_dict(module, optimizer.optimizer, options=options)
            tensors[f"{name}-optimizer"], values[f"{name}-optimizer"] = split_optimizer_state(moments)
        if self.accelerator.scaler is not None:
            values["scaler"] = self.accelerator.scaler.state_dict()
        if self.is_main:
            save_state(self.folder / "state", tensors, values)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Take up the state of an earlier call, if any. The main process reads it, the others are told."""
        found = find_state(self.folder / "state") if self.is_main else None
        (found,) = broadcast_object_list([found])
        if found is None:
            return
        tensors, values = load_state(found) if self.is_main else ({}, None)
        (values,) = broadcast_object_list([values])
        self.state = LoopState(**values["loop"])
        self._check_examples_per_step()

        several = self.accelerator.num_processes > 1
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
        # Not strict: a parameter that never had a gradient has no moments.
        lenient = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several, strict=False)
        for name, module, optimizer in self._players():
            set_model_state_dict(module, cast("dict[str, Any]", tensors.get(name, {})), options=options)
            moments = join_optimizer_state(tensors.get(f"{name}-optimizer", {}), values[f"{name}-optimizer"])
            set_optimizer_state_dict(module, optimizer.optimizer, moments, options=lenient)
            (known,) = broadcast_object_list([sorted(moments["state"])])
            forget_other_moments(self.accelerator.unwrap_model(module), optimizer.optimizer, known)
        averaged = cast("dict[str, Any]", tensors.get("averaged", {}))
        set_model_state_dict(self.averaged, averaged, options=options)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])

        (memory,) = broadcast_object_list([tensors.get("memory", {})])
        self.task.recall(memory)
        if self.is_main:
            print(f"resuming {self.out} at step {self.state.step}")
        if self.state.environment != self._environment():
            warnings.warn(
                f"the run began on {self.state.environment} and goes on on {self._environment()}: "
                "it continues, but not bit for bit",
                stacklevel=2,
            )

    def _check_examples_per_step(self) -> None:
        """Refuse steps of another size than before: examples would be left out or repeated."""
        before, now = self.state.examples_per_step, self._examples_per_step
        if before in (0, now):
            return
        each = self.config.accumulation_steps * self.accelerator.num_processes
        advice = (
            f"--training.batch-size {before // each}" if before % each == 0 else "another number of processes"
        )
        raise ValueError(
            f"{self.out} holds a run whose steps see {before} examples, here they would see {now}; "
            f"take {advice}, or begin anew in another folder"
        )

    def _players(self) -> list[tuple[str, nn.Module, Any]]:
        players = [("model", self.model, self.optimizer)]
        if self.discriminator is not None:
            players.append(("discriminator", self.discriminator, self.discriminator_optimizer))
        return players

    def _environment(self) -> str:
        accelerator = self.accelerator
        return (
            f"{accelerator.device.type} with {torch.get_num_threads()} threads, "
            f"{accelerator.num_processes} process(es), torch {torch.__version__}"
        )


@functools.cache
def _leave_group_at_exit() -> None:
    """Leave the group of processes before the interpreter ends. Works once a process.

    Without it gloo's threads outlive the interpreter, and two processes of five abort at exit ("terminate
    called without an active exception"); torchrun then kills the main process while it saves.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():  # a program of its own may have left it before
        torch.distributed.destroy_process_group()


def _as_it_is(batch: Any) -> Any:
    return batch


def duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
