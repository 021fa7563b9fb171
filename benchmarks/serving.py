"""python benchmarks/serving.py --address http://127.0.0.1:7860/ --clients 200 --rounds 5

Many clients at once on a demo that runs: each asks for one image after another, and waits for each. Prints
how many answers were lost, and how long clients waited. On the loopback address every request is a client of
its own; from another machine, `--max-jobs-per-client` must allow as many.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence

import httpx
import numpy as np

from tavq.base.arguments import parse, run_main


@dataclasses.dataclass(frozen=True)
class ServingRun:
    """Measure how long clients wait for a running demo.

    Example: python benchmarks/serving.py --address http://127.0.0.1:7860/ --clients 200
    """

    address: str = "http://127.0.0.1:7860/"
    """Address of the demo."""
    clients: int = 200
    """Clients that ask at the same time."""
    rounds: int = 5
    """Images that each client asks for, one after another."""
    timeout_s: float = 3600.0
    """Seconds after which an answer counts as lost."""
    json: bool = False
    """Print the result as JSON."""


@dataclasses.dataclass
class Answers:
    """What the clients got so far."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(ServingRun, argv, prog="python benchmarks/serving.py")
    start = time.monotonic()
    answers = asyncio.run(ask_all(run))
    result = {
        "asked": run.clients * run.rounds,
        "lost": len(answers.lost),
        "seconds": round(time.monotonic() - start, 2),
        "wait_median_s": round(float(np.median(answers.seconds)), 2) if answers.seconds else None,
        "wait_longest_s": round(max(answers.seconds), 2) if answers.seconds else None,
        "first_reasons": answers.lost[:3],
    }
    print(json.dumps(result) if run.json else "\n".join(f"{name}: {value}" for name, value in result.items()))


async def ask_all(run: ServingRun) -> Answers:
    """Let all clients ask at the same time."""
    answers = Answers()
    limits = httpx.Limits(max_connections=2 * run.clients)
    async with httpx.AsyncClient(base_url=run.address, timeout=run.timeout_s, limits=limits) as http:
        await asyncio.gather(*(ask_in_turn(http, client, run, answers) for client in range(run.clients)))
    return answers


async def ask_in_turn(http: httpx.AsyncClient, client: int, run: ServingRun, answers: Answers) -> None:
    """Ask for `rounds` images, one after another."""
    for number in range(run.rounds):
        seed = client * run.rounds + number
        start = time.monotonic()
        try:
            accepted = await http.post("gradio_api/call/draw", json={"data": ["a dog runs", seed]})
            accepted.raise_for_status()
            event = accepted.json()["event_id"]
            stream = (await http.get(f"gradio_api/call/draw/{event}")).text
        except httpx.HTTPError as error:
            answers.lost.append(repr(error))
            continue

        last = stream.rstrip().split("\n\n")[-1]
        if last.startswith("event: complete") and f"/seed-{seed}-" in last:
            answers.seconds.append(time.monotonic() - start)
        else:
            answers.lost.append(last)


if __name__ == "__main__":
    main()
