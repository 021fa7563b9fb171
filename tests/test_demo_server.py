"""The demo's server: login, health, figures, assistants, signals, and mistakes on its command line."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tavq.app.demo import DemoRun, accounts_of, main
from tavq.app.limits import Limits
from tavq.base.arguments import parse
from tavq.pipeline import Pipeline

from .demo_server import PHOTO, demo_server, free_port

MCP = "gradio_api/mcp/"


def test_the_defaults_of_the_flags_are_the_limits():
    run = parse(DemoRun, [], prog="tavq demo")
    limits = Limits()
    assert (
        (run.max_queue, run.max_jobs_per_client) == (limits.max_queue, limits.max_jobs_per_client) == (256, 2)
    )
    assert (run.job_seconds, run.upload_mib) == (limits.job_seconds, limits.upload_mib) == (300, 20)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--port", "99999"], "port is 99999, expected 1 to 65535"),
        (["--host", "999.1.1.1"], "999.1.1.1 is no address of this machine"),
        (["--host", "203.0.113.7"], "203.0.113.7 is no address of this machine"),
        (["--auth", "ann"], "auth names no file and is not USER:PASSWORD: 'ann'"),
        (["--auth", "ann:"], "auth shall be USER:PASSWORD, with both of them"),
        (["--max-queue", "0"], "max_queue is 0, expected 1 to 100000"),
        (["--job-seconds", "nan"], "job_seconds is nan, expected 1 to"),
        (["--upload-mib", "-1"], "upload_mib is -1.0, expected 0.1 to 10000"),
        (["--root-path", "tavq"], "root_path is 'tavq', expected a path such as /tavq"),
        (["--checkpoint", "/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(flags: list[str], expected: str, capsys):
    with pytest.raises(SystemExit) as left:
        main([*flags, *(() if "--port" in flags else ("--port", str(free_port())))])
    message = capsys.readouterr().err
    assert left.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert expected in message


def test_a_port_that_is_taken_is_told_before_the_models_are_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as left:
            main(["--port", str(port), "--checkpoint", "/nowhere"])
    assert left.value.code == 2
    assert f"port {port} is not free on 127.0.0.1; choose another with --port" in capsys.readouterr().err


def test_accounts_come_from_a_file_or_the_command_line(tmp_path: Path):
    file = tmp_path / "accounts"
    file.write_text("ann:one:two\n\nbob:three\n")
    assert accounts_of(str(file)) == [("ann", "one:two"), ("bob", "three")]
    assert accounts_of("ann:one") == [("ann", "one")] and accounts_of("") == []
    file.write_text("ann\n")
    with pytest.raises(ValueError, match=f"each line of {file} shall be USER:PASSWORD"):
        accounts_of(str(file))


@pytest.fixture(scope="module")
def private(tiny_pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server that asks for a login."""
    from tavq.app.server import running

    folder = tmp_path_factory.mktemp("private")
    with running(tiny_pipeline, folder, Limits(), accounts=[("ann", "secret")]) as page:
        with httpx.Client(base_url=page.local_url, timeout=60) as http:
            yield http


@pytest.mark.slow
def test_a_private_server_tells_strangers_only_that_it_lives(private: httpx.Client):
    assert private.get("healthz").json() == {"status": "ok", "waiting": 0}
    job = {"data": ["a dog", 7]}
    assert private.post("gradio_api/call/draw", json=job).status_code == 401
    assert private.post("gradio_api/upload", files={"files": b"a"}).status_code == 401
    assert private.get("metrics").status_code == 401
    assert private.get("metrics", auth=("ann", "wrong")).status_code == 401
    assert private.post(MCP, json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"}).status_code >= 400
    assert private.post("login", data={"username": "ann", "password": "wrong"}).status_code == 400


@pytest.mark.slow
def test_a_user_logs_in_draws_and_is_counted(private: httpx.Client):
    def drawn() -> float:
        figures = private.get("metrics", auth=("ann", "secret")).text
        lines = [line for line in figures.splitlines() if line.startswith("tavq_jobs_total")]
        counts = {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines}
        return counts.get('tavq_jobs_total{endpoint="draw",outcome="done"}', 0)

    before = drawn()
    assert private.post("login", data={"username": "ann", "password": "secret"}).json() == {"success": True}
    event = private.post("gradio_api/call/draw", json={"data": ["a dog", 7]}).json()["event_id"]
    assert "event: complete" in private.get(f"gradio_api/call/draw/{event}").text
    deadline = time.monotonic() + 10  # the job is counted a moment after its result is sent
    while drawn() == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert drawn() == before + 1
    figures = private.get("metrics", auth=("ann", "secret")).text
    for name in (
        "tavq_queue_length 0.0",
        "tavq_job_seconds_sum",
        "tavq_images_total",
        "tavq_wait_seconds_sum",
    ):
        assert name in figures


@pytest.mark.slow
def test_an_assistant_draws_and_describes(tiny_checkpoint: Path, tmp_path: Path):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    photo = "data:image/jpeg;base64," + base64.b64encode(PHOTO.read_bytes()).decode()

    async def scenario(address: str) -> None:
        async with (
            streamablehttp_client(address + MCP) as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {tool.name.rpartition("_")[2]: tool for tool in (await session.list_tools()).tools}
            assert set(tools) >= {"draw", "generate", "caption", "complete", "vary"}
            assert "the same seed draws the same image again" in json.dumps(tools["draw"].inputSchema)

            drawn = await session.call_tool(tools["draw"].name, {"prompt": "a dog", "seed": 7})
            image = next(part for part in drawn.content if part.type == "image")
            assert Image.open(io.BytesIO(base64.b64decode(image.data))).size[0] >= 16
            described = await session.call_tool(tools["caption"].name, {"image": photo})
            assert "probability" in described.content[0].text
            refused = await session.call_tool(tools["draw"].name, {"prompt": "", "seed": 7})
            assert refused.isError and "the prompt is empty" in refused.content[0].text

    with demo_server(tiny_checkpoint, tmp_path) as server:
        asyncio.run(scenario(server.address))
    assert "Traceback" not in server.log()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_jobs_and_server_within_five_seconds_and_a_restart_serves_on_the_same_port(
    tiny_checkpoint: Path, tmp_path: Path, number: signal.Signals, code: int
):
    port = free_port()
    with demo_server(tiny_checkpoint, tmp_path, "--log-json", port=port) as server:
        values = ["a dog", "", 16, 7, 2, 1, 0, 1, 4]  # 64 candidates, which take longer than the test
        with httpx.Client(base_url=server.address, timeout=60) as http:
            event = http.post("gradio_api/call/generate", json={"data": values}).json()["event_id"]
            with http.stream("GET", f"gradio_api/call/generate/{event}") as stream:
                next(stream.iter_lines())
                start = time.monotonic()
                server.process.send_signal(number)
                server.process.wait(timeout=60)
                assert time.monotonic() - start < 5
    assert server.process.returncode == code and not list(server.folder.glob("tavq-demo-*"))
    events = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    assert events[0]["event"] == "started" and "Traceback" not in server.log()

    # The connection that the server closed still lingers in the kernel, and must not block the port.
    (tmp_path / "again").mkdir()
    with demo_server(tiny_checkpoint, tmp_path / "again", port=port) as again:
        assert httpx.get(f"{again.address}healthz", timeout=60).json() == {"status": "ok", "waiting": 0}
