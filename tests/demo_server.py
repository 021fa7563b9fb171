"""`python app/demo.py` as the tests of the demo start it: on a free port, in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "app" / "examples" / "cat.jpg"


@dataclass(frozen=True)
class DemoServer:
    """A server that runs."""

    process: subprocess.Popen[str]
    address: str
    folder: Path
    """The parent of its temporary folder."""
    log_file: Path

    def log(self) -> str:
        return self.log_file.read_text()


@contextlib.contextmanager
def demo_server(checkpoint: Path, folder: Path, *flags: str, port: int | None = None) -> Iterator[DemoServer]:
    """Start the demo; end it by Ctrl-C, after which its own folder is gone."""
    port = port or free_port()
    command = [sys.executable, str(ROOT / "app" / "demo.py"), "--checkpoint", str(checkpoint), *flags]
    log_file = folder / "log"
    temporary = folder / "tmp"
    temporary.mkdir()
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder,
            env=os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
            # a job in the background of a shell ignores Ctrl-C, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    server = DemoServer(process, f"http://127.0.0.1:{port}/", temporary, log_file)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"TA-VQ demo on {server.address}\n", server.log()
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert not list(temporary.glob("tavq-demo-*"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
