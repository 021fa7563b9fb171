"""Write hashes.txt: `python .ci/hashes.py`, after a version in constraints.txt has changed.

Asks pip which files of PyPI it would install here, and keeps what is known already. For Python 3.11 on Linux.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
HASHES = ROOT / "hashes.txt"
WITHOUT = ("torch", "torchvision", "xformers")
HEAD = """\
# The files of PyPI that the versions in constraints.txt were tested as: Python 3.11, Linux, x86-64.
# Written by .ci/hashes.py.
#
#   .venv/bin/pip install --require-hashes --no-deps -r hashes.txt
#
# installs just these files, or nothing, before `python3.11 install.py EXTRAS`, which then finds them there.
# constraints.txt holds no hashes itself: with one of them pip refuses whatever has none, such as this folder
# (`-e .`) and the other wheels that other platforms and Pythons get. torch, torchvision and xformers are left
# out, since a machine with a GPU and one without take different files of the same version, from different
# servers; install.py chooses between them.
"""


def main() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and line[0] != "#"]
    wanted = [line for line in lines if line.split("==")[0] not in WITHOUT]
    known = {line.split()[0]: line for line in HASHES.read_text().splitlines() if line[0] != "#"}
    known |= hashed([line for line in wanted if line not in known])
    HASHES.write_text(HEAD + "".join(f"{known[line]}\n" for line in wanted))


def hashed(lines: list[str]) -> dict[str, str]:
    """Requirement -> the same with the hash of its file."""
    if not lines:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--no-deps", "--index-url", "https://pypi.org/simple"]
        command = [sys.executable, "-m", "pip", "--isolated", "install", *options, "--report", str(report)]
        subprocess.run([*command, *lines], check=True)
        files = json.loads(report.read_text())["install"]
    by_name = {canonical(line.split("==")[0]): line for line in lines}
    hashes = {
        by_name[canonical(file["metadata"]["name"])]: file["download_info"]["archive_info"]["hashes"][
            "sha256"
        ]
        for file in files
    }
    return {line: f"{line} --hash=sha256:{sha256}" for line, sha256 in hashes.items()}


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    main()
