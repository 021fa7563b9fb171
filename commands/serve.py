"""tavq serve: answer many clients, in batches, on this machine or on a Ray cluster."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tavq.base.address import check_address
from tavq.base.arguments import parse, run_main
from tavq.base.bounds import check_bounds
from tavq.base.weights import CONFIG_FILE, local_directory
from tavq.serve.config import ServerConfig, check_ray

OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory of a Ray that is started here: requests and answers on their way."""

QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""What Ray Serve logs."""


@dataclasses.dataclass(frozen=True)
class ServeRun(ServerConfig):
    """Answer requests for images, captions and tokens over HTTP, those of many clients in batches.

    Example: tavq serve --port 8000 --replicas 2
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to listen on."""
    root_path: str = ""
    """Path under which a proxy shows the server, such as /tavq."""
    request_seconds: float = 120.0
    """Seconds after which a request is given up, with status 408."""
    address: str = ""
    """Ray cluster to run on: auto, HOST:PORT or ray://HOST:PORT. By default Ray is started here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, port=(1, 65535), request_seconds=(1, 1e6))
        if self.root_path and not self.root_path.startswith("/"):
            raise ValueError(f"root_path is {self.root_path!r}, expected a path such as /tavq")


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(ServeRun, argv, prog="tavq serve")
    check_ray()
    if not run.address:
        check_address(run.host, run.port)
        run = dataclasses.replace(run, checkpoint=str(checked_checkpoint(run.checkpoint)))

    import ray
    from ray import serve

    from tavq.serve.application import build
    from tavq.serve.cluster import connect

    fields = {field.name for field in dataclasses.fields(ServerConfig)}
    options = {name: value for name, value in dataclasses.asdict(run).items() if name in fields}
    cores = max(run.replicas, run.max_replicas) * run.cpus_per_replica
    connect(run.address, cores=cores, object_store_bytes=OBJECT_STORE_BYTES)
    # After `connect`, as Ray sets a handler of its own. It unwinds as Ctrl-C does, so that Ray is ended.
    signal.signal(signal.SIGTERM, _exit_normally)
    try:
        serve.start(
            http_options={
                "host": run.host,
                "port": run.port,
                "root_path": run.root_path,
                "request_timeout_s": run.request_seconds,
            },
            logging_config=QUIET,
        )
        try:
            serve.run(build(options), name="tavq", route_prefix="/")
        except RuntimeError as error:  # Ray has printed the replica's traceback
            raise ValueError(f"the server did not start: {str(error).splitlines()[-1]}") from error
        print(f"TA-VQ server on http://{run.host}:{run.port}, described at /docs", flush=True)
        threading.Event().wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C shall not leave processes behind
        serve.shutdown()
        ray.shutdown()


def checked_checkpoint(source: str) -> Path:
    """Return the directory of a checkpoint; raise FileNotFoundError where a part is absent."""
    directory = local_directory(source).resolve()
    for part in ("tokenizer", "generator", "captioner"):
        if not (directory / part / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{source} holds no {part}/, which the server needs; name another")
    return directory


def _exit_normally(number: int, frame: object) -> NoReturn:
    sys.exit(0)
