"""python app/demo.py, or tavq demo: all tasks in a browser, on 127.0.0.1:7860.

Text to image, image to text, word-to-patch maps, reconstruction and completion. `app/api.py` has the
endpoints for programs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tavq.app.limits import Limits
from tavq.base.address import check_address
from tavq.base.arguments import parse, run_main
from tavq.base.bounds import check_bounds
from tavq.base.device import Device, choose_device

if TYPE_CHECKING:
    from tavq.photo_index import PhotoIndex
    from tavq.pipeline import Pipeline


REMOVE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class DemoRun:
    """Try all tasks in a browser.

    Example: tavq demo --port 8000
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """Port to listen on."""
    share: bool = False
    """Also open a public link, through Gradio's servers."""
    checkpoint: str | None = None
    """Directory or hf:OWNER/NAME that holds tokenizer/, generator/ and captioner/; the included weights by
    default."""
    device: Device = "auto"
    """Where the models run."""
    index: Path | None = None
    """Directory that tavq index made. A tab searches these photos, for everybody who sees the page."""
    auth: str = ""
    """Ask for a login: USER:PASSWORD, or a file with one such line per user. A file keeps passwords out of
    the list of processes."""
    max_queue: int = Limits.max_queue
    """Jobs that may wait; further ones are refused."""
    max_jobs_per_client: int = Limits.max_jobs_per_client
    """Jobs of one client that may wait or run. A client is a user who logged in, else an address; on the
    loopback address it is a browser tab or program."""
    job_seconds: float = Limits.job_seconds
    """Seconds of computing after which a job is ended."""
    upload_mib: float = Limits.upload_mib
    """Size of an uploaded file, in MiB."""
    root_path: str = ""
    """Path under which a proxy shows the page, such as /tavq."""
    log_json: bool = False
    """Write the log as one JSON object per line."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            port=(1, 65535),
            max_queue=(1, 100_000),
            max_jobs_per_client=(1, 1_000),
            job_seconds=(1, 1e6),
            upload_mib=(0.1, 10_000),
        )
        if self.root_path and not self.root_path.startswith("/"):
            raise ValueError(f"root_path is {self.root_path!r}, expected a path such as /tavq")


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(DemoRun, argv, prog="tavq demo")
    missing = [name for name in ("gradio", "mcp", "prometheus_client") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"the demo needs {', '.join(missing)}, not installed; pip install 'ta-vq[app]'")
    accounts = accounts_of(run.auth)
    check_address(run.host, run.port)

    # From here on SIGTERM unwinds as Ctrl-C does, so that the temporary folder is removed.
    signal.signal(signal.SIGTERM, _exit_normally)
    from tavq.pipeline import Pipeline  # loads torch, which --help does without

    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))

    # All parts are loaded now, so that a bad checkpoint fails before the page is up.
    _ = pipeline.generator, pipeline.captioner, pipeline.text_encoder
    index = None if run.index is None else finished_index(run.index, pipeline)

    from_signal = None
    try:
        with _temporary_folder() as folder:
            # Gradio reads these when it is imported.
            os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
            os.environ["GRADIO_TEMP_DIR"] = str(folder)
            _serve(pipeline, folder, run, accounts, index)
    except KeyboardInterrupt:
        from_signal = 130
    except SystemExit as stopped:
        from_signal = int(stopped.code or 0)
    if from_signal is not None:
        from tavq.app.server import leave

        leave(from_signal)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Make a folder for uploads and results, and remove it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="tavq-demo-"))
    try:
        yield folder
    finally:
        # A step that still computes may write its image while the folder is removed.
        deadline = time.monotonic() + REMOVE_SECONDS
        while folder.exists() and time.monotonic() < deadline:
            shutil.rmtree(folder, ignore_errors=True)


def finished_index(directory: Path, pipeline: Pipeline) -> PhotoIndex:
    """Open an index of photos. Raises FileNotFoundError or ValueError where it cannot be searched."""
    from tavq.base.files import file_hash
    from tavq.base.weights import WEIGHTS_FILE
    from tavq.photo_index import PhotoIndex

    weights = file_hash(pipeline.directory / "tokenizer" / WEIGHTS_FILE)
    index = PhotoIndex(directory, pipeline.tokenizer, weights)
    index.search(pipeline.alignment_encoder.encode, "a photo", top=1)
    return index


def _serve(
    pipeline: Pipeline,
    folder: Path,
    run: DemoRun,
    accounts: list[tuple[str, str]],
    index: PhotoIndex | None,
) -> None:
    from tavq.app.server import serve

    limits = Limits(
        max_queue=run.max_queue,
        max_jobs_per_client=run.max_jobs_per_client,
        job_seconds=run.job_seconds,
        upload_mib=run.upload_mib,
    )
    serve(
        pipeline,
        folder,
        limits,
        host=run.host,
        port=run.port,
        share=run.share,
        root_path=run.root_path,
        accounts=accounts,
        index=index,
        log_json=run.log_json,
    )


def accounts_of(auth: str) -> list[tuple[str, str]]:
    """Read names and passwords from USER:PASSWORD, or from a file with such lines; empty for no login."""
    if not auth:
        return []
    path = Path(auth)
    from_file = path.is_file()
    if not from_file and ":" not in auth:
        raise ValueError(f"auth names no file and is not USER:PASSWORD: {auth!r}")
    lines = path.read_text().splitlines() if from_file else [auth]
    pairs = [line.strip().partition(":") for line in lines if line.strip()]
    if not pairs or not all(name and password for name, _, password in pairs):
        where = f"each line of {auth}" if from_file else "auth"
        raise ValueError(f"{where} shall be USER:PASSWORD, with both of them")
    return [(name, password) for name, _, password in pairs]


def _exit_normally(number: int, frame: object) -> NoReturn:
    sys.exit(0)


if __name__ == "__main__":
    main()
