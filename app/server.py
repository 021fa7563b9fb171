"""The web server of the demo: addresses besides the page, limits of requests, signals, and a clean end."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fastapi
import prometheus_client
from fastapi.security import HTTPBasic
from gradio.route_utils import FnIndexInferError
from PIL import Image
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tavq.photo_index import PhotoIndex
from tavq.pipeline import Pipeline

from . import logs
from .guard import GuardedBlocks
from .jobs import FairQueue
from .limits import MIB, SHOWN_CHARACTERS, Limits
from .page import build
from .theme import LOOK

JSON_BYTES = 8 * MIB  # of a request that is no upload
UPLOAD_OVERHEAD_BYTES = 64 * 1024  # the form around a file
DRAINED_BODIES = 10  # times the limit that are read and thrown away
STEP_SECONDS = 2.0  # that the running step may take after a signal
CLOSE_SECONDS = 1  # that open connections have after a signal
KEEP_ALIVE_SECONDS = 75
"""For how long an idle connection stays open: longer than clients keep theirs (httpx 5 s, nginx 60 s). Where
the server closes first, a request that is on its way is lost."""

CALLED = re.compile(r"/(?:run|api|call|call/v2)/([^/]+)/?$")
PAGE_CALLS = "predict"  # the name under which the page calls its unqueued functions, by number
MCP_PATH = "gradio_api/mcp/"
RESULT_OF = re.compile(r"/call/(?:v2/)?[^/]+/(\w+)$")
REQUEST_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError, FnIndexInferError)
"""What Gradio raises on requests that are malformed in a way it did not foresee."""

log = logging.getLogger(__name__)

Accounts = Sequence[tuple[str, str]]
"""Names and passwords."""


class Gate:
    """ASGI middleware: limits the size of requests, knows who listens, and answers errors with one line."""

    def __init__(self, app: ASGIApp, page: GuardedBlocks):
        self.app = app
        self.page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = False  # whether the answer has begun, after which no other can be given

        async def send_noting_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if reason := self._unknown_endpoint(scope):
                raise RejectedError(404, reason)
            with self._listening(scope):
                await self.app(scope, await self._bounded(scope, receive), send_noting_start)
        except Exception as error:
            if started:
                log.warning("connection lost", extra={"fields": {"error": _brief(error)}})
                return
            response = self._answer(error, scope)
            await response(scope, receive, send)

    def _unknown_endpoint(self, scope: Scope) -> str:
        """Return why the endpoint that the path names cannot be called; empty where it can."""
        named = CALLED.search(scope["path"])
        if scope["method"] != "POST" or not named or named[1] == PAGE_CALLS:
            return ""
        public = [fn.api_name for fn in self.page.fns.values() if fn.api_visibility != "private"]
        if named[1] in public:
            return ""
        return (
            f"there is no endpoint {named[1][:SHOWN_CHARACTERS]!r}; there are {', '.join(map(str, public))}"
        )

    @contextlib.contextmanager
    def _listening(self, scope: Scope) -> Iterator[None]:
        """Tell the queue for how long somebody listens to the results of a session."""
        queue = self.page._queue
        session = ""
        if scope["method"] == "GET" and scope["path"].endswith("/queue/data"):
            session = Request(scope).query_params.get("session_hash", "")
        elif scope["method"] == "GET" and (called := RESULT_OF.search(scope["path"])):
            event = queue.event_ids_to_events.get(called[1])
            session = event.session_hash if event else called[1]
        if not session or not isinstance(queue, FairQueue):
            yield
            return
        with queue.heard(session):
            yield

    async def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Wrap `receive` so that it refuses a body that is too large, before it is kept."""
        limits = self.page.limits
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        allowed = limits.upload_bytes + UPLOAD_OVERHEAD_BYTES if is_upload else JSON_BYTES
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > allowed:
                raise RejectedError(413, _too_much(size, limits, is_upload=is_upload))
            return message

        promised = dict(scope["headers"]).get(b"content-length", b"")
        if not promised.isdigit() or int(promised) <= allowed:
            return bounded

        # A client that still sends would not hear an answer, so a part of it is read and thrown away.
        message = await receive()
        while message.get("more_body") and size < DRAINED_BODIES * allowed:
            message = await receive()
            size += len(message.get("body", b""))
        raise RejectedError(413, _too_much(int(promised), limits, is_upload=is_upload))

    def _answer(self, error: Exception, scope: Scope) -> Response:
        if isinstance(error, RejectedError):
            status, reason = error.status, str(error)
        elif isinstance(error, REQUEST_ERRORS):
            status, reason = 400, f"the request could not be read: {_brief(error)}"
            log.warning("refused", extra={"fields": {"path": scope["path"], "reason": reason}})
        else:
            number = secrets.token_hex(4)
            log.error("internal error %s", number, exc_info=error)
            status, reason = 500, f"internal error {number}; the server's log tells more"
        if scope["path"].rstrip("/").endswith("/upload"):  # the page shows the text of this answer
            return PlainTextResponse(reason, status)
        return JSONResponse({"detail": reason}, status)


