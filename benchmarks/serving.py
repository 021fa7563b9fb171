"""python benchmarks/serving.py --into docs/scale.md --plot docs/images/serving.png
python benchmarks/serving.py --address http://127.0.0.1:7860/ --clients 200 --rounds 5

Many clients at once: each asks for one image after another, and waits for each. The first form starts the
demo and `tavq serve` and compares them: all servers stay up and take turns in every round, on the same cores.
The second form asks a demo that runs already, and prints how many answers were lost and how long clients
waited. On the loopback address every request is a client of its own; from another machine,
`--max-jobs-per-client` must allow as many.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import psutil

from tavq.base.arguments import parse, run_main
from tavq.eval.table import with_block, write_block

PROMPTS = ("a dog runs", "a man on a mountain", "two girls play in the water", "a red car in the snow")
START_SECONDS = 600.0
SERVERS = {
    "the demo's queue": ["demo"],
    "`serve`, 1 replica": ["serve"],
    "`serve`, 1 replica, int8": ["serve", "--precision", "int8"],
    "`serve`, 2 replicas": ["serve", "--replicas", "2"],
    "`serve`, 2 replicas, int8": ["serve", "--replicas", "2", "--precision", "int8"],
}
"""Name in the table -> command."""


@dataclasses.dataclass(frozen=True)
class ServingRun:
    """Measure how many requests a server answers, and how long clients wait.

    Example: python benchmarks/serving.py --address http://127.0.0.1:7860/ --clients 200
    """

    address: str = ""
    """Address of a demo that runs; by default servers are started and compared."""
    clients: tuple[int, ...] = (1, 8, 32)
    """Clients that ask at the same time; one measurement each."""
    rounds: int = 2
    """Images that each client asks for, one after another."""
    least_requests: int = 8
    """Requests of a measurement, at least; few clients ask more often."""
    timeout_s: float = 3600.0
    """Seconds after which an answer counts as lost."""
    json: bool = False
    """Print the result as JSON."""
    into: Path | None = None
    """Page whose block `serving` takes the table."""
    plot: Path | None = None
    """PNG for the curves of images a second and of waiting over the number of clients."""

    def __post_init__(self) -> None:
        if self.into is not None:
            with_block(self.into, "serving", "")  # refused now, not after the work


@dataclasses.dataclass
class Answers:
    """What the clients got."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of the server and its processes."""

    def add(self, other: Answers) -> None:
        self.seconds += other.seconds
        self.lost += other.lost
        self.wall_seconds += other.wall_seconds
        self.cpu_seconds += other.cpu_seconds


