"""The two short tables of a README, made from files: the main results among their reference points, and the
weights that ship.

A reference point is what another method, a person or chance gets in the same metric. They come from the
`floors` in the protocol of a result file, and from the result files of `eval/caption_baselines.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tavq.base.weights import weights_file
from tavq.eval.cells import format_metric, markdown_row
from tavq.eval.results import Results

BASELINES = "baselines"
"""Task of result files that hold reference points alone."""
HEADLINES = (
    ("CIDEr", "Captions: CIDEr", True),
    ("FID", "Text to image: FID", False),
    ("FD-", "Text to image: {name}", False),
    ("cycle_CIDEr", "Text to image: CIDEr of captions of the generated images", True),
    ("prompt_R@10", "Text to image: prompt among the 10 of {n:,} that fit the image best, %", True),
    ("t2i_R@10", "Retrieval by ids: image among the 10 of {n:,} that fit the caption best, %", True),
)
"""Beginning of the metric's name, what the table calls it, and whether larger is better."""
PARTS = {"tokenizer": "image <-> ids", "generator": "text -> ids", "captioner": "ids -> text"}
MILLION = 1e6


@dataclass(frozen=True)
class Rung:
    """One line of a ladder: who scores what."""

    who: str
    value: float
    interval: tuple[float, float] | None = None
    measured: bool = False
    """Whether it is a result, and not a reference point."""


def make_summary(results: Sequence[Results]) -> str:
    """Return one Markdown table: each main metric with its reference points, from the best to the worst.

    Raises:
        ValueError: the results are of different images, or none of the main metrics is among them.
    """
    protocol = results[0].protocol
    measured_on = {(one.protocol.get("split"), one.protocol.get("ids_sha256")) for one in results}
    if len(measured_on) > 1:
        raise ValueError(f"the {len(results)} result files are of different images; name those of one split")

    lines = []
    for start, title, larger_is_better in HEADLINES:
        for name in _metrics_named(results, start):
            rungs = sorted(ladder(results, name), key=lambda rung: rung.value, reverse=larger_is_better)
            arrow = "higher is better" if larger_is_better else "lower is better"
            sizes = [result.metrics[name]["n"] for result in results if name in result.metrics]
            lines.append(markdown_row([f"**{title.format(name=name, n=sizes[0])}** ({arrow})", ""]))
            lines += [_line(name, rung) for rung in rungs]
    if not lines:
        raise ValueError(
            "no main metric among the results; name those of run_caption, run_t2i, run_tokenizer"
        )
    head = markdown_row([f"{protocol['data']}, {protocol['split']} split, n = {protocol['n']:,}", "score"])
    return "\n".join([head, "| --- | ---: |", *lines])


def ladder(results: Sequence[Results], name: str) -> list[Rung]:
    """Return the results and the reference points of one metric, in any order."""
    rungs: dict[str, Rung] = {}
    for result in results:
        if result.protocol.get("task") == BASELINES:
            points = {key: entry["value"] for key, entry in result.metrics.items()}
        else:
            points = dict(result.protocol.get("floors") or {})
        for key, value in points.items():
            if who := _who(key, name):
                rungs[who] = Rung(who, value)
        if entry := result.metrics.get(name):
            interval = (entry["low"], entry["high"]) if "low" in entry else None
            rungs[f"results of {result.path}"] = Rung(result.label, entry["value"], interval, measured=True)
            if k := re.fullmatch(r"t2i_R@(\d+)", name):
                rungs["chance"] = Rung("chance", int(k[1]) / entry["n"])
    return list(rungs.values())


def _who(key: str, name: str) -> str:
    """Return what the reference point `key` of the metric `name` is; "" if it is of another metric."""
    found = re.fullmatch(rf"{re.escape(name)}(?: of |, )(?:the )?(.+)", key)
    return found[1] if found else ""


def _metrics_named(results: Sequence[Results], start: str) -> list[str]:
    """Return the metrics whose name is `start`, or begins with it where it ends in a hyphen."""
    names = dict.fromkeys(name for result in results for name in result.metrics)
    return [name for name in names if name == start or (start.endswith("-") and name.startswith(start))]


def _line(name: str, rung: Rung) -> str:
    entry = {"value": rung.value}
    if rung.interval is not None:
        entry |= {"low": rung.interval[0], "high": rung.interval[1]}
    value = format_metric(name, entry)
    if rung.measured:
        return markdown_row([f"**weights `{rung.who}`**", f"**{value}**"])
    return markdown_row([rung.who, value])


def make_models(directories: Sequence[Path]) -> str:
    """Return one Markdown table of the checkpoints: what each part does, and how large it is."""
    lines = ["| weights | task | parameters | on disk | |", "| --- | --- | ---: | ---: | --- |"]
    for directory in directories:
        for part, task in PARTS.items():
            weights = weights_file(directory / part)
            count = f"{parameters(weights) / MILLION:.1f} M"
            size = f"{weights.stat().st_size / MILLION:.1f} MB"
            note = sizes_of(directory / part) if part == "tokenizer" else ""
            lines.append(markdown_row([f"`{directory.name}/{part}`", task, count, size, note]))
    return "\n".join(lines)


def sizes_of(directory: Path) -> str:
    """Return in words what a tokenizer reads and writes."""
    from tavq.tokenizer.foreign import open_tokenizer

    tokenizer = open_tokenizer(directory)
    h, w = tokenizer.grid_size
    return (
        f"reads {tokenizer.image_size_px} px as {h} x {w} tokens of {tokenizer.num_codes:,} codes, "
        f"decodes to {tokenizer.decode_size_px} px"
    )


def parameters(weights: Path) -> int:
    """Return the number of values in a file of weights."""
    from safetensors import safe_open

    with safe_open(weights, framework="np") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]
    total = 0
    for shape in shapes:
        count = 1
        for size in shape:
            count *= size
        total += count
    return total
