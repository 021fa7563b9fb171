"""Check the types of every package: `python .ci/typecheck.py` (options are handed to mypy).

The folders lie at the top of the checkout and are installed as `tavq.*`. mypy finds modules by their
place in the file system, so it is given a tree of links in which each folder lies where it is installed.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".mypy_cache" / "tree"


def main() -> None:
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(TREE, ignore_errors=True)
    for package, folder in folders.items():
        inside = TREE / package.replace(".", "/")
        inside.mkdir(parents=True, exist_ok=True)
        for file in (ROOT / folder).glob("*.py"):
            (inside / file.name).symlink_to(file)

    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "tavq"]
    environment = os.environ | {"MYPYPATH": str(TREE)}
    checked = subprocess.run(
        [*command, *sys.argv[1:]], cwd=TREE, env=environment, capture_output=True, text=True
    )
    rooms = "|".join(folder for folder in folders.values() if folder != "tavq")
    report = re.sub(rf"^tavq/(?=(?:{rooms})/)", "", checked.stdout, flags=re.MULTILINE)
    print(report, checked.stderr, sep="", end="")
    sys.exit(checked.returncode)


if __name__ == "__main__":
    main()
