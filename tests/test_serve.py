"""`tavq serve`: batches change no image, mistakes get one line, the server ends with its processes."""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import importlib
import importlib.util
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import yaml
from PIL import Image

from tavq.generator.config import SamplingConfig
from tavq.generator.model import GeneratorModel
from tavq.pipeline import Pipeline, read_recipe

pytest.importorskip("ray", reason="needs ray, of the extra `scale`")

from ray.serve.schema import ServeDeploySchema

from tavq.serve import batching
from tavq.serve.config import ServerConfig
from tavq.serve.orders import Order

ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "app" / "examples" / "cat.jpg"
START_SECONDS = 300
END_SECONDS = 60
WARM = SamplingConfig(temperature=1.5, draft_tokens=1)
COLD = SamplingConfig(temperature=0.5, draft_tokens=1)
UNGUIDED = SamplingConfig(guidance_scale=1.0, draft_tokens=1)
ORDERS = [
    Order("a dog", 1, WARM),
    Order("a cat on the grass", 2, COLD),
    Order("a man jumps", 3, WARM, "red"),
    Order("a dog", 4, WARM),
    Order("water", 5, UNGUIDED),
    Order("a woman", 6, WARM),
    Order("a red dog", 7, UNGUIDED),
]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny weights, with a generator whose logits depend on prompt and tokens: untrained they are 0."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    shutil.copytree(tiny_checkpoint, folder)
    generator = GeneratorModel.from_pretrained(folder / "generator")
    torch.manual_seed(2)
    for weight in generator.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.3)
    shutil.rmtree(folder / "generator")
    generator.save_pretrained(folder / "generator")
    return folder


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Pipeline:
    return Pipeline.from_pretrained(checkpoint)


def test_only_orders_of_equal_settings_share_a_batch():
    assert batching.groups(ORDERS) == [[0, 2, 3, 5], [1], [4, 6]]
    ranked = [*ORDERS[:1], dataclasses.replace(ORDERS[0], best_of=2)]
    assert batching.groups(ranked) == [[0], [1]]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_image_is_the_same_alone_and_in_company(pipeline, precision):
    orders = [
        dataclasses.replace(order, settings=dataclasses.replace(order.settings, precision=precision))
        for order in ORDERS
    ]
    sizes = batching.batch_sizes(pipeline.generator, precision, 8)
    alone = [batching.draw(pipeline, [order], sizes)[0] for order in orders]
    together = batching.draw(pipeline, orders, sizes)
    assert [drawn.png for drawn in together] == [drawn.png for drawn in alone]
    assert [drawn.batch for drawn in together] == [4, 1, 4, 4, 2, 4, 2]
    assert len({drawn.png for drawn in alone}) == len(alone)


@pytest.mark.slow
def test_candidates_are_ranked_and_may_exceed_the_largest_batch(pipeline):
    orders = [dataclasses.replace(order, best_of=3, rank_by="likelihood") for order in ORDERS[::3]]
    sizes = {True: [4], False: [4]}
    together = batching.draw(pipeline, orders, sizes)
    assert [drawn.png for drawn in together] == [
        batching.draw(pipeline, [order], sizes)[0].png for order in orders
    ]
    assert together[0].recipe["best_of"] == 3 and together[0].recipe["settings"]["micro_batch"] == 4


@pytest.mark.slow
def test_previews_end_with_the_image_that_is_not_streamed(pipeline):
    sizes = {True: [1, 2, 4], False: [2, 4]}
    steps = list(batching.draw_in_steps(pipeline, ORDERS, sizes))
    rows = [[drawn.rows for step in steps if (drawn := step[place])] for place in range(len(ORDERS))]
    num_rows = pipeline.tokenizer.grid_size[0]
    assert rows == [list(range(1, num_rows + 1))] * len(ORDERS)
    last = [[step[place] for step in steps if step[place]][-1] for place in range(len(ORDERS))]
    assert [drawn.png for drawn in last] == [drawn.png for drawn in batching.draw(pipeline, ORDERS, sizes)]


