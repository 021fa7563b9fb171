"""tavq table results/*.json [--readme README.md] [--check]

Make the tables of results between the two marker lines of the README, from the result files, never by hand.
Files whose protocols differ never share a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from tavq.base.arguments import parse, run_main
from tavq.base.files import atomic_write
from tavq.eval.results import Comparison, Results, compare, protocol_differences, read_results

TIMES_100 = ("CIDEr", "BLEU", "METEOR", "ROUGE-L", "SPICE", "cycle_CIDEr", "t2i_R@", "i2t_R@", "prompt_R@")
DIGITS = {"PSNR": 2, "SSIM": 3, "KID": 4, "precision": 3, "recall": 3, "usage": 3, "IS": 2}
DIGITS |= dict.fromkeys(("ends in a function word", "distinct captions"), 3)
DIGITS |= dict.fromkeys(("power", "correlation", "weave"), 2)  # of each octave or period
MEANINGS = {
    "power ": "power: of the reconstruction over the photo's, by cycles an image",
    "correlation ": "correlation: with the photo, by cycles an image",
    "weave ": "weave: how far flat regions stand out at a period, over the same figure of photos",
}
"""How metrics begin -> what the line above their table says of them."""
TITLES = {
    "tokenizer": "Tokenizer: reconstruction, codebook, retrieval",
    "t2i": "Text to image",
    "captions": "Captions",
    "images": "Image sets",
}


@dataclass(frozen=True)
class Table:
    """Make the README's tables of results; files of one protocol are compared with the first."""

    results: Positional[tuple[Path, ...]]
    """The result files, one row each."""
    readme: Path = Path("README.md")
    """The file that holds the two marker lines."""
    check: bool = False
    """Change nothing; exit 2 if the tables are stale."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    """Run `tavq table`."""
    config = parse(Table, argv, prog="tavq table")
    if not config.results:
        raise ValueError("no result files given; name at least one, such as results/*.json")
    if not config.readme.is_file():
        raise FileNotFoundError(f"no file {config.readme}; name one with --readme")
    tables = make_tables([read_results(path) for path in config.results])
    if config.check:
        if with_block(config.readme, "results", tables) != config.readme.read_text(encoding="utf-8"):
            raise ValueError(f"the tables in {config.readme} are stale; run tavq table without --check")
        print(f"{config.readme}: up to date")
    else:
        write_block(config.readme, "results", tables)


def with_block(path: Path, name: str, block: str) -> str:
    """Return the text of the Markdown file `path` with `block` between the two marker lines of `name`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks the marker lines.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} to write the {name} table into")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
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


def format_metric(name: str, entry: dict[str, Any] | None) -> str:
    """Return one cell: the value, its interval in brackets, or its deviation; "-" if not measured."""
    if entry is None:
        return "-"
    factor, digits = _scale(name)
    value, low, high = (
        None if entry.get(key) is None else entry[key] * factor for key in ("value", "low", "high")
    )
    if low is not None:
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    if "deviation" in entry:
        return f"{value:.{digits}f} ± {entry['deviation'] * factor:.{digits}f}"
    return f"{value:.{digits}f}"


def format_difference(row: Comparison) -> str:
    """Return one cell: the second minus the first with its paired-bootstrap interval, bold where it
    excludes 0."""
    factor, digits = _scale(row.metric)
    text = f"{row.difference * factor:+.{digits}f}"
    if row.interval is None:
        return text
    text += f" [{row.interval.low * factor:+.{digits}f}, {row.interval.high * factor:+.{digits}f}]"
    return f"**{text}**" if row.interval.excludes_zero else text


def _scale(name: str) -> tuple[int, int]:
    """Factor and decimals with which a metric is shown."""
    return 100 if name.startswith(TIMES_100) else 1, DIGITS.get(name, DIGITS.get(name.split()[0], 1))


def checkpoint_of(result: Results) -> str:
    """Return the short hashes of the checkpoints that a result file names."""
    checkpoints = result.protocol.get("checkpoints") or {}
    return " ".join(f"{part} {str(sha256)[:8]}" for part, sha256 in checkpoints.items()) or "-"


def _markdown(group: Sequence[Results], differences: bool) -> str:
    names = metric_names(group)
    with_checkpoint = any(result.protocol.get("checkpoints") for result in group)
    head = ["", *names, *(["checkpoint"] if with_checkpoint else [])]
    lines = [
        f"**{title(group)}**: {describe(group)}",
        "",
        _row(head),
        _row(["---"] + ["---:"] * len(head[1:])),
    ]
    for result in group:
        cells = [format_metric(name, result.metrics.get(name)) for name in names]
        lines.append(_row([result.label, *cells, *([checkpoint_of(result)] if with_checkpoint else [])]))
    for result in group[1:] if differences else ():
        found = {row.metric: format_difference(row) for row in compare(group[0].path, result.path)}
        cells = [found.get(name, "-") for name in names]
        label = f"{result.label} - {group[0].label}"
        lines.append(_row([label, *cells, *([""] if with_checkpoint else [])]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