class RejectedError(Exception):
    """A request that is answered with a status and a reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def _too_much(size: int, limits: Limits, *, is_upload: bool) -> str:
    if is_upload:
        return (
            f"the upload has {size / MIB:.1f} MiB, at most {limits.upload_mib:g} MiB are allowed; send a "
            "smaller file"
        )
    return f"the request has {size / MIB:.1f} MiB, at most {JSON_BYTES // MIB} MiB are allowed; upload files"


def _brief(error: Exception) -> str:
    """One line for an error of a library, of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def running(
    pipeline: Pipeline,
    folder: Path,
    limits: Limits,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    root_path: str = "",
    accounts: Accounts = (),
    index: PhotoIndex | None = None,
) -> Iterator[GuardedBlocks]:
    """Serve the page while the block runs.

    Args:
        pipeline: does the work.
        folder: Gradio's temporary folder, which holds uploads and results.
        limits: what clients, jobs and uploads may take.
        host: address to listen on.
        port: port to listen on; None takes a free one.
        share: also open a public link.
        root_path: path under which a proxy shows the page.
        accounts: who may log in; nobody needs to where it is empty.
        index: photos to search; None leaves the tab out.
    """
    page = build(pipeline, folder, limits, index)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Gradio is not quiet about its MCP server
            page.queue().launch(
                server_name=host,
                server_port=port,
                share=share,
                root_path=root_path or None,
                auth=list(accounts) or None,
                max_file_size=limits.upload_bytes,
                mcp_server=not accounts,  # Gradio's MCP server knows no login
                app_kwargs={"routes": _routes(page, accounts), "middleware": [Middleware(Gate, page=page)]},
                **LOOK,
                footer_links=["api"],
                run_history=False,
                enable_monitoring=False,
                show_error=True,
                ssr_mode=False,
                prevent_thread_lock=True,
                quiet=True,
            )
    except OSError as error:
        raise ValueError(f"port {port} is not free on {host}; choose another with --port") from error
    page.server.config.timeout_keep_alive = KEEP_ALIVE_SECONDS  # which Gradio cannot be told
    try:
        yield page
    finally:
        _close(page)


def serve(pipeline: Pipeline, folder: Path, limits: Limits, *, log_json: bool, **options: Any) -> None:
    """Serve the page until SystemExit or KeyboardInterrupt is raised in this thread; prints the address.

    Args:
        pipeline: does the work.
        folder: Gradio's temporary folder.
        limits: what clients, jobs and uploads may take.
        log_json: write the log as JSON.
        options: of `running`.
    """
    logs.configure(as_json=log_json)
    Image.MAX_IMAGE_PIXELS = None  # `check_image_file` refuses earlier, and by a smaller number
    with running(pipeline, folder, limits, **options) as page:
        logs.adopt_libraries()
        print(f"TA-VQ demo on {page.local_url}", flush=True)
        if page.mcp_server_obj:
            print(f"for assistants (MCP): {page.local_url}{MCP_PATH}", flush=True)
        if page.share_url:
            print(f"public link: {page.share_url}", flush=True)
        log.info("started", extra={"fields": {"address": page.local_url}})
        try:
            threading.Event().wait()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C shall not leave files behind


def _close(page: GuardedBlocks) -> None:
    """End all jobs and the server, within a few seconds."""
    deadline = time.monotonic() + STEP_SECONDS
    if isinstance(page._queue, FairQueue):
        page._queue.end_all()
    if page.is_running:
        page.server.config.timeout_graceful_shutdown = CLOSE_SECONDS
        page.close(verbose=False)
    while page.turns.holder is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    log.info("stopped")


def leave(code: int) -> None:
    """End the process, also where a step still computes: Python would wait for its thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _routes(page: GuardedBlocks, accounts: Accounts) -> list[Route]:
    """Addresses besides Gradio's: whether the server lives, and its figures."""

    async def health(request: Request) -> Response:
        queue = page._queue
        state = {"status": "stopping" if queue.stopped else "ok", "waiting": len(queue)}
        return JSONResponse(state, 503 if queue.stopped else 200)

    async def figures(request: Request) -> Response:
        if accounts:
            await _check_login(request, accounts)
        return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return [Route("/healthz", health), Route("/metrics", figures)]


async def _check_login(request: Request, accounts: Accounts) -> None:
    given = await HTTPBasic(realm="metrics")(request)
    login = f"{given.username}:{given.password}".encode() if given else b""
    known = [f"{name}:{password}".encode() for name, password in accounts]
    if not any(secrets.compare_digest(login, one) for one in known):
        raise fastapi.HTTPException(401, "wrong name or password", {"WWW-Authenticate": "Basic"})
