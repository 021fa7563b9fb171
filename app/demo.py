"""python app/demo.py, or tavq demo: all tasks in a browser, on 127.0.0.1:7860.

Text to image, image to text, word-to-patch maps, reconstruction and completion. Each is also an endpoint for
`gradio_client`: /generate, /caption, /heatmaps, /reconstruct, /complete.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tavq.base.arguments import parse, run_main
from tavq.base.device import Device, choose_device
from tavq.pipeline import CHECKPOINT, Pipeline


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
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/, generator/ and captioner/."""
    device: Device = "auto"


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(DemoRun, argv, prog="tavq demo")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the demo needs gradio, which is not installed; pip install 'ta-vq[app]'")
    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))

    # All parts are loaded now, so that a bad checkpoint fails before the page is up.
    _ = pipeline.generator, pipeline.captioner, pipeline.text_encoder

    # Gradio reads these when it is imported, which `serve` does.
    with tempfile.TemporaryDirectory(prefix="tavq-demo-") as folder:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = folder
        serve(pipeline, Path(folder), run)


def serve(pipeline: Pipeline, folder: Path, run: DemoRun) -> None:
    """Serve the page until the process is stopped; prints the address."""
    from tavq.app.page import build
    from tavq.app.theme import CSS, THEME

    page = build(pipeline, folder)
    try:
        page.queue().launch(
            server_name=run.host,
            server_port=run.port,
            share=run.share,
            theme=THEME,
            css=CSS,
            footer_links=["api"],
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        raise ValueError(f"port {run.port} is not free on {run.host}; choose another with --port") from error
    print(f"TA-VQ demo on {page.local_url}", flush=True)
    if page.share_url:
        print(f"public link: {page.share_url}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
