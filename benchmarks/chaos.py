"""python benchmarks/chaos.py [--kills 100] [--only caption index] [--into docs/scale.md]   (or: make chaos)

Claim: whenever a command is killed (SIGKILL), the same command goes on, and at the end the output equals that
of a run that nothing stopped: weights and optimizer bit for bit, no row lost or doubled. And what else a
machine does (a full disk, a read-only folder, a deleted output, two runs at once, SIGTERM, cut or compressed
shards) ends in one line and exit code 2, and the repeated command goes on.

Each command runs in a process that is forked after the libraries are loaded, so that the kills, at random
moments of the time that the whole command takes, fall into its work. The benchmark resumes, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chaos_jobs import JOBS
from chaos_trial import DAMAGE, FAULTS, READERS, Trial, try_damage
from chaos_world import World, start_chat_server

from tavq import cli
from tavq.base.arguments import parse, run_main
from tavq.base.files import atomic_write, file_sha256
from tavq.base.progress import Progress
from tavq.eval.table import write_block

KILLS_PER_CHAIN = 4  # after so many the command is left alone, and its output compared
PRELOADED = (
    *("torch", "transformers", "accelerate", "webdataset", "faiss", "openai", "torch_fidelity", "nltk"),
    *("tensorboard", "torch.utils.tensorboard", "pycocoevalcap.cider.cider", "textblob", "sklearn"),
    *("tavq.pipeline", "tavq.photo_index", "tavq.captioner.caption_folder", "tavq.generator.preference"),
    *("tavq.tokenizer.train", "tavq.tokenizer.train_decoder", "tavq.tokenizer.encode_dataset"),
    *("tavq.tokenizer.describe_dataset", "tavq.generator.train_lexicon", "tavq.captioner.self_critical"),
)


@dataclasses.dataclass(frozen=True)
class ChaosRun:
    """Kill every command that resumes at random moments, and see whether the end is the same.

    Example: python benchmarks/chaos.py --kills 100 --into docs/scale.md
    """

    kills: int = 100
    """Kills in all, shared among the commands."""
    seed: int = 0
    """Seed of the moments."""
    only: tuple[str, ...] = ()
    """Names of commands; all by default."""
    faults: bool = True
    """Try the other faults, too."""
    out: Path = Path("runs/chaos")
    """Folder of the trials; holds results.json. The same command goes on there."""
    into: Path | None = None
    """Markdown file to write the table into, between its marker lines."""

    def __post_init__(self) -> None:
        unknown = set(self.only) - {job.name for job in JOBS}
        if unknown:
            raise ValueError(f"no command {min(unknown)!r}; choose among: {', '.join(j.name for j in JOBS)}")


class Chaos:
    """All trials of a run, and the file of their results."""

    def __init__(self, run: ChaosRun):
        self.run = run
        self.folder = run.out.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "results.json"
        self.results: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.jobs = [job for job in JOBS if not run.only or job.name in run.only]

    def save(self) -> None:
        with atomic_write(self.file) as path:
            path.write_text(json.dumps(self.results, indent=1) + "\n")

    def run_all(self) -> None:
        world = World(self.folder / "world")
        world.folder.mkdir(exist_ok=True)
        with chat_server(world):
            in_a_fork(world.build, self.folder / "world.log")
            os.environ["TAVQ_TRUST"] = file_sha256(Path(world.places()["network"]))
            trials = [
                Trial(
                    job,
                    world,
                    self.folder / job.name.replace(" ", "-"),
                    self.results.setdefault(job.name, {}),
                )
                for job in self.jobs
            ]
            for trial in trials:
                trial.run_whole()
                self.save()
            self._kill(trials)
            if self.run.faults:
                self._try_faults(trials)
                self._try_damage(world)

    def _kill(self, trials: list[Trial]) -> None:
        done = sum(trial.results["kills"] for trial in trials)
        with Progress(total=max(done, self.run.kills), initial=done, unit="kill") as bar:
            while done < self.run.kills:
                trial = min(trials, key=lambda trial: trial.results["kills"])
                most = min(KILLS_PER_CHAIN, self.run.kills - done)
                chain = trial.chain(len(trial.results["chains"]), self.run.seed, most)
                trial.results["chains"].append(chain)
                trial.results["kills"] += chain["kills"]
                done += chain["kills"]
                bar.update(chain["kills"])
                if chain["difference"]:
                    bar.write(
                        f"{trial.job.name}, chain {len(trial.results['chains'])}: {chain['difference']}"
                    )
                self.save()

    def _try_faults(self, trials: list[Trial]) -> None:
        todo = [
            (trial, fault) for trial in trials for fault in FAULTS if fault not in trial.results["faults"]
        ]
        for trial, fault in Progress(todo, unit="fault"):
            outcome = trial.results["faults"][fault] = trial.try_fault(fault)
            if outcome:
                print(f"{trial.job.name}, {fault}: {outcome}", flush=True)
            self.save()

    def _try_damage(self, world: World) -> None:
        for job in self.jobs:
            for damage in DAMAGE if job.name in READERS else ():
                faults = self.results[job.name]["faults"]
                if damage not in faults:
                    faults[damage] = try_damage(world, self.folder / "damage", job.name, damage)
                    if faults[damage]:
                        print(f"{job.name}, {damage}: {faults[damage]}", flush=True)
                    self.save()

    def failures(self) -> list[str]:
        """What was not as it should be."""
        found = []
        for job in self.jobs:
            results = self.results[job.name]
            found += [f"{job.name}: {c['difference']}" for c in results["chains"] if c["difference"]]
            found += [f"{job.name}, {fault}: {what}" for fault, what in results["faults"].items() if what]
        return found

    def table(self) -> str:
        """Return the results as a Markdown table."""
        shown = [*FAULTS, *DAMAGE] if self.run.faults else []
        head = ["command", "kills", "chains", "equal at the end", *shown]
        lines = [f"| {' | '.join(head)} |", "| --- " + "| ---: " * 3 + "| --- " * len(shown) + "|"]
        for job in self.jobs:
            results = self.results[job.name]
            equal = sum(not chain["difference"] for chain in results["chains"])
            cells = [f"`{job.name}`", str(results["kills"]), str(len(results["chains"])), str(equal)]
            for fault in shown:
                outcome = results["faults"].get(fault)
                cells.append("-" if outcome is None else outcome or "held")
            lines.append(f"| {' | '.join(cells)} |")
        kills = sum(self.results[job.name]["kills"] for job in self.jobs)
        return "\n".join([*lines, "", f"{kills} kills, seed {self.run.seed}."])


@contextlib.contextmanager
def chat_server(world: World) -> Iterator[None]:
    """Let the chat server of the tests run in a process of its own."""
    process, world.endpoint = start_chat_server()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def in_a_fork(work: Callable[[], None], log: Path) -> None:
    """Do some work in a forked process, so that this one stays without threads."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise RuntimeError(f"what the commands work on could not be made; see {log}")


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(ChaosRun, argv, prog="python benchmarks/chaos.py")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in PRELOADED:
        importlib.import_module(name)
    chaos = Chaos(run)
    for job in chaos.jobs:
        cli.entry_point(
            next(name for name in sorted(cli.COMMANDS, key=len)[::-1] if job.arguments.startswith(f"{name} "))
        )
    import torch

    torch.set_num_threads(1)
    chaos.run_all()
    print(chaos.table())
    if run.into is not None:
        write_block(run.into, "chaos", chaos.table())
    if failures := chaos.failures():
        print("\n".join(["", "not held:", *failures]))
        sys.exit(1)


if __name__ == "__main__":
    main()
