"""python spaces/make_space.py --out OUT: write a Hugging Face Space that runs the demo on its free CPU.

Upload them with `hf upload OWNER/NAME OUT --repo-type space`. Hugging Face then builds the Dockerfile.
"""

from __future__ import annotations

import dataclasses
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path

from tavq.base.arguments import parse, run_main

ROOT = Path(__file__).resolve().parent.parent
FILES = ("Dockerfile", ".dockerignore", "pyproject.toml", "constraints.txt", "LICENSE")
LEFT_OUT = ("__pycache__", "*.egg-info", "*.per_image.npz", "*.samples.png")
# Clients reach a Space through a proxy whose address is not known, and which names theirs.
BEHIND_A_PROXY = "\n# The proxy of Hugging Face names the clients' addresses.\nENV FORWARDED_ALLOW_IPS=*\n"


@dataclasses.dataclass(frozen=True)
class SpaceRun:
    """Write the files of a Hugging Face Space.

    Example: python spaces/make_space.py --out space/
    """

    out: Path
    """Folder to write; it must not exist."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(SpaceRun, argv, prog="python spaces/make_space.py")
    if run.out.exists():
        raise FileExistsError(f"{run.out} exists; name a new folder")
    run.out.mkdir(parents=True)

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for folder in project["tool"]["setuptools"]["package-dir"].values():
        shutil.copytree(ROOT / folder, run.out / folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in FILES:
        shutil.copyfile(ROOT / name, run.out / name)

    # The first page of a Space is its README, which says in its front matter how to run it.
    shutil.copyfile(ROOT / "spaces" / "README.md", run.out / "README.md")
    dockerfile = run.out / "Dockerfile"
    dockerfile.write_text(dockerfile.read_text() + BEHIND_A_PROXY)
    print(run.out)


if __name__ == "__main__":
    main()
