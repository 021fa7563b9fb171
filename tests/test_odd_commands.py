"""The table of odd command lines in docs/command-line.md: each ends with the code and the first line it says.

`UPDATE_ODD_COMMANDS=1 pytest tests/test_odd_commands.py` writes the codes and first lines anew.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tavq.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "command-line.md"
ROW = re.compile(r"^\| `(tavq[^`]*)` \| (\d+) \| `` (.*) `` \|$", flags=re.MULTILINE)
UPDATE = "UPDATE_ODD_COMMANDS" in os.environ
ROWS = ROW.findall(PAGE.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Path]:
    """A folder with the files that the command lines name."""
    folder = tmp_path_factory.mktemp("odd")
    shutil.copy(ROOT / "app" / "examples" / "cat.jpg", folder / "photo.jpg")
    shutil.copytree(tiny_checkpoint, folder / "tiny")
    (folder / "photos").mkdir()
    (folder / "empty").mkdir()
    (folder / "text.jpg").write_text("no image")
    (folder / "cut.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:2000])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("L", (20, 20)).save(folder / "black.png")
    (folder / "notes.md").write_text("# Notes\n")
    (folder / "blank.txt").write_text("\n\n")
    (folder / "names.csv").write_text("name\na dog\n")
    (folder / "broken.jsonl").write_text("{\n")
    (folder / "run.yaml").write_text("colour: red\n")
    (folder / "broken.json").write_text("[")
    (folder / "captions.json").write_text('[{"image_id": 1, "caption": "a dog"}]')
    return folder


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command line; return its exit code and the first line that it prints."""
    capsys.readouterr()
    code = 0
    try:
        main(shlex.split(line)[1:])
    except SystemExit as left:
        code = int(left.code or 0)
    printed = capsys.readouterr()
    lines = (printed.err or printed.out).splitlines()
    if code == 2:
        assert printed.out == "" and len(lines) == 1, f"{line} says {lines}"
    assert "Traceback" not in printed.err
    return code, lines[0].rstrip() if lines else ""


def test_there_are_as_many_as_the_page_says_and_some_of_every_command():
    lines = [line for line, _, _ in ROWS]
    (said,) = re.findall(r"^What (\d+) mistakes", PAGE.read_text(), flags=re.MULTILINE)
    assert len(lines) == len(set(lines)) == int(said) >= 101
    named = {name for name in COMMANDS for line in lines if f"{line} ".startswith(f"tavq {name} ")}
    assert named == set(COMMANDS)


@pytest.mark.parametrize(("line", "code", "first"), ROWS, ids=[line for line, _, _ in ROWS])
def test_an_odd_command_line(line, code, first, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("TAVQ_DATA", raising=False)
    before = files_below(folder)
    found = run(line, capsys)
    if UPDATE:
        replace_row(line, *found)
        return
    assert found == (int(code), first.replace("\\|", "|"))
    if found[0] == 2:
        assert files_below(folder) == before, "a refused command writes nothing"


def replace_row(line: str, code: int, first: str) -> None:
    rows = {match[1]: match[0] for match in ROW.finditer(PAGE.read_text())}
    escaped = first.replace("|", "\\|")  # else it ends the cell
    PAGE.write_text(PAGE.read_text().replace(rows[line], f"| `{line}` | {code} | `` {escaped} `` |"))
