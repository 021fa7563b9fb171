"""Write docs/coverage.md from the coverage data of the last `make coverage`: python .ci/coverage_page.py

Each folder has a row. Of the folders that hold the method, every line that no test runs is listed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "coverage.md"
METHOD = ("alignment", "metrics", "generator", "tokenizer")
"""Folders of which no line shall be without a test."""
COUNTS = ("num_statements", "missing_lines", "num_branches", "missing_branches")
INTRODUCTION = """\
# Coverage

`make coverage` runs all tests and writes this page: how many statements and branches of each folder they
run. A line with `# pragma: no cover` and a reason does not count.

| folder | statements | not run | branches | not taken | covered |
| --- | ---: | ---: | ---: | ---: | ---: |
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "coverage.json"
        command = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", str(file)]
        subprocess.run(command, cwd=ROOT, check=True)
        files = json.loads(file.read_text())["files"]
    PAGE.write_text(page(files))
    print(PAGE.relative_to(ROOT))


def page(files: dict[str, Any]) -> str:
    """Write the page, in Markdown, from the `files` of coverage's JSON report."""
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, file in files.items():
        folder = Path(name).parts[0]
        for count in COUNTS:
            value = file["summary"][count]
            sums[folder][count] += value
            sums["all"][count] += value

    rows = [row(f"`{folder}/`", sums[folder]) for folder in sorted(sums.keys() - {"all"})]
    rows.append(row("**all**", sums["all"]))
    missed = [
        f"- `{name}`: {', '.join(map(str, file['missing_lines']))}"
        for name, file in sorted(files.items())
        if Path(name).parts[0] in METHOD and file["missing_lines"]
    ]
    folders = ", ".join(f"`{folder}/`" for folder in METHOD)
    heading = f"\n## Lines of {folders} that no test runs\n"
    return INTRODUCTION + "\n".join([*rows, heading, *(missed or ["None."]), ""])


def row(title: str, counts: Counter[str]) -> str:
    """Write the line of one folder."""
    everything = counts["num_statements"] + counts["num_branches"]
    missing = counts["missing_lines"] + counts["missing_branches"]
    share = 1 - missing / max(everything, 1)
    return f"| {title} | " + " | ".join(f"{counts[name]:,}" for name in COUNTS) + f" | {share:.1%} |"


if __name__ == "__main__":
    main()