def test_sizes_whose_kernels_round_otherwise_are_not_used(pipeline, monkeypatch):
    model = pipeline.generator
    found = batching.batch_sizes(model, "int8", 6)
    assert found[True][-1] == found[False][-1] == 6 and set(found[True]) <= {1, 2, 4, 6}
    exact = batching._logits

    def rounds(model, texts, ids, precision, *, guided):
        logits = exact(model, texts, ids, precision, guided=guided)
        return logits + 1e-6 * (len(ids) == 2) if guided else logits

    monkeypatch.setattr(batching, "_logits", rounds)
    assert 2 not in batching.batch_sizes(model, "int8", 6)[True]


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `tavq serve` with the tiny weights; afterwards none of its processes is left."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [sys.executable, "-m", "tavq", "serve", "--checkpoint", str(checkpoint)]
    options = ["--port", str(port), "--max-batch", "8", "--batch-wait-ms", "100", "--request-mib", "1"]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen([*command, *options], cwd=ROOT, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + START_SECONDS
        while f"TA-VQ server on {address}" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield address
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) > 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(END_SECONDS) == 0, log.read_text()[-3000:]
        _, alive = psutil.wait_procs(children, timeout=END_SECONDS)
        assert not alive
    finally:
        process.kill()


def post(server: str, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{server}{path}", content=content, headers=headers, timeout=START_SECONDS)


def photo() -> str:
    return base64.b64encode(PHOTO.read_bytes()).decode()


@pytest.mark.slow
def test_requests_of_many_clients_share_batches_and_get_the_images_of_tavq_generate(
    server, pipeline, tmp_path
):
    requests = [{"prompt": f"a dog {n}", "seed": n} for n in range(6)]
    requests += [
        {"prompt": "a cat", "seed": 9, "num_images": 2, "temperature": 0.7, "negative_prompt": "red"}
    ]
    alone = [post(server, "/generate", request).json()["images"] for request in requests]
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as clients:
        together = [r.json()["images"] for r in clients.map(lambda r: post(server, "/generate", r), requests)]

    assert [[i["png"] for i in images] for images in together] == [[i["png"] for i in im] for im in alone]
    assert max(image["batch"] for images in together for image in images) > 2
    for request, images in zip(requests, alone, strict=True):
        settings = SamplingConfig(**images[0]["recipe"]["settings"])
        local = pipeline.generate(
            request["prompt"],
            request["seed"],
            settings,
            num_images=len(images),
            negative_prompt=request.get("negative_prompt"),
        )
        for image, expected in zip(images, local, strict=True):
            expected.save(tmp_path / "local.png")
            assert base64.b64decode(image["png"]) == (tmp_path / "local.png").read_bytes()
            assert image["ids"] == expected.ids.tolist() and image["seed"] == expected.seed


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_command_of_the_page_writes_an_image(server, tmp_path):
    page = (ROOT / "docs" / "serving.md").read_text()
    (command,) = re.findall(r"^curl -s http://127.0.0.1:8000/generate .*\n.*$", page, flags=re.MULTILINE)
    command = command.replace("http://127.0.0.1:8000", server).replace("python -c", f"{sys.executable} -c")
    subprocess.run(["bash", "-o", "pipefail", "-ec", command], cwd=tmp_path, check=True)
    assert read_recipe(tmp_path / "dog.png")["seed"] == 7


@pytest.mark.slow
def test_a_streamed_answer_shows_the_image_grow(server):
    request = {"prompt": "a dog", "seed": 3, "num_images": 2}
    whole = post(server, "/generate", request).json()["images"]
    streamed = post(server, "/generate", request | {"stream": True, "every_rows": 2})
    assert streamed.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in streamed.text.splitlines()]
    for number in range(2):
        own = [line for line in lines if line["image"] == number]
        previews = [line["rows"] for line in own[:-1]]
        assert previews == list(range(2, 2 * len(previews) + 1, 2)) and previews
        assert own[-1]["png"] == whole[number]["png"] and own[-1]["recipe"] == whole[number]["recipe"]
        assert own[0]["png"] != own[-1]["png"]


