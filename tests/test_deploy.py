"""The Dockerfile and the Hugging Face Space: what they name exists, and what they would run runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tavq.app.demo import DemoRun
from tavq.base.arguments import parse

from .demo_server import ROOT, free_port

PACKAGES = ("tavq", "base", "data", "app", "checkpoints")


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Return (instruction, arguments) of each step."""
    text = re.sub(r"\\\n\s*", " ", dockerfile.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def last(steps: list[tuple[str, str]], name: str) -> str:
    return [arguments for instruction, arguments in steps if instruction == name][-1]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spaces") / "space"
    script = [sys.executable, str(ROOT / "spaces" / "make_space.py"), "--out", str(folder)]
    subprocess.run(script, check=True, capture_output=True)
    return folder


def test_the_image_runs_the_demo_as_a_user_without_rights_and_with_a_health_check():
    steps = instructions(ROOT / "Dockerfile")
    assert steps[0][0] == "FROM" and last(steps, "USER") == "tavq"
    order = [instruction for instruction, _ in steps]
    assert order.index("USER") > max(n for n, name in enumerate(order) if name in ("RUN", "COPY"))

    program, command, *flags = json.loads(last(steps, "CMD"))
    run = parse(DemoRun, flags, prog="tavq demo")
    assert (program, command, run.host, run.log_json) == ("tavq", "demo", "0.0.0.0", True)
    assert last(steps, "EXPOSE") == str(run.port)
    assert f"127.0.0.1:{run.port}/healthz" in last(steps, "HEALTHCHECK")


def test_what_the_image_copies_is_there_and_is_not_ignored():
    sources = [shlex.split(copied)[0] for name, copied in instructions(ROOT / "Dockerfile") if name == "COPY"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert sources == ["constraints.txt", "."]
    for needed in (*PACKAGES, "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        assert (ROOT / needed).exists() and needed not in ignored
    pins = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==[\d.]+$", pins, flags=re.MULTILINE)  # what the first RUN reads


def test_the_space_has_the_front_matter_that_hugging_face_needs(space: Path):
    _, front, _ = (space / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["sdk"] == "docker" and len(card["short_description"]) <= 60
    assert (space / "checkpoints" / "flickr8k" / "results" / "caption.json").is_file()  # the page shows them
    assert {file.name for file in space.rglob("*.npz")} == {"tokens.npz"}
    steps = instructions(space / "Dockerfile")
    assert card["app_port"] == int(last(steps, "EXPOSE"))
    assert "FORWARDED_ALLOW_IPS=*" in [arguments for name, arguments in steps if name == "ENV"]


@pytest.mark.slow
def test_the_space_installs_and_serves_its_weights(space: Path, tmp_path: Path):
    installed = tmp_path / "installed"
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(installed)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(space)], check=True)

    port = free_port()
    command = [sys.executable, "-m", "tavq", "demo", "--host", "127.0.0.1", "--port", str(port), "--log-json"]
    environment = os.environ | {"PYTHONPATH": str(installed), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as server:
        try:
            assert server.stdout and server.stdout.readline() == f"TA-VQ demo on http://127.0.0.1:{port}/\n"
            check = last(instructions(space / "Dockerfile"), "HEALTHCHECK").split("CMD ")[1]
            words = [sys.executable, *json.loads(check)[1:]]
            subprocess.run([word.replace("7860", str(port)) for word in words], check=True)
        finally:
            server.terminate()
            _, log = server.communicate(timeout=60)
    assert server.returncode == 0  # SIGTERM is how Docker stops it
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert events[0] == "started" and events[-1] == "stopped"
