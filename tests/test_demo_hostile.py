"""What strangers send to a public demo: each hostile upload or payload gets its reason; nothing breaks."""

from __future__ import annotations

import http.client as http_client
import io
import itertools
import json
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from .demo_server import PHOTO, ROOT, DemoServer, demo_server

API = "gradio_api"
MAX_MEMORY_GIB = 2.0
GENERATE: dict[str, Any] = {
    "prompt": "a dog", "negative_prompt": "", "num_images": 1, "seed": 7, "guidance_scale": 2,
    "temperature": 1, "top_k": 0, "top_p": 1, "best_of": 1,
}  # fmt: skip
NUMBERS = ("num_images", "seed", "guidance_scale", "temperature", "top_k", "top_p", "best_of")
WRONG_NUMBERS = {
    "nan": float("nan"), "infinity": float("inf"), "-infinity": float("-inf"), "text": "two", "empty": None,
    "list": [1, 2], "object": {"a": 1}, "true": True, "too large": 1e300, "too small": -2, "long": 10**400,
}  # fmt: skip

pytestmark = pytest.mark.slow  # a server


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    """A server whose log is free of tracebacks, and whose memory stayed bounded, after all of these tests."""
    with demo_server(tiny_checkpoint, tmp_path_factory.mktemp("hostile")) as server:
        yield server
        assert server.process.poll() is None
        memory_gib = peak_memory_gib(server.process.pid)
    log = server.log()
    assert "Traceback" not in log and "internal error" not in log, log[-3000:]
    assert memory_gib < MAX_MEMORY_GIB


@pytest.fixture(scope="module")
def http(server: DemoServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=120) as http:
        yield http


def peak_memory_gib(process: int) -> float:
    """The largest resident memory that a process ever had."""
    status = Path(f"/proc/{process}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def ask(http: httpx.Client, endpoint: str, data: Any) -> tuple[bool, Any]:
    """Call an endpoint as curl would. Return whether it succeeded, and its results or the reason."""
    body = json.dumps({"data": data})  # unlike httpx, this writes NaN
    return outcome(http, http.post(f"{API}/call/{endpoint}", content=body, headers=JSON), endpoint)


JSON = {"Content-Type": "application/json"}


def outcome(http: httpx.Client, accepted: httpx.Response, endpoint: str) -> tuple[bool, Any]:
    if accepted.status_code != 200:
        return False, reason_of(accepted)
    stream = http.get(f"{API}/call/{endpoint}/{accepted.json()['event_id']}").text
    event, data = stream.rstrip().split("\n\n")[-1].split("\n", 1)
    result = json.loads(data.removeprefix("data: "))
    return event == "event: complete", result if event == "event: complete" else result["error"]


def reason_of(response: httpx.Response) -> str:
    """Return the reason of a refusal; no answer may be an error of the server's own."""
    assert 400 <= response.status_code < 500, (response.status_code, response.text[:300])
    is_json = response.headers.get("content-type", "").startswith("application/json")
    detail = response.json()["detail"] if is_json else response.text
    return detail if isinstance(detail, str) else "; ".join(item["msg"] for item in detail)


def upload(http: httpx.Client, content: bytes, name: str = "photo.png") -> dict[str, Any]:
    response = http.post(f"{API}/upload", files={"files": (name, content)})
    assert response.status_code == 200, response.text
    return {"path": response.json()[0], "meta": {"_type": "gradio.FileData"}}


def is_reason(reason: Any, expected: str) -> bool:
    return isinstance(reason, str) and expected in reason and "\n" not in reason and len(reason) < 400


# Uploads


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG header that promises a grey image, followed by other chunks."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *more, (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


PLAIN = Image.new("RGB", (64, 64), "red")
NOISE = Image.effect_noise((64, 64), 90).convert("RGB")
NO_IMAGE = "image is no image that can be read; send JPEG, PNG, WebP, GIF, BMP or TIFF"
TRUNCATED = {kind: encoded(NOISE, kind)[:-600] for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")}
UPLOADS: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "empty": (b"", "image is an empty file"),
    "text": (b"not an image, whatever its name says", NO_IMAGE),
    "169 megapixels that are black": (
        lambda: encoded(Image.new("1", (13_000, 13_000)), "PNG"),
        "13,000 x 13,000 px, that is 169 megapixels, and at most 50 are allowed",
    ),
    "51 megapixels": (png(7_200, 7_100), "at most 50 are allowed"),
    "header of exabytes": (png(2**31 - 1, 2**31 - 1), "at most 50 are allowed"),
    "no width": (png(0, 64), NO_IMAGE),
    "one pixel": (encoded(Image.new("RGB", (1, 1)), "PNG"), "at least 8 px a side"),
    "a line": (encoded(Image.new("RGB", (500, 7)), "PNG"), "at least 8 px a side"),
    "eps, which would start Ghostscript": (encoded(PLAIN, "EPS"), NO_IMAGE),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'/>", NO_IMAGE),
    "html": (b"<html><script>alert(1)</script></html>", NO_IMAGE),
    "pdf": (encoded(PLAIN, "PDF"), NO_IMAGE),
    "ico": (encoded(PLAIN, "ICO"), NO_IMAGE),
    "ppm": (encoded(PLAIN, "PPM"), NO_IMAGE),
    "zip": (b"PK\x03\x04" + bytes(60), NO_IMAGE),
    "program": (b"\x7fELF" + bytes(60), NO_IMAGE),
    "heic": (b"\x00\x00\x00\x18ftypheic" + bytes(60), "HEIC photo, which is not read here; save it as JPEG"),
    "floats": (encoded(Image.new("F", (64, 64)), "TIFF"), "floating-point"),
    "text bomb": (
        lambda: png(64, 64, (b"zTXt", b"a\0\0" + zlib.compress(bytes(300_000_000), 1))),
        "image",
    ),
    "no pixels": (png(64, 64), "replace the file"),
    "garbage pixels": (png(64, 64, (b"IDAT", b"garbage")), "replace the file"),
    **{f"truncated {kind}": (content, "image") for kind, content in TRUNCATED.items()},
}
"""Name -> (content, part of the reason)."""


@pytest.mark.parametrize("name", UPLOADS)
def test_a_hostile_upload_is_refused_with_its_reason(http: httpx.Client, name: str):
    content, expected = UPLOADS[name]
    file = upload(http, content() if callable(content) else content)
    succeeded, reason = ask(http, "reconstruct", [file])
    assert not succeeded and is_reason(reason, expected), reason


def test_an_upload_that_is_too_large_is_refused_with_its_size(http: httpx.Client, server: DemoServer):
    response = http.post(f"{API}/upload", files={"files": ("photo.png", bytes(21 * 2**20))})
    assert response.status_code == 413
    assert response.text == "the upload has 21.0 MiB, at most 20 MiB are allowed; send a smaller file"
    assert not any(path.stat().st_size > 20 * 2**20 for path in server.folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "CMYK"])