@pytest.mark.slow
def test_captions_and_tokens_are_those_of_the_pipeline(server, pipeline: Pipeline):
    options = {"beam": 3, "n_best": 2}
    answer = post(server, "/caption", {"image": photo(), **options}).json()
    assert answer["captions"] == pipeline.caption(PHOTO, **options)[0].to_json()

    encoded = post(server, "/encode", {"image": f"data:image/jpeg;base64,{photo()}"}).json()
    ids = pipeline.encode(PHOTO)
    assert encoded == {"ids": ids[0].tolist(), "num_codes": pipeline.tokenizer.num_codes}

    decoded = post(server, "/decode", {"ids": encoded["ids"]}).json()
    image = Image.open(io.BytesIO(base64.b64decode(decoded["png"])))
    assert image.tobytes() == pipeline.decode(ids)[0].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body", "status", "detail"),
    [
        ("/generate", {"prompt": " "}, 422, "the prompt is empty; describe the image in a few words"),
        ("/generate", {}, 422, "prompt: Field required"),
        ("/generate", {"prompt": "a", "seed": "7"}, 422, "seed: Input should be a valid integer"),
        ("/generate", {"prompt": "a", "top_p": 0}, 422, "top_p: Input should be greater than 0"),
        ("/generate", b'{"prompt": "a", "top_p": NaN}', 422, "top_p: Input should be a finite number"),
        ("/generate", b'{"prompt": "\\ud800"}', 422, "prompt: Input should be a valid string, unable to"),
        ("/generate", {"prompt": "a" * 10_001}, 422, "prompt: String should have at most 10000 characters"),
        ("/generate", {"prompt": "a", "colour": 1}, 422, "colour: Extra inputs are not permitted"),
        ("/generate", {"prompt": "a", "num_images": 9, "best_of": 2}, 422, "num_images times best_of is 18"),
        ("/generate", {"prompt": "a", "stream": True, "best_of": 2}, 422, "stream shows one candidate only"),
        ("/generate", b"{", 422, "the request is no JSON"),
        ("/generate", b"", 422, "the request is no JSON"),
        ("/generate", b"[1]", 422, "the request is no JSON"),
        ("/caption", {"image": "/etc/passwd"}, 422, "image: is no base64"),
        ("/caption", {"image": base64.b64encode(b"text").decode()}, 400, "not an image of a known format"),
        ("/caption", {"image": "", "beam": 99}, 422, "beam: Input should be less than or equal to 16"),
        ("/caption", {"image": "", "n_best": 9}, 422, "n_best is 9 and beam 5; widen the beam"),
        ("/encode", {"image": 3}, 422, "image: expected the bytes of an image file as base64"),
        ("/encode", {"image": "A" * 1_100_000}, 413, "the request has more than 1 MiB"),
        ("/decode", {"ids": [[1]]}, 400, "ids have another shape than"),
        ("/decode", {"ids": [[10**6] * 100]}, 400, "ids have another shape than"),
        ("/paint", {}, 404, "Not Found"),
    ],
    ids=range(22),
)
def test_what_is_wrong_is_said_in_one_line(server, path, body, status, detail):
    answer = post(server, path, body)
    said = answer.json()["detail"]
    assert answer.status_code == status and said.startswith(detail) and "\n" not in said


@pytest.mark.slow
def test_codes_beyond_the_codebook_are_refused(server, pipeline):
    rows, columns = pipeline.tokenizer.grid_size
    for code in (-1, pipeline.tokenizer.num_codes):
        answer = post(server, "/decode", {"ids": torch.full((rows, columns), code).tolist()})
        assert answer.status_code == 400 and answer.json()["detail"].startswith("ids reach beyond 0 to")


@pytest.mark.slow
def test_the_server_describes_itself_and_says_that_it_lives(server):
    assert httpx.get(f"{server}/healthz", timeout=60).json() == {"status": "ok"}
    described = httpx.get(f"{server}/openapi.json", timeout=60).json()
    assert set(described["paths"]) == {"/generate", "/caption", "/encode", "/decode", "/healthz"}
    fields = described["components"]["schemas"]["GenerateRequest"]["properties"]
    assert fields["top_k"]["maximum"] == 2**20 and fields["prompt"]["description"]
    assert "swagger" in httpx.get(f"{server}/docs", timeout=60).text


def test_the_file_for_kubernetes_names_the_application_and_its_options():
    page = (ROOT / "docs" / "serving.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    service = yaml.safe_load(block)
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, function = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert ServerConfig(**application.args).max_replicas == 8
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] and container["resources"]["limits"]["memory"]


def test_the_command_says_what_is_absent(monkeypatch, capsys):
    from tavq.cli import main

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        main(["serve"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: this needs ray, not installed; pip install 'ta-vq[scale]'\n"