AskOnce = Callable[[httpx.AsyncClient, str, int], Awaitable[str]]
"""Ask for an image of a prompt with a seed; return why there was none, or nothing."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(ServingRun, argv, prog="python benchmarks/serving.py")
    if not run.address:
        found = compare(run)
        table = _table(run, found)
        print(table)
        if run.plot is not None:
            draw_curves(run, found, run.plot)
        if run.into is not None:
            write_block(run.into, "serving", table)
        return

    for clients in run.clients:
        answers = asyncio.run(ask_all(run.address, ask_demo, clients, run.rounds, run.timeout_s))
        result = {
            "asked": clients * run.rounds,
            "lost": len(answers.lost),
            "seconds": round(answers.wall_seconds, 2),
            "wait_median_s": round(float(np.median(answers.seconds)), 2) if answers.seconds else None,
            "wait_longest_s": round(max(answers.seconds), 2) if answers.seconds else None,
            "first_reasons": answers.lost[:3],
        }
        lines = "\n".join(f"{name}: {value}" for name, value in result.items())
        print(json.dumps(result) if run.json else lines)


async def ask_all(address: str, ask: AskOnce, clients: int, rounds: int, timeout_s: float) -> Answers:
    """Let all clients ask at the same time."""
    answers = Answers()
    limits = httpx.Limits(max_connections=2 * clients)
    start = time.monotonic()
    async with httpx.AsyncClient(base_url=address, timeout=timeout_s, limits=limits) as http:
        await asyncio.gather(*(ask_in_turn(http, ask, client, rounds, answers) for client in range(clients)))
    answers.wall_seconds = time.monotonic() - start
    return answers


async def ask_in_turn(
    http: httpx.AsyncClient, ask: AskOnce, client: int, rounds: int, answers: Answers
) -> None:
    """Ask for `rounds` images, one after another."""
    for number in range(rounds):
        seed = client * rounds + number
        start = time.monotonic()
        try:
            reason = await ask(http, PROMPTS[seed % len(PROMPTS)], seed)
        except httpx.HTTPError as error:
            reason = repr(error)
        if reason:
            answers.lost.append(reason)
        else:
            answers.seconds.append(time.monotonic() - start)


async def ask_demo(http: httpx.AsyncClient, prompt: str, seed: int) -> str:
    """Ask the demo, as `gradio_client` does."""
    accepted = await http.post("gradio_api/call/draw", json={"data": [prompt, seed]})
    accepted.raise_for_status()
    event = accepted.json()["event_id"]
    stream = (await http.get(f"gradio_api/call/draw/{event}")).text
    last = stream.rstrip().split("\n\n")[-1]
    return "" if last.startswith("event: complete") and f"/seed-{seed}-" in last else last


async def ask_serve(http: httpx.AsyncClient, prompt: str, seed: int) -> str:
    """Ask `tavq serve`."""
    answer = await http.post("generate", json={"prompt": prompt, "seed": seed})
    return "" if answer.status_code == 200 and answer.json()["images"][0]["seed"] == seed else answer.text


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that this script started."""

    address: str
    process: psutil.Process
    ask: AskOnce

    def cpu_seconds(self) -> float:
        """Seconds that its processes have computed."""
        total = 0.0
        for process in [self.process, *self.process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total


@contextlib.contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[Server]:
    """Start `tavq COMMAND` on a free port, wait until it answers, and end it with the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    arguments = [sys.executable, "-m", "tavq", *command, "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as Ray sets it for a replica of one core
    with log.open("w") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"tavq {' '.join(command)} did not start: {log.read_text()[-1000:]}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{address}healthz", timeout=60).status_code == 200:
                    break
            time.sleep(0.5)
        yield Server(address, psutil.Process(process.pid), ask_demo if command[0] == "demo" else ask_serve)
    finally:
        process.terminate()
        process.wait()


Found = dict[tuple[str, int], Answers]
"""Name of a server and number of clients -> what they got."""


def compare(run: ServingRun) -> Found:
    """Start all servers, and let them take turns."""
    found = {(name, clients): Answers() for name in SERVERS for clients in run.clients}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {}
        for number, (name, command) in enumerate(SERVERS.items()):
            servers[name] = stack.enter_context(started(command, folder / f"{number}.log"))
            print(f"{name} is up at {servers[name].address}", file=sys.stderr, flush=True)

        for server in servers.values():  # first requests load and compile what later ones do not
            asyncio.run(ask_all(server.address, server.ask, 4, 1, run.timeout_s))
        for clients in run.clients:
            for _ in range(run.rounds):
                # One request a client at a time, so that no server has the quiet minutes to itself.
                asked = max(1, -(-run.least_requests // (clients * run.rounds)))
                for name, server in servers.items():
                    before = server.cpu_seconds()
                    answers = asyncio.run(ask_all(server.address, server.ask, clients, asked, run.timeout_s))
                    answers.cpu_seconds = server.cpu_seconds() - before
                    found[name, clients].add(answers)
                    print(f"{name}, {clients} clients: {_cells(answers)}", file=sys.stderr, flush=True)
    return found


def draw_curves(run: ServingRun, found: Found, path: Path) -> None:
    """Draw images a second, and the 95th percentile of waiting, over the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    rates, waits = figure.subplots(1, 2)
    for name in SERVERS:
        answers = [found[name, clients] for clients in run.clients]
        rate = [_rate(one) for one in answers]
        wait = [float(np.percentile(one.seconds, 95)) if one.seconds else np.nan for one in answers]
        label = name.replace("`", "")
        rates.plot(run.clients, rate, marker="o", label=label)
        waits.plot(run.clients, wait, marker="o", label=label)
    rates.set(xlabel="clients at once", ylabel="images a second")
    waits.set(xlabel="clients at once", ylabel="seconds within which 95 % are answered")
    for axes in (rates, waits):
        axes.set_xscale("log", base=2)
        axes.set_xticks(run.clients, [str(clients) for clients in run.clients])
        axes.set_ylim(bottom=0)
    rates.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _table(run: ServingRun, found: Found) -> str:
    columns = ["server", "clients", "images/s", "of the demo's", "p50, s", "p95, s", "CPU s an image", "lost"]
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores; one thread a model; "
        f"{sum(len(a.seconds) + len(a.lost) for a in found.values())} requests; {datetime.date.today()}",
        "",
        "| " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * (len(columns) - 1),
    ]
    first = next(iter(SERVERS))
    for name in SERVERS:
        for clients in run.clients:
            ratio = _rate(found[name, clients]) / _rate(found[first, clients])
            rate, *others = _cells(found[name, clients])
            lines.append("| " + " | ".join([name, str(clients), rate, f"{ratio:.2f}", *others]) + " |")
    return "\n".join(lines)


def _rate(answers: Answers) -> float:
    return len(answers.seconds) / answers.wall_seconds


def _cells(answers: Answers) -> list[str]:
    p50, p95 = np.percentile(answers.seconds, [50, 95])
    cpu = answers.cpu_seconds / len(answers.seconds)
    return [f"{_rate(answers):.2f}", f"{p50:.2f}", f"{p95:.2f}", f"{cpu:.3f}", str(len(answers.lost))]


if __name__ == "__main__":
    main()