def test_the_largest_images_are_read(http: httpx.Client, mode: str):
    kind = {"CMYK": "TIFF"}.get(mode, "PNG")
    options = {"compression": "tiff_deflate"} if kind == "TIFF" else {"compress_level": 1}
    file = upload(http, encoded(Image.new(mode, (7_000, 7_000)), kind, **options))
    succeeded, result = ask(http, "reconstruct", [file])
    assert succeeded, result


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 300 + ".png", "\u202egnp.exe", "%00.png", ".."])
def test_the_name_of_an_upload_leads_nowhere(http: httpx.Client, server: DemoServer, name: str):
    response = http.post(f"{API}/upload", files={"files": (name, encoded(PLAIN, "PNG"))})
    if response.status_code != 200:
        assert reason_of(response)
        return
    path = Path(response.json()[0]).resolve()
    assert path.is_relative_to(server.folder.resolve())


# Values


@pytest.mark.parametrize(("field", "wrong"), itertools.product(NUMBERS, WRONG_NUMBERS))
def test_a_wrong_number_is_named_with_what_was_got_and_what_is_allowed(http, field: str, wrong: str):
    values = GENERATE | {field: WRONG_NUMBERS[wrong]}
    succeeded, reason = ask(http, "generate", list(values.values()))
    assert not succeeded and is_reason(reason, f"{field} is ") and "expected a" in reason, reason


