"""tavq table results/*.json [--readme README.md] [--check]

Print a table of result files, or write the tables between the marker lines of a Markdown file. These say
what belongs there: `<!-- results: begin -->` and `<!-- results: end -->` all metrics, one table a protocol;
`summary` the main metrics with their reference points; `models` the weights that ship.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from tavq.base.arguments import parse, print_json, run_main
from tavq.base.files import atomic_write
from tavq.base.weights import shipped_checkpoint
from tavq.eval.cells import TIMES_100, format_difference, format_metric, markdown_row
from tavq.eval.results import Results, compare, protocol_differences, read_results
from tavq.eval.summary import BASELINES, make_models, make_summary

MEANINGS = {
    "power ": "power: of the reconstruction over the photo's, by cycles an image",
    "correlation ": "correlation: with the photo, by cycles an image",
    "weave ": "weave: how far flat regions stand out at a period, over the same figure of photos",
}
"""How metrics begin -> what the line above their table says of them."""
MAX_COLUMNS = 4  # of a table whose rows are metrics; with more results, the rows are results
TITLES = {
    "tokenizer": "Tokenizer: reconstruction, codebook, retrieval",
    "t2i": "Text to image",
    "captions": "Captions",
    "images": "Image sets",
    BASELINES: "Captions without a captioner",
}


@dataclass(frozen=True)
class Table:
    """Print a table of result files, or write the tables of a Markdown file.

    Examples: tavq table results/mine/*.json;  tavq table results/mine/*.json --readme docs/results.md
    """

    results: Positional[tuple[Path, ...]]
    """The result files. Files of one protocol share a table and are compared with the first."""
    block: Literal["results", "summary", "models"] = "results"
    """Table to print: all metrics, the main metrics with their reference points, or the sizes of the
    weights."""
    readme: Path | None = None
    """Markdown file to write into, between the marker lines of these blocks, instead of printing one."""
    models: tuple[Path, ...] = field(default_factory=lambda: (shipped_checkpoint(),))
    """Checkpoints that the block `models` lists."""
    check: bool = False
    """With --readme: change nothing; exit 2 if the tables are stale."""
    json: bool = False
    """Print one line of JSON for each result file, instead of a table."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    """Run `tavq table`."""
    config = parse(Table, argv, prog="tavq table")
    if not config.results:
        raise ValueError("no result files given; name at least one, such as results/*.json")
    if config.readme is not None and not config.readme.is_file():
        raise FileNotFoundError(f"no file {config.readme}; name one with --readme")
    if config.check and config.readme is None:
        raise ValueError("--check compares a page with its results; name the page with --readme")
    if config.json and config.readme is not None:
        raise ValueError("--json prints and --readme writes; give one of them")

    results = [read_results(path) for path in config.results]
    if config.json:
        for result in results:
            print_json({"path": str(result.path), "metrics": result.metrics, "protocol": result.protocol})
        return
    makers: dict[str, Callable[[], str]] = {
        "results": lambda: make_tables(results),
        "summary": lambda: make_summary(results),
        "models": lambda: make_models(config.models),
    }
    if config.readme is None:
        print(makers[config.block]())
    else:
        write_tables(config.readme, makers, check=config.check)


def write_tables(page: Path, makers: Mapping[str, Callable[[], str]], *, check: bool) -> None:
    """Write the blocks of a Markdown file whose marker lines it has; with `check` compare them instead.

    Raises:
        ValueError: it has no marker line, or `check` finds a table that is not the one in the file.
    """
    text = page.read_text(encoding="utf-8")
    blocks = [name for name in makers if begin_marker(name) in text]
    if not blocks:
        raise ValueError(
            f"{page} has no marker line; put {begin_marker('results')} and below it "
            f"{end_marker('results')} where the tables belong"
        )
    for name in blocks:
        if not check:
            write_block(page, name, makers[name]())
        elif with_block(page, name, makers[name]()) != text:
            raise ValueError(f"the tables in {page} are stale; run tavq table without --check")
    if check:
        print(f"{page}: up to date")


def begin_marker(name: str) -> str:
    """Return the line that begins a block."""
    return f"<!-- {name}: begin -->"


def end_marker(name: str) -> str:
    """Return the line that ends a block."""
    return f"<!-- {name}: end -->"


def with_block(path: Path, name: str, block: str) -> str:
    """Return the text of the Markdown file `path` with `block` between the two marker lines of `name`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks the marker lines.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} to write the {name} table into")
    begin = begin_marker(name)
    end = end_marker(name)
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"{path} lacks the marker lines; put {begin} and below it {end} where the tables belong"
        )
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def write_block(path: Path, name: str, block: str) -> None:
    """Put `block` between the two marker lines of `name` in the Markdown file `path`."""
    text = with_block(path, name, block)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{path}: tables written")


def make_tables(results: Sequence[Results], *, differences: bool = True) -> str:
    """Return one Markdown table for each protocol among the results, the tokenizer's first.

    With `differences` a row below shows how each further result differs from the first of its table.
    """
    tasks = list(TITLES)
    groups = group_by_protocol(results)
    groups.sort(key=lambda g: tasks.index(t) if (t := g[0].protocol.get("task")) in tasks else len(tasks))
    return "\n\n".join(_markdown(group, differences) for group in groups)


def group_by_protocol(results: Sequence[Results]) -> list[list[Results]]:
    """Split result files into groups that may stand in one table, in order of first appearance."""
    groups: list[list[Results]] = []
    for result in results:
        # All of a group, not its first alone: a file without a judge is like any file with one.
        like = (g for g in groups if not any(protocol_differences(r.protocol, result.protocol) for r in g))
        group = next(like, None)
        if group is None:
            groups.append([result])
        else:
            group.append(result)
    return groups


def title(group: Sequence[Results]) -> str:
    """Return the heading of a group."""
    task = group[0].protocol.get("task", "")
    return TITLES.get(task, task)


def describe(group: Sequence[Results]) -> str:
    """Return in one line what the rows of a group share, and how to read the cells."""
    protocol = group[0].protocol
    network = protocol.get("feature_network")
    parts = [
        f"{protocol['split']} split" if "split" in protocol else None,
        f"n = {protocol['n']:,}" if "n" in protocol else None,
        f"features: {network['name']} ({network['sha256'][:8]})" if network else None,
        f"resize: {protocol['resize']}" if "resize" in protocol else None,
        _search(protocol["decoding"]) if "decoding" in protocol else None,
        *brackets(group),
    ]
    names = metric_names(group)
    hundred = [start for start in TIMES_100 if any(name.startswith(start) for name in names)]
    if hundred:
        parts.append(", ".join(start.removesuffix("@") for start in hundred) + " times 100")
    parts += [meaning for start, meaning in MEANINGS.items() if any(n.startswith(start) for n in names)]
    return "; ".join(part for part in parts if part) + "."


def _search(decoding: dict[str, Any]) -> str:
    way = "greedy" if decoding["beam"] == 1 else f"beam {decoding['beam']}"
    if decoding["temperature"] > 0:
        way = f"sampled at temperature {decoding['temperature']}"
    weight = decoding.get("alignment")
    return f"{way}, chosen with the help of the codes (alignment {weight:g})" if weight else way


def brackets(group: Sequence[Results]) -> list[str]:
    """Return what the two numbers in brackets span: entries name it in `over`, or it is the bootstrap."""
    pairs = [pair for result in group for pair in result.metrics.items() if "low" in pair[1]]
    spans: dict[str | None, dict[str, None]] = {}
    for name, entry in pairs:
        spans.setdefault(entry.get("over"), {})[name] = None
    return [
        f"in brackets the {f'range over {span}' if span else '95 % bootstrap interval'}"
        + (f" ({', '.join(names)})" if len(spans) > 1 else "")
        for span, names in spans.items()
    ]


def metric_names(group: Sequence[Results]) -> list[str]:
    """Return the metrics of a group, in order of first appearance."""
    return list(dict.fromkeys(name for result in group for name in result.metrics))


def checkpoint_of(result: Results) -> str:
    """Return the short hashes of the checkpoints that a result file names."""
    checkpoints = result.protocol.get("checkpoints") or {}
    return " ".join(f"{part} {str(sha256)[:8]}" for part, sha256 in checkpoints.items()) or "-"


def _markdown(group: Sequence[Results], differences: bool) -> str:
    names = metric_names(group)
    lines = [["", *names, "checkpoint"]]
    for result in group:
        cells = [format_metric(name, result.metrics.get(name)) for name in names]
        lines.append([result.label, *cells, checkpoint_of(result)])
    for result in group[1:] if differences else ():
        compared = {row.metric: format_difference(row) for row in compare(group[0].path, result.path)}
        cells = [compared.get(name, "-") for name in names]
        lines.append([f"{result.label} - {group[0].label}", *cells, ""])

    if not any(result.protocol.get("checkpoints") for result in group):
        lines = [line[:-1] for line in lines]
    if len(lines) <= MAX_COLUMNS:  # few results: one row a metric fits a page
        lines = [list(column) for column in zip(*lines, strict=True)]
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    rows = [lines[0], rule, *lines[1:]]
    return "\n".join([f"**{title(group)}**: {describe(group)}", "", *map(markdown_row, rows)])


if __name__ == "__main__":
    main()
