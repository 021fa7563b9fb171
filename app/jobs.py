"""Jobs of many clients on one model: each client gets its turn, and none holds more than its share."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ipaddress
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import fastapi
from gradio import route_utils
from gradio.block_function import BlockFunction
from gradio.data_classes import PredictBodyInternal
from gradio.queueing import Event, Queue
from gradio.server_messages import EstimationMessage, ProcessCompletedMessage
from gradio.utils import run_coro_in_background

from . import metrics
from .components import only_failed
from .limits import Limits, RefusedError
from .waiting import Pace, seconds_until_done

MODEL = "model"
"""Gradio's concurrency_id of all endpoints that need the model."""
SLOTS = 4
"""Jobs that take turns on the model; the others wait in the queue. One computes at a time."""
UNHEARD_SECONDS = 15.0
"""A job ends when its listener has been gone for so long."""
NEVER_HEARD_SECONDS = 120.0
"""A job ends when nobody came to listen for so long. In a crowd a client cannot ask and listen at once."""


@dataclass
class Job:
    """What is known of one queued or running endpoint call."""

    client: str
    endpoint: str
    limit_seconds: float
    candidates: int = 0
    place: int = 1  # among its client's jobs: 1 is its first
    event: Event | None = None
    computed_seconds: float = 0.0
    asked: float = field(default_factory=time.monotonic)
    reason: str = ""  # why it was refused or ended
    stopped: bool = False  # by its user, before it began
    ended: bool = False  # by an error, which its page shows


class Turns:
    """One step at a time on the model, next for the client that was served least.

    A client that comes later starts level with the least served of those that are here: it neither waits
    for what the others had before, nor may it catch up.
    """

    def __init__(self) -> None:
        self.holder: str | None = None
        self._served: dict[str, float] = {}
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @contextlib.asynccontextmanager
    async def of(self, job: Job) -> AsyncIterator[None]:
        """Wait for the job's turn, and count its seconds. Raises RefusedError where it may not go on.

        A job that was stopped before it began needs no turn.
        """
        if job.computed_seconds > job.limit_seconds:
            job.reason = (
                f"the job has computed for {job.computed_seconds:.0f} s, at most {job.limit_seconds:g} s are "
                "allowed; ask for fewer images"
            )
            raise RefusedError(job.reason)
        if job.stopped:  # only says so
            yield
            return
        await self._acquire(job.client)
        start = time.monotonic()
        try:
            if job.event is not None and not job.event.alive:
                raise RefusedError("the job was ended, because nobody listens any more")
            yield
        finally:
            seconds = time.monotonic() - start
            job.computed_seconds += seconds
            self._served[job.client] = self._served.get(job.client, 0.0) + seconds
            self._release()

    async def _acquire(self, client: str) -> None:
        if self.holder is None:
            self._served = {client: 0.0}  # nobody to be fair to; and the table does not grow
            self.holder = client
            return

        here = {self.holder, *(name for name, _ in self._waiting)}
        level = min(self._served.get(name, 0.0) for name in here)
        self._served[client] = max(self._served.get(client, 0.0), level)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((client, turn))
        try:
            await turn
        except asyncio.CancelledError:
            self._waiting = [waiter for waiter in self._waiting if waiter[1] is not turn]
            if turn.done() and not turn.cancelled():  # it was given the turn, and cannot take it
                self._release()
            raise

    def _release(self) -> None:
        waiting = [waiter for waiter in self._waiting if not waiter[1].done()]
        if not waiting:
            self.holder = None
            return
        chosen = min(waiting, key=lambda waiter: self._served.get(waiter[0], 0.0))
        self._waiting.remove(chosen)
        self.holder = chosen[0]
        chosen[1].set_result(None)


class JobChecks(Protocol):
    """What the queue asks about the jobs that it takes."""

    limits: Limits

    async def checked(self, block_fn: BlockFunction, inputs: list[Any], state: Any) -> list[Any]:
        """Return the inputs, addresses replaced by files. Raises gr.Error for the first wrong one."""
        ...

    def candidates_of(self, block_fn: BlockFunction, inputs: list[Any]) -> int:
        """Return how many candidates a job with these inputs samples: images times candidates of each."""
        ...

    def can_be_stopped(self, block_fn: BlockFunction) -> bool:
        """Return whether the endpoint looks whether its browser tab pressed Stop, before it does anything."""
        ...