REST = ["", 1, 7, 2, 1, 0, 1]
FILE = {"path": str(PHOTO), "meta": {"_type": "gradio.FileData"}}
NOT_UPLOADED = "image was not uploaded to this server"
VALUES: dict[str, tuple[str, Any, str]] = {
    "long prompt": ("draw", ["a" * 10_001, 7], "prompt has 10,001 characters, at most 10,000 are allowed"),
    "empty prompt": ("draw", ["", 7], "the prompt is empty"),
    "null prompt": ("draw", [None, 7], "the prompt is empty"),
    "blank prompt": ("draw", [" \n\t ", 7], "the prompt is empty"),
    "half a character": ("draw", ["a \ud800 dog", 7], "prompt holds half a character"),
    "number as prompt": ("draw", [7, 7], "prompt is 7, expected a text"),
    "list as prompt": ("draw", [["a", "dog"], 7], "prompt is a list of 2, expected a text"),
    "too few values": ("draw", ["a dog"], "data holds 1 values, expected 2: prompt, seed"),
    "too many values": ("draw", ["a dog", 7, 8], "data holds 3 values, expected 2: prompt, seed"),
    "256 candidates": (
        "generate", list((GENERATE | {"num_images": 16, "best_of": 16}).values()),
        "this job samples 256 candidates (images times best_of), at most 64 are allowed",
    ),
    "a file of the server": ("reconstruct", [FILE | {"path": "/etc/passwd"}], NOT_UPLOADED),
    "a file above the folder": ("reconstruct", [FILE | {"path": "../../etc/passwd"}], NOT_UPLOADED),
    "a device": ("reconstruct", [FILE | {"path": "/dev/zero"}], NOT_UPLOADED),
    "a path with NUL": ("reconstruct", [FILE | {"path": "a\0b"}], NOT_UPLOADED),
    "a long path": ("reconstruct", [FILE | {"path": "a" * 100_000}], NOT_UPLOADED),
    "a file address": ("reconstruct", [FILE | {"path": "file:///etc/passwd"}], NOT_UPLOADED),
    "a number as path": ("reconstruct", [FILE | {"path": 7}], "image is a file with the path 7"),
    "no path": ("reconstruct", [{"meta": {"_type": "gradio.FileData"}}], "image"),
    "text as image": ("reconstruct", ["cat.jpg"], "image is the text 'cat.jpg', expected an uploaded file"),
    "number as image": ("reconstruct", [7], "image is 7, expected an uploaded file"),
    "null image": ("reconstruct", [None], "image is null, expected an uploaded file"),
    "list as image": ("reconstruct", [[FILE]], "image"),
    "data in the text": (
        "reconstruct", [FILE | {"url": "data:image/png;base64,AAAA"}], "image is sent inside the text",
    ),
    "an address of this machine": (
        "reconstruct", [FILE | {"path": "http://127.0.0.1:1/photo.png"}], "image could not be fetched",
    ),
    "an address of the cloud's secrets": (
        "reconstruct", [FILE | {"path": "http://169.254.169.254/latest/"}], "image could not be fetched",
    ),
    "no address": ("reconstruct", [FILE | {"path": "http://"}], "image could not be fetched"),
    "empty text": ("heatmaps", [PHOTO, ""], "text"),
    "more captions than beams": ("caption", [PHOTO, 2, 5, 0], "n_best is 5 and beam 2"),
    "wide beam": ("caption", [PHOTO, 1e6, 1, 0], "beam is 1000000.0, expected a whole number from 1 to 10"),
    "half a beam": ("caption", [PHOTO, 2.5, 1, 0], "beam is 2.5, expected a whole number from 1 to 10"),
    "keep nothing": ("complete", [PHOTO, "a", "", *REST], "keep is ''"),
    "keep three numbers": ("complete", [PHOTO, "a", "box=1,2,3", *REST], "keep is 'box=1,2,3'"),
    "keep outside": ("complete", [PHOTO, "a", "box=9999,9999,5,5", *REST], "outside the image"),
    "keep exabytes": ("complete", [PHOTO, "a", f"box={10**30},0,5,5", *REST], "outside the image"),
    "share of all": ("vary", [PHOTO, "a", 1.0, *REST], "share is 1.0, expected a number from"),
}  # fmt: skip
"""Name -> (endpoint, values, part of the reason). `PHOTO` is uploaded."""


@pytest.mark.parametrize("name", VALUES)
def test_a_hostile_value_is_refused_with_its_reason(http: httpx.Client, name: str):
    endpoint, values, expected = VALUES[name]
    if values[0] is PHOTO:
        values = [upload(http, PHOTO.read_bytes()), *values[1:]]
    succeeded, reason = ask(http, endpoint, values)
    assert not succeeded and is_reason(reason, expected), reason


# Requests


def call(content: bytes | str, endpoint: str = "draw") -> dict[str, Any]:
    return {"method": "POST", "url": f"{API}/call/{endpoint}", "content": content, "headers": JSON}


def joined(**body: Any) -> dict[str, Any]:
    return {"method": "POST", "url": f"{API}/queue/join", "json": {"session_hash": "hostile", **body}}


REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "no JSON": (call("{"), ""),
    "no object": (call("[]"), ""),
    "no data": (call("{}"), ""),
    "data is an object": (call('{"data": {"prompt": "a dog"}}'), ""),
    "a tower of lists": (call('{"data": ' + "[" * 100_000 + "]" * 100_000 + "}"), ""),
    "nine million letters": (call(json.dumps({"data": ["a" * 9 * 2**20, 7]})), "at most 8 MiB"),
    "no text at all": (call(b"\xff\xfe\x00"), ""),
    "unknown endpoint": (call('{"data": []}', "format_disk"), "there is no endpoint 'format_disk'"),
    "the page's own endpoint": (call('{"data": []}', "stop"), "there is no endpoint"),
    "unknown argument": (
        {"method": "POST", "url": f"{API}/call/v2/draw", "json": {"prompt": "a", "colour": 1}}, "colour",
    ),
    "missing argument": ({"method": "POST", "url": f"{API}/call/v2/draw", "json": {"seed": 1}}, "prompt"),
    "past the queue": (
        {"method": "POST", "url": f"{API}/run/draw", "json": {"data": ["a dog", 7]}}, "join the queue",
    ),
    "number of no endpoint": (joined(data=[], fn_index=9999), "there is no endpoint with the number 9999"),
    "negative number": (joined(data=[], fn_index=-1), "there is no endpoint with the number -1"),
    "no number": (joined(data=[], fn_index="draw"), ""),
    "no session": (
        {"method": "POST", "url": f"{API}/queue/join", "json": {"data": [], "fn_index": 0}}, "Session",
    ),
    "upload of nothing": ({"method": "POST", "url": f"{API}/upload"}, ""),
    "upload without files": (
        {"method": "POST", "url": f"{API}/upload", "content": b"garbage",
         "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, "",
    ),
    "upload without boundary": (
        {"method": "POST", "url": f"{API}/upload", "content": b"garbage",
         "headers": {"Content-Type": "multipart/form-data"}}, "",
    ),
    "a file of the server": ({"method": "GET", "url": f"{API}/file=/etc/passwd"}, ""),
    "a file above": ({"method": "GET", "url": f"{API}/file=..%2f..%2fetc%2fpasswd"}, ""),
    "the source": ({"method": "GET", "url": f"{API}/file={ROOT}/app/server.py"}, ""),
    "a proxy": ({"method": "GET", "url": f"{API}/proxy=http://169.254.169.254/"}, ""),
    "cancel nothing": ({"method": "POST", "url": f"{API}/cancel", "json": {}}, ""),
    "a stream of nothing": ({"method": "POST", "url": f"{API}/stream/x", "json": {"data": []}}, ""),
    "a component's server": (
        {"method": "POST", "url": f"{API}/component_server", "json": {"component_id": "x"}}, "",
    ),
}  # fmt: skip
"""Name -> (request, part of the reason)."""


@pytest.mark.parametrize("name", REQUESTS)
def test_a_hostile_request_is_refused_with_its_reason(http: httpx.Client, name: str):
    request, expected = REQUESTS[name]
    response = http.request(**request)
    if response.status_code == 200 and "event_id" in response.text:  # accepted, to be told in the stream
        succeeded, reason = outcome(http, response, "draw")
        assert not succeeded and is_reason(reason, expected), reason
    elif response.status_code in (403, 404) and request["method"] != "POST":
        return  # says all there is to say
    else:
        assert expected in reason_of(response) or response.status_code == 404


def test_there_are_more_than_a_hundred():
    assert len(UPLOADS) + len(NUMBERS) * len(WRONG_NUMBERS) + len(VALUES) + len(REQUESTS) > 100


def test_a_good_job_still_works(http: httpx.Client):
    assert http.get("healthz").json()["status"] == "ok"
    succeeded, (image,) = ask(http, "draw", ["a dog", 7])
    assert succeeded and http.get(image["url"]).content.startswith(b"\x89PNG")


# Crowds


def test_one_greedy_client_does_not_delay_another(http: httpx.Client):
    greedy = GENERATE | {"num_images": 16}
    body = json.dumps({"data": list(greedy.values())})
    headers = JSON | {"X-Forwarded-For": "203.0.113.7"}
    jobs = [http.post(f"{API}/call/generate", content=body, headers=headers) for _ in range(40)]

    start = time.monotonic()
    accepted = http.post(
        f"{API}/call/draw", json={"data": ["a dog", 7]}, headers={"X-Forwarded-For": "203.0.113.8"}
    )
    succeeded, _ = outcome(http, accepted, "draw")
    assert succeeded and time.monotonic() - start < 30

    results = [outcome(http, job, "generate") for job in jobs]
    refused = [reason for succeeded, reason in results if not succeeded]
    assert len(refused) >= 38 - 2  # a job may end while the later ones arrive
    assert all("you have 2 jobs here already, at most 2 are allowed" in reason for reason in refused)


def test_a_connection_outlives_the_pause_after_which_clients_close_theirs(server: DemoServer):
    host, port = server.address.removeprefix("http://").rstrip("/").split(":")
    connection = http_client.HTTPConnection(host, int(port), timeout=60)
    for pause in (6.0, 0.0):
        connection.request("GET", "/healthz")  # on one connection; a closed one raises RemoteDisconnected
        assert connection.getresponse().read()
        connection.auto_open = 0
        time.sleep(pause)
    connection.close()


def test_two_hundred_clients_lose_nothing(server: DemoServer):
    script = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), "--address", server.address]
    run = subprocess.run(
        [*script, "--clients", "200", "--rounds", "1", "--json"], capture_output=True, text=True, check=True
    )
    result = json.loads(run.stdout)
    assert result["asked"] == 200
    assert result["lost"] == 0, result["first_reasons"]
