"""How jobs of several clients share one model: turns, shares, limits, and jobs that nobody listens to."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest

from tavq.app import components, jobs
from tavq.app.guard import GuardedBlocks
from tavq.app.jobs import MODEL, Job, Turns, client_of
from tavq.app.limits import Limits, RefusedError
from tavq.app.waiting import Pace, seconds_until_done


def turns_taken(*wanted: tuple[str, int]) -> list[str]:
    """Let clients, each with so many steps of 10 ms, ask in this order; return who was served when."""
    served: list[str] = []

    async def client(turns: Turns, name: str, steps: int) -> None:
        job = Job(name, "", float("inf"))
        for _ in range(steps):
            async with turns.of(job):
                served.append(name)
                await asyncio.sleep(0.01)

    async def all_of_them() -> None:
        turns = Turns()
        await asyncio.gather(*(client(turns, *one) for one in wanted))

    asyncio.run(all_of_them())
    return served


def test_a_client_with_one_step_waits_for_one_step_of_another():
    assert turns_taken(("greedy", 20), ("other", 1)).index("other") == 1


def test_a_client_with_many_jobs_gets_no_more_turns_than_one_with_one():
    served = turns_taken(("greedy", 10), ("greedy", 10), ("greedy", 10), ("other", 10))
    assert 9 <= served[:20].count("other") <= 10


def test_a_turn_that_is_cancelled_goes_to_the_next():
    async def scenario() -> list[str]:
        turns = Turns()
        served = []

        async def one(name: str) -> None:
            async with turns.of(Job(name, "", float("inf"))):
                served.append(name)
                await asyncio.sleep(0.05)

        first, second, third = (asyncio.create_task(one(name)) for name in "abc")
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.gather(first, second, third, return_exceptions=True)
        assert turns.holder is None
        return served

    assert asyncio.run(scenario()) == ["a", "c"]


def test_a_job_ends_when_it_has_computed_for_too_long():
    async def scenario() -> None:
        job = Job("a", "", limit_seconds=0.02)
        for _ in range(10):
            async with Turns().of(job):
                await asyncio.sleep(0.015)

    with pytest.raises(RefusedError, match=r"computed for 0 s, at most 0.02 s are allowed; ask for fewer"):
        asyncio.run(scenario())


def test_a_job_that_was_stopped_before_it_began_needs_no_turn():
    async def scenario() -> list[str]:
        turns = Turns()
        served = []
        async with turns.of(Job("a", "", float("inf"))):
            async with turns.of(Job("b", "", float("inf"), stopped=True)):
                served.append("b")
        return served

    assert asyncio.run(asyncio.wait_for(scenario(), 5)) == ["b"]


def test_the_expected_time_is_that_of_jobs_that_share_one_model():
    # Both running ones go on at half the speed: the first ends after 8 s, and the other needs 4 s more.
    # Then the first that waits shares with it for 4 s, and the last one begins.
    assert seconds_until_done([4, 8], [2, 1], slots=2) == [12, 14]
    assert seconds_until_done([], [3, 1], slots=1) == [3, 4]
    assert seconds_until_done([5], [], slots=4) == []


def test_the_pace_is_that_of_the_endpoint_else_of_all():
    pace = Pace()
    assert pace.seconds("draw") is None
    pace.add("draw", 10.0, candidates=5)
    pace.add("caption", 1.0, candidates=1)
    assert (pace.seconds("draw"), pace.seconds("caption"), pace.seconds("vary")) == (
        2,
        1,
        pytest.approx(11 / 6),
    )


@pytest.mark.parametrize(
    ("address", "user", "expected"),
    [
        ("203.0.113.7", None, "203.0.113.7"),
        ("203.0.113.7", "ann", "user ann"),
        ("127.0.0.1", None, "127.0.0.1 tab"),
        ("::1", None, "::1 tab"),
        ("2001:db8:1:2:3:4:5:6", None, "2001:db8:1:2::/64"),
    ],
)
def test_a_client_is_a_user_or_an_address_and_a_tab_on_this_machine(address, user, expected):
    assert client_of(SimpleNamespace(client=SimpleNamespace(host=address)), user, "tab") == expected


def test_calls_without_a_session_on_this_machine_are_clients_of_their_own():
    request = SimpleNamespace(client=SimpleNamespace(host="127.0.0.1"))
    assert client_of(request, None, None) != client_of(request, None, None)


@dataclass(frozen=True)
class Counter:
    """A page with one endpoint, which counts in steps of 50 ms once its gate is open."""

    page: GuardedBlocks
    http: httpx.Client
    gate: threading.Event


@pytest.fixture
def counter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """The page, with a limit of so many seconds a job as the test gives, else of 60."""
    monkeypatch.setattr(jobs, "UNHEARD_SECONDS", 0.5)
    monkeypatch.setattr(jobs, "NEVER_HEARD_SECONDS", 0.5)
    gate = threading.Event()

    def count(num_images: float) -> Iterator[int]:
        for number in range(int(num_images)):
            assert gate.wait(60)
            time.sleep(0.05)
            yield number

    with GuardedBlocks(Limits(job_seconds=getattr(request, "param", 60.0))) as page:
        gr.Button().click(
            count, gr.Slider(1, 30, 1, step=1), gr.Number(), api_name="count", concurrency_id=MODEL
        )
    page.queue().launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    with httpx.Client(base_url=page.local_url, timeout=60) as http:
        yield Counter(page, http, gate)
    gate.set()
    page.close(verbose=False)


def ask(http: httpx.Client, steps: int, address: str = "203.0.113.7") -> str:
    response = http.post(
        "gradio_api/call/count", json={"data": [steps]}, headers={"X-Forwarded-For": address}
    )
    return response.json()["event_id"]


def answer(http: httpx.Client, event: str) -> tuple[str, object]:
    last = http.get(f"gradio_api/call/count/{event}").text.rstrip().split("\n\n")[-1]
    name, data = last.split("\n", 1)
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@pytest.mark.slow
def test_a_job_beyond_the_client_s_share_ends_at_once_and_another_client_s_does_not(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jobs, "NEVER_HEARD_SECONDS", 60)
    http = counter.http
    first, second, third = ask(http, 5), ask(http, 5), ask(http, 5)
    other = ask(http, 5, "203.0.113.8")
    assert "you have 2 jobs here already" in answer(http, third)[1]["error"]
    counter.gate.set()
    assert [answer(http, event) for event in (first, second, other)] == [("complete", [4])] * 3


@pytest.mark.slow
def test_a_job_of_too_many_candidates_ends_at_once(counter: Counter):
    counter.page.limits = Limits(max_candidates_per_client=20)
    event, result = answer(counter.http, ask(counter.http, 21))
    assert event == "error" and "samples 21 candidates (images times best_of), at most 20" in result["error"]


@pytest.mark.slow
@pytest.mark.parametrize("counter", [0.2], indirect=True)
def test_a_job_that_takes_too_long_ends_with_its_reason(counter: Counter):
    counter.gate.set()
    event, result = answer(counter.http, ask(counter.http, 30))
    assert event == "error" and "at most 0.2 s are allowed; ask for fewer images" in result["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "reason"), [(99, "num_images is 99"), (30, "at most 0.2 s are allowed")])
def test_on_the_page_the_reason_is_the_line_of_the_status_and_no_error(steps: int, reason: str):
    def count(num_images: float) -> Iterator[tuple[int, str]]:
        for number in range(int(num_images)):
            time.sleep(0.05)
            yield number, "counting"

    with GuardedBlocks(Limits(job_seconds=0.2)) as page:
        outputs = [gr.Number(), components.status()]
        gr.Button().click(count, gr.Slider(1, 30, 1, step=1), outputs, api_name="count", concurrency_id=MODEL)
    page.queue().launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    with httpx.Client(base_url=page.local_url, timeout=60) as http:
        event, (_, status) = answer(http, ask(http, steps))
    page.close(verbose=False)
    assert event == "complete" and status.startswith('<p class="error">') and reason in status


@pytest.mark.slow
def test_jobs_end_when_nobody_listens_any_more_or_ever_did(counter: Counter):
    heard = ask(counter.http, 30)
    with counter.http.stream("GET", f"gradio_api/call/count/{heard}"):
        ask(counter.http, 30, "203.0.113.8")
    queue = counter.page._queue
    deadline = time.monotonic() + 30
    while any(job.event.alive for job in queue._jobs.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(job.event.alive for job in queue._jobs.values())

    counter.gate.set()  # each ends after its step
    while queue._jobs and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not queue._jobs and not queue.event_ids_to_events and counter.page.turns.holder is None


@pytest.mark.slow
def test_an_error_of_ours_is_a_number_for_the_user_and_a_traceback_for_the_log(caplog):
    def broken(number: float) -> float:
        raise ZeroDivisionError("a secret")

    with GuardedBlocks(Limits()) as page:
        gr.Button().click(broken, gr.Number(1), gr.Number(), api_name="count", concurrency_id=MODEL)
    page.queue().launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    with httpx.Client(base_url=page.local_url, timeout=60) as http:
        _, result = answer(http, ask(http, 1))
    page.close(verbose=False)
    assert result["error"].startswith("internal error ") and "secret" not in result["error"]
    assert "ZeroDivisionError" in caplog.text and result["error"].split()[2].rstrip(";") in caplog.text