class FairQueue(Queue):
    """Gradio's queue, in which no client's second job waits before another's first.

    A job beyond the client's share, or with a wrong value, ends at once with its reason, and does not wait.
    """

    checks: JobChecks

    @classmethod
    def in_place_of(cls, queue: Queue, checks: JobChecks) -> FairQueue:
        """Make an empty queue with the settings of another, for the same page."""
        made = cls(
            queue.live_updates,
            queue.max_thread_count,
            queue.update_intervals,
            queue.max_size,
            queue.blocks,
            queue.default_concurrency_limit,
        )
        made.checks = checks
        return made

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.listening: Counter[str] = Counter()  # streams of results that are open, by session
        self._last_heard: dict[str, float] = {}
        self._jobs: dict[str, Job] = {}  # by event
        self._arriving: list[Job] = []
        self._pace = Pace()
        self._ending: set[asyncio.Task[None]] = set()  # so that no task is lost before it is done
        metrics.QUEUE.set_function(self.__len__)
        metrics.RUNNING.set_function(lambda: sum(job is not None for job in self.active_jobs))

    def start(self) -> None:
        super().start()
        run_coro_in_background(self._watch)

    def create_event_queue_for_fn(self, block_fn: BlockFunction) -> None:
        super().create_event_queue_for_fn(block_fn)
        if block_fn.concurrency_id == MODEL:
            self.event_queue_per_concurrency_id[MODEL].concurrency_limit = SLOTS

    def compute_analytics_summary(self, records: Any) -> Any:
        """Leave out Gradio's own figures, which load pandas for each job and are not shown; see `metrics`."""
        return self.cached_event_analytics_summary

    def job(self, event_id: str | None) -> Job:
        """Return the job of an event; one without limits for a call past the queue."""
        return self._jobs.get(event_id or "") or Job("direct", "", float("inf"))

    async def push(
        self, body: PredictBodyInternal, request: fastapi.Request, username: str | None
    ) -> tuple[bool, Any, Any]:
        """Queue a job, or end it at once with the reason why it is refused."""
        try:
            block_fn = route_utils.get_fn(self.blocks, None, body)
        except (KeyError, route_utils.FnIndexInferError):
            return False, f"there is no endpoint with the number {body.fn_index}", "error"
        if block_fn.concurrency_id != MODEL:
            return await super().push(body, request, username)

        client = client_of(request, username, body.session_hash)
        job = Job(client, block_fn.api_name or "", self.checks.limits.job_seconds)
        try:
            state = self.blocks.state_holder[body.session_hash] if body.session_hash else None
            body.data = await self.checks.checked(block_fn, body.data, state)
            job.candidates = self.checks.candidates_of(block_fn, body.data)
        except Exception as error:  # gr.Error, which has its line
            job.reason = str(getattr(error, "message", error))

        # From here on without another await before the job is counted, so that no two get the last place.
        job.reason = job.reason or self._over_share(job)
        self._arriving.append(job)
        try:
            accepted, event_id, status = await super().push(body, request, username)
        finally:
            self._arriving.remove(job)
        if accepted:
            assert isinstance(event_id, str)  # an answer that was refused holds reasons instead
            self._admit(job, self.event_ids_to_events[event_id])
        return accepted, event_id, status

    def _held(self, client: str) -> list[Job]:
        """Return the jobs of a client that wait or run."""
        jobs = [*self._jobs.values(), *(job for job in self._arriving if not job.reason)]
        return [job for job in jobs if job.client == client and (job.event is None or job.event.alive)]

    def _over_share(self, job: Job) -> str:
        limits = self.checks.limits
        held = self._held(job.client)
        candidates = sum(other.candidates for other in held)
        if len(held) >= limits.max_jobs_per_client:
            return (
                f"you have {len(held)} jobs here already, at most {limits.max_jobs_per_client} are allowed; "
                "wait for one to end, or stop it"
            )
        if candidates + job.candidates > limits.max_candidates_per_client:
            others = f" and {candidates} of your other job" if candidates else ""
            return (
                f"this job samples {job.candidates} candidates (images times best_of){others}, at most "
                f"{limits.max_candidates_per_client} are allowed; ask for fewer"
            )
        job.place = len(held) + 1
        return ""

    def _admit(self, job: Job, event: Event) -> None:
        """Give the job its place in the queue, where `push` has put it last; end it if it is refused."""
        event_queue = self.event_queue_per_concurrency_id[MODEL]
        event_queue.queue.remove(event)
        if job.reason:
            self.event_ids_to_events.pop(event._id)
            self.send_message(event, _refusal(event.fn, job.reason))
            metrics.report(job.endpoint, "refused", job.client, 0.0, 0.0, job.reason)
            return

        job.event = event
        self._jobs[event._id] = job
        places = [self.job(other._id).place for other in event_queue.queue]
        index = next((n for n, place in enumerate(places) if place > job.place), len(places))
        event_queue.queue.insert(index, event)
        self.broadcast_estimations(MODEL, index)

    def broadcast_estimations(self, concurrency_id: str, after: int | None = None) -> None:
        """Tell each job that waits its place, and the seconds until its result as far as they are known."""
        if concurrency_id != MODEL:
            super().broadcast_estimations(concurrency_id, after)
            return
        waiting = self.event_queue_per_concurrency_id[MODEL].queue
        done_in = self._seconds_until_done(waiting)
        for rank, (event, seconds) in enumerate(zip(waiting, done_in, strict=True)):
            if after is None or rank >= after:
                message = EstimationMessage(rank=rank, rank_eta=seconds, queue_size=len(waiting))
                self.send_message(event, message)

    def _seconds_until_done(self, waiting: list[Event]) -> list[float | None]:
        names = [event._id for event in waiting]
        in_slots = [job for name, job in self._jobs.items() if name not in names]
        seconds: list[float] = []
        for job in (*in_slots, *map(self.job, names)):
            pace = self._pace.seconds(job.endpoint)
            if pace is None:
                return [None] * len(waiting)
            seconds.append(max(0.0, pace * job.candidates - job.computed_seconds))
        return [*seconds_until_done(seconds[: len(in_slots)], seconds[len(in_slots) :], SLOTS)]

    def stop_waiting(self, session_hash: str | None) -> None:
        """End the jobs of a browser tab that wait and can be stopped. Call it in the server's event loop.

        Each leaves the queue at once, and runs without a turn: it finds that it was stopped, and says so.
        """
        event_queue = self.event_queue_per_concurrency_id.get(MODEL)
        if event_queue is None:  # no job ever came
            return
        for event in list(event_queue.queue):
            if event.session_hash != session_hash or not self.checks.can_be_stopped(event.fn):
                continue
            event_queue.queue.remove(event)
            self.job(event._id).stopped = True
            event_queue.current_concurrency += 1  # `process_events` takes it back
            # In a context of its own: in that of the handler of Stop, Gradio makes no components.
            ended = self.process_events([event], False, time.time(), event.fn)
            task = asyncio.create_task(ended, context=contextvars.Context())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        self.broadcast_estimations(MODEL)

    async def process_events(
        self, events: list[Event], batch: bool, begin_time: float, fn: BlockFunction
    ) -> None:
        started = time.monotonic()
        try:
            await super().process_events(events, batch, begin_time, fn)
        finally:
            for event in events:
                self._report(event, started)

    def _report(self, event: Event, started: float | None) -> None:
        job = self._jobs.pop(event._id, None)
        if job is None:
            return
        status = (self.event_analytics.get(event._id) or {}).get("status")
        outcome = {"success": "done", "failed": "failed"}.get(str(status), "cancelled")
        if not event.alive or job.stopped:
            outcome = "cancelled"
        if outcome == "done":
            self._pace.add(job.endpoint, job.computed_seconds, job.candidates)
        waited = (started or time.monotonic()) - job.asked
        metrics.report(job.endpoint, outcome, job.client, waited, job.computed_seconds, job.reason)

    @contextlib.contextmanager
    def heard(self, session_hash: str) -> Iterator[None]:
        """Count a listener of a session for as long as its stream is open."""
        self.listening[session_hash] += 1
        try:
            yield
        finally:
            self.listening[session_hash] -= 1
            self._last_heard[session_hash] = time.monotonic()
            if not self.listening[session_hash]:
                del self.listening[session_hash]

    async def _watch(self) -> None:
        """End jobs that nobody listens to, and forget those that left the queue."""
        while not self.stopped:
            await asyncio.sleep(1)
            now = time.monotonic()
            for event_id, job in list(self._jobs.items()):
                if event_id not in self.event_ids_to_events and job.event is not None:
                    self._report(job.event, None)
                elif job.event is not None and not self.listening[job.event.session_hash]:
                    last_heard = self._last_heard.get(job.event.session_hash)
                    patience = NEVER_HEARD_SECONDS if last_heard is None else UNHEARD_SECONDS
                    if job.event.alive and now - max(job.asked, last_heard or 0.0) > patience:
                        job.reason = "nobody listened any more"
                        await self.clean_events(event_id=event_id)
            sessions = {job.event.session_hash for job in self._jobs.values() if job.event}
            self._last_heard = {name: at for name, at in self._last_heard.items() if name in sessions}

    def end_all(self) -> None:
        """End all jobs, each after its current step, and wake the streams of results."""
        self.close()
        for event in list(self.event_ids_to_events.values()):
            event.alive = False
        for event_queue in self.event_queue_per_concurrency_id.values():
            event_queue.queue.clear()


def _refusal(block_fn: BlockFunction, reason: str) -> ProcessCompletedMessage:
    """Say why a job is refused: in the status line of its tab, or as an error of the API."""
    data = only_failed(block_fn.outputs, reason)
    if data is not None:
        return ProcessCompletedMessage(output={"data": data, "is_generating": False}, success=True)
    output = {"error": reason, "visible": True, "duration": 10, "title": "Error"}
    return ProcessCompletedMessage(output=output, title="Error", success=False)


def client_of(request: fastapi.Request, username: str | None, session_hash: str | None) -> str:
    """Name who asks: the user, else the address; on this machine, where all have one address, the session.

    Behind a proxy on this machine the address is the one that the proxy forwards, see uvicorn's
    FORWARDED_ALLOW_IPS.
    """
    if username:
        return f"user {username}"
    host = request.client.host if request.client else ""
    tab = f"{host} {session_hash or uuid.uuid4().hex}"  # a call by curl names no session
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return tab
    if address.is_loopback:
        return tab
    if address.version == 6:  # one household has 2**64 of them
        return str(ipaddress.ip_network((address, 64), strict=False))
    return host
