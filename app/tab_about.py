"""The tab that says how it works, with the numbers of the loaded weights."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import gradio as gr
from torch import nn

from tavq.pipeline import Pipeline

FIGURE = Path(__file__).resolve().parent / "architecture.svg"
FIGURE_TEXT = (
    "Architecture: an encoder turns an image into three levels of latents, quantised by one codebook; "
    "words, phrases and sentences are aligned with levels 1, 2 and 3; the ids of level 3 are decoded, "
    "written by the generator and read by the captioner."
)
# Result file, metric, what it says, and the factor of the usual unit.
METRICS = (
    ("caption.json", "CIDEr", "Captions: CIDEr x 100, higher is better", 100),
    ("t2i.json", "prompt_R@10", "Text to image: prompt among the 10 best, %, higher is better", 100),
    ("tokenizer.json", "PSNR", "Reconstruction: PSNR, dB, higher is better", 1),
    (
        "tokenizer.json",
        "t2i_R@10",
        "Retrieval by ids: image among the 10 best, %, higher is better",
        100,
    ),
    ("tokenizer.json", "usage", "Codes in use, %", 100),
    ("tokenizer.json", "perplexity", "Perplexity of the codes", 1),
)


def how_it_works(pipeline: Pipeline) -> None:
    gr.Markdown(
        "**An encoder gives three levels of latents, and one codebook quantises all three.** In "
        "training, the words of a caption are aligned with level 1, its "
        "phrases with level 2 and its sentences with level "
        "3, by optimal transport. Only level 3 is decoded: its ids are the tokens of the image, which the "
        "generator writes and the captioner reads. Text is not needed to encode or decode."
    )
    figure = base64.b64encode(FIGURE.read_bytes()).decode()
    gr.HTML(f'<img class="figure" src="data:image/svg+xml;base64,{figure}" alt="{FIGURE_TEXT}">')
    gr.Markdown(
        "#### The loaded weights\n" + _table(("part", "what it does", "parameters"), _parts(pipeline))
    )
    rows = measured(pipeline.directory / "results")
    if rows:
        heading = ("metric", "score", "95 % interval", "images")
        gr.Markdown("#### Measured on the test split\n" + _table(heading, rows))
    else:
        gr.Markdown("No results lie beside these weights. `tavq eval` measures them.")


def _parts(pipeline: Pipeline) -> list[tuple[Any, ...]]:
    tokenizer = pipeline.tokenizer
    h, w = tokenizer.grid_size
    does = (
        f"reads {tokenizer.image_size_px} px as {h} x {w} tokens of {tokenizer.num_codes:,} codes, "
        f"decodes to {tokenizer.decode_size_px} px"
    )
    return [
        ("tokenizer", does, _millions(tokenizer)),
        ("generator", "text to ids", _millions(pipeline.generator)),
        ("captioner", "ids to text", _millions(pipeline.captioner)),
    ]


def _millions(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M"


def measured(folder: Path) -> list[tuple[Any, ...]]:
    """Read rows of metric, score, interval and number of images from the result files that are there."""
    rows = []
    for file, name, label, factor in METRICS:
        path = folder / file
        if not path.is_file():
            continue
        metric = json.loads(path.read_text())["metrics"].get(name)
        if metric is None:
            continue
        ends = [metric.get("low"), metric.get("high")]
        interval = "" if None in ends else " to ".join(f"{factor * end:.1f}" for end in ends)
        rows.append((label, f"{factor * metric['value']:.1f}", interval, f"{metric['n']:,}"))
    return rows


def _table(heading: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
