"""Make build/tree, in which links show each package where it is installed: build/tree/tavq/tokenizer.

The folders lie at the top of the checkout and are installed as `tavq.*`. Tools that read the source instead
of importing it (mypy, mkdocstrings) find modules by their place in the file system.
"""

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "tree"


def link_tree() -> list[str]:
    """Make the tree anew. Returns the folders that lie at the top of the checkout, without `tavq` itself."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(TREE, ignore_errors=True)
    for package, folder in folders.items():
        inside = TREE / package.replace(".", "/")
        inside.mkdir(parents=True, exist_ok=True)
        for file in [*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("py.typed")]:
            (inside / file.name).symlink_to(file)
    return [folder for folder in folders.values() if folder != "tavq"]


if __name__ == "__main__":
    link_tree()
