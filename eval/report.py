"""tavq report results/ --out report.html [--runs RUN_DIR ...]

One self-contained page: tables with intervals, sample grids (the PNG files of the folder), curves of training
runs. A report that shows a dataset's photos is not to be committed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from tavq.base.arguments import parse, run_main
from tavq.base.files import atomic_write
from tavq.eval.cells import format_metric
from tavq.eval.results import Results, read_results
from tavq.eval.table import checkpoint_of, describe, group_by_protocol, metric_names, title

TEMPLATE = Path(__file__).with_name("report_page.html")
HEALTH = ("usage", "perplexity")


@dataclass(frozen=True)
class Report:
    """Write one page of all results in a folder.

    Example: tavq report results/ --out report.html --runs runs/mine/tokenizer/training
    """

    results: Positional[Path]
    """Folder with result files (*.json) and sample grids (*.png)."""
    out: Path
    """HTML file to write."""
    runs: tuple[Path, ...] = ()
    """Folders of training runs, each with a log.jsonl, whose curves are shown."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    """Run `tavq report`."""
    config = parse(Report, argv, prog="tavq report")
    if not config.results.is_dir():
        raise FileNotFoundError(f"no folder {config.results}; name the one that holds the result files")
    results = [read_results(path) for path in sorted(config.results.glob("*.json"))]
    if not results:
        raise ValueError(f"{config.results} holds no result file; make one with tavq eval or tavq score")
    page = render(results, sorted(config.results.glob("*.png")), config.runs)
    with atomic_write(config.out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{config.out}: {len(results)} results, {len(config.runs)} runs, {len(page) // 1024} KiB")


def render(results: Sequence[Results], images: Sequence[Path], runs: Sequence[Path]) -> str:
    """Return the page as HTML."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        groups=[_group(group) for group in group_by_protocol(results)],
        images=[
            {"name": path.stem.replace("_", " "), "data": _png_data(path.read_bytes())} for path in images
        ],
        runs=[{"name": str(run), "curves": draw_curves(run)} for run in runs],
        protocols=[{"label": result.label, "fields": result.protocol} for result in results],
    )


def draw_curves(run: Path) -> str:
    """Draw every scalar of a run's log, codebook health first; returns a PNG as a data address."""
    from matplotlib.figure import Figure

    from tavq.training.run_folder import read_log

    lines = read_log(run / "log.jsonl")
    if not lines:
        raise FileNotFoundError(f"no log.jsonl with a line in {run}; name the folder of a training run")
    logged = dict.fromkeys(
        n for line in lines for n, v in line.items() if n != "step" and isinstance(v, int | float)
    )
    names = sorted(logged, key=lambda name: not any(word in name for word in HEALTH))
    rows = (len(names) + 2) // 3
    figure = Figure(figsize=(11, 2.4 * rows), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, 3, index + 1)
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return _png_data(stream.getvalue())


def _group(group: Sequence[Results]) -> dict[str, Any]:
    names = metric_names(group)
    rows = [
        {
            "label": result.label,
            "cells": [format_metric(name, result.metrics.get(name)) for name in names],
            "checkpoint": checkpoint_of(result),
        }
        for result in group
    ]
    return {"title": title(group), "about": describe(group), "names": names, "rows": rows}


def _png_data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


if __name__ == "__main__":
    main()
