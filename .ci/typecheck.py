"""Check the types of every package: `python .ci/typecheck.py` (options are handed to mypy)."""

import os
import re
import subprocess
import sys

from link_tree import ROOT, TREE, link_tree


def main() -> None:
    folders = link_tree()
    files = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *files, "-p", "tavq", *sys.argv[1:]]
    environment = os.environ | {"MYPYPATH": str(TREE)}
    checked = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True)
    # tavq/tokenizer/model.py is written tokenizer/model.py, where it lies
    report = re.sub(rf"^tavq/(?=(?:{'|'.join(folders)})/)", "", checked.stdout, flags=re.MULTILINE)
    print(report, checked.stderr, sep="", end="")
    sys.exit(checked.returncode)


if __name__ == "__main__":
    main()
