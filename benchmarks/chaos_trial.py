"""One command under trial: killed at random moments, and met by the faults of a machine."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chaos_jobs import Difference, Job
from chaos_world import World, drop_privileges

from tavq import cli

TIMEOUT_S = 300.0
FULL = "error: the disk is full or broken"


@dataclasses.dataclass
class Attempt:
    """One process that runs a command.

    Attributes:
        log: where all that it prints goes.
    """

    pid: int
    log: Path
    drain: subprocess.Popen[bytes] | None = None
    code: int | None = None

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or minus the signal, if the process ends in time; else None."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                if self.drain is not None:
                    self.drain.wait()
            elif time.monotonic() >= deadline:
                break
            else:
                time.sleep(0.002)
        return self.code

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    @property
    def last_line(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""

    @property
    def refusal(self) -> Difference:
        """What is wrong with the way in which the command refused; "" if nothing is."""
        if self.code != 2:
            return f"exit code {self.code}: {self.last_line}"
        text = self.log.read_text(errors="replace")
        return "" if self.last_line.startswith("error: ") and "Traceback" not in text else "no plain line"


def start(
    arguments: Sequence[str], log: Path, cache: Path, prepare: Callable[[], None] = lambda: None
) -> Attempt:
    """Run `tavq ARGUMENTS` in a forked process; `prepare` is called in it first."""
    # Through a pipe, so that limits of the process do not bind its log.
    drain = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log.open("ab"), start_new_session=True)
    assert drain.stdin is not None
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            for stream in (1, 2):
                os.dup2(drain.stdin.fileno(), stream)
            drain.stdin.close()
            os.environ["TAVQ_CACHE"] = str(cache)
            prepare()
            code = _exit_code_of(arguments)
        finally:
            os._exit(code)
    drain.stdin.close()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)
    return Attempt(pid, log, drain)


def _exit_code_of(arguments: Sequence[str]) -> int:
    try:
        cli.main(arguments)
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


class Trial:
    """The trials of one command.

    Args:
        job: the command.
        world: what it works on.
        folder: of its trials.
        results: what is known so far, which grows.
    """

    def __init__(self, job: Job, world: World, folder: Path, results: dict[str, Any]):
        self.job = job
        self.world = world
        self.folder = folder
        self.results = results
        results.setdefault("kills", 0)
        results.setdefault("chains", [])
        results.setdefault("faults", {})

    @property
    def whole(self) -> Path:
        """The output that nothing stopped."""
        return self.folder / "whole" / f"out{self.job.suffix}"

    def begin(self, folder: Path, prepare: Callable[[], None] = lambda: None, name: str = "log") -> Attempt:
        """Start the command with its output in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        out = str(folder / "work" / f"out{self.job.suffix}")
        Path(out).parent.mkdir(exist_ok=True)
        arguments = [part.format(out=out, **self.world.places()) for part in self.job.arguments.split()]
        return start(arguments, folder / name, folder / "cache", prepare)

    def run_whole(self) -> None:
        """Run the command to its end once."""
        if self.whole.exists():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        began = time.monotonic()
        attempt = self.begin(self.folder)
        if attempt.wait(TIMEOUT_S) != 0:
            raise RuntimeError(f"{self.job.name} ends with {attempt.code}: {attempt.last_line}")
        self.results["seconds"] = round(time.monotonic() - began, 2)
        (self.folder / "work").rename(self.folder / "whole")

    def fresh(self, name: str) -> Path:
        """An empty folder for a trial; every second one knows what the whole command put into the cache."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if len(self.results["chains"]) % 2 and (self.folder / "cache").exists():
            shutil.copytree(self.folder / "cache", folder / "cache")
        return folder

    def chain(self, number: int, seed: int, most: int) -> dict[str, Any]:
        """Kill the command up to `most` times, let it end, and compare."""
        rng = random.Random(f"{seed} {self.job.name} {number}")
        folder = self.fresh("chain")
        kills = 0
        for _ in range(most):
            attempt = self.begin(folder)
            if attempt.wait(rng.uniform(0, self.results["seconds"])) is not None:
                break
            attempt.send(signal.SIGKILL)
            attempt.wait(TIMEOUT_S)
            kills += 1
        return {"kills": kills, "difference": self.ends_well(folder)}

    def ends_well(self, folder: Path) -> Difference:
        """Run the command to its end; return what is unlike the whole output, or was left behind."""
        began = time.monotonic()
        attempt = self.begin(folder, name="last log")
        if attempt.wait(TIMEOUT_S) is None:
            attempt.send(signal.SIGKILL)
            attempt.wait(TIMEOUT_S)
            return f"the last run does not end in {TIMEOUT_S:.0f} s"
        if attempt.code != 0:
            return f"the last run ends with {attempt.code}: {attempt.last_line}"
        self.results["seconds"] = round(min(self.results["seconds"], time.monotonic() - began), 2)
        return self.compared(folder)

    def compared(self, folder: Path) -> Difference:
        out = folder / "work" / self.whole.name
        if not out.exists():
            return "there is no output"
        difference = self.job.compare(self.whole, out)
        left = [path.name for path in (folder / "work").rglob(".*")]
        left += [path.name for path in (folder / "work").iterdir() if path.name not in self.expected]
        return difference or (f"{left[0]} is left behind ({len(left)} in all)" if left else "")

    @property
    def expected(self) -> set[str]:
        return {path.name for path in (self.folder / "whole").iterdir()}

    def try_fault(self, fault: str) -> Difference:
        """Try one of `FAULTS`; return what was not as it should be."""
        folder = self.fresh("fault")
        difference = FAULTS[fault](self, folder)
        return difference or self.ends_well(folder)


def full_disk(trial: Trial, folder: Path) -> Difference:
    """No file may grow beyond half of the largest one of the output."""
    files = [trial.whole] if trial.whole.is_file() else [f for f in trial.whole.rglob("*") if f.is_file()]
    half = max(file.stat().st_size for file in files) // 2
    attempt = trial.begin(folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)))
    if attempt.wait(TIMEOUT_S) == 0:
        return "exit code 0"
    return attempt.refusal or ("" if attempt.last_line.startswith(FULL) else attempt.last_line)


def read_only(trial: Trial, folder: Path) -> Difference:
    """The folder of the output may not be written to."""
    (folder / "work").mkdir()
    (folder / "work").chmod(0o555)
    attempt = trial.begin(folder, drop_privileges)
    attempt.wait(TIMEOUT_S)
    (folder / "work").chmod(0o755)
    return attempt.refusal


def deleted_output(trial: Trial, folder: Path) -> Difference:
    """The folder of the output is deleted as soon as the command has written into it."""
    out = folder / "work" / trial.whole.name
    pattern = f"{out.name}/{trial.job.growing}" if trial.job.growing else "**/*"
    attempt = trial.begin(folder)
    while attempt.wait(0.002) is None and not _written(folder / "work", pattern):
        pass
    if attempt.code is not None:
        return ""  # it writes its output in one piece, at the end
    shutil.rmtree(folder / "work", ignore_errors=True)
    (folder / "work").mkdir(exist_ok=True)
    if attempt.wait(TIMEOUT_S) == 0:
        return "" if out.exists() and not trial.compared(folder) else "exit code 0 without the output"
    return attempt.refusal


def _written(folder: Path, pattern: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return any(file.is_file() and file.stat().st_size > 0 for file in folder.glob(pattern))
    return False


def two_at_once(trial: Trial, folder: Path) -> Difference:
    """Two runs write the same output; one goes on, or both do so one after the other."""
    attempts = [trial.begin(folder, name=f"log {number}") for number in (1, 2)]
    codes = sorted(str(attempt.wait(TIMEOUT_S)) for attempt in attempts)
    if codes == ["0", "0"]:
        return trial.compared(folder)
    refused = next((attempt for attempt in attempts if attempt.code != 0), attempts[0])
    wrong = refused.refusal or ("" if "another process writes" in refused.last_line else refused.last_line)
    return wrong if codes == ["0", "2"] else f"exit codes {' and '.join(codes)}: {refused.last_line}"


def sigterm(trial: Trial, folder: Path) -> Difference:
    """Asked to end in the middle of its work, the command says so."""
    for share in (0.6, 0.4, 0.2, 0.1, 0.05):
        attempt = trial.begin(folder)
        if attempt.wait(share * trial.results["seconds"]) is None:
            attempt.send(signal.SIGTERM)
            if attempt.wait(TIMEOUT_S) == 0:
                continue  # it had just ended
            if attempt.code not in (128 + signal.SIGTERM, -signal.SIGTERM):
                return f"exit code {attempt.code}: {attempt.last_line}"
            text = attempt.log.read_text(errors="replace")
            return "a traceback" if "Traceback" in text else ""
        shutil.rmtree(folder / "work")
    return "it ended before the signal"


FAULTS: dict[str, Callable[[Trial, Path], Difference]] = {
    "full disk": full_disk,
    "read-only folder": read_only,
    "output deleted": deleted_output,
    "two at once": two_at_once,
    "SIGTERM": sigterm,
}
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut shard": lambda content: content[: len(content) // 2 + 100],
    "gzipped shard": gzip.compress,
}
TOKENS = "--preset tiny --tokens {data} --tokenizer {checkpoint}/tokenizer --out {out}"
READERS = {
    "train generator": f"train generator {TOKENS}",
    "train captioner": f"train captioner {TOKENS}",
    "tokenize": "tokenize --data {data} --checkpoint {checkpoint}/tokenizer --out {out}",
    "train tokenizer": "train tokenizer --preset tiny --data {data} --out {out}",
}


def try_damage(world: World, folder: Path, name: str, damage: str) -> Difference:
    """Let a command read a shard that is cut or compressed; return what was not as it should be."""
    shutil.rmtree(folder, ignore_errors=True)
    if "--tokens" in READERS[name]:
        shutil.copytree(world.places()["tokens"], folder / "data")
    else:
        (folder / "data").mkdir(parents=True)
        photos = Path(world.places()["photos"])
        for split in ("train", "val", "test"):
            with tarfile.open(folder / "data" / f"{split}-000000.tar", "w") as archive:
                for file in sorted((photos / split).iterdir()):
                    archive.add(file, file.name)
    shard = next((folder / "data").glob("train-*.tar"))
    shard.write_bytes(DAMAGE[damage](shard.read_bytes()))
    places = world.places() | {"data": str(folder / "data"), "out": str(folder / "out")}
    attempt = start(READERS[name].format(**places).split(), folder / "log", folder / "cache")
    attempt.wait(TIMEOUT_S)
    named = "" if shard.name in attempt.last_line else f"does not name the shard: {attempt.last_line}"
    return attempt.refusal or named
