"""The README tells the truth: commands exist with their flags, linked files are there, tables are fresh."""

import re
from pathlib import Path

import pytest

from tavq.cli import COMMANDS, main
from tavq.eval import table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SHIPPED = ROOT / "checkpoints" / "flickr8k"


def commands() -> list[str]:
    """Every `tavq ...` command of the README, from code blocks and from the table of tasks."""
    blocks = re.findall(r"```\w*\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("tavq ")]
    return sorted(set(lines + re.findall(r"`(tavq [^`]+)`", README)) - {"tavq ..."})


@pytest.mark.parametrize("command", commands())
def test_every_command_exists_with_its_flags(command, capsys):
    words = command.split()[1:]
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), None)
    assert name, f"no such command: {command}"
    arguments = [*name.split(), *(["captions"] if name == "score" else []), "--help"]
    with pytest.raises(SystemExit):
        main(arguments)
    shown = capsys.readouterr().out
    for flag in re.findall(r"(--[a-z][\w.-]*)", command):
        assert flag in shown, f"{flag} of {command!r} is no flag of tavq {name}"


def test_every_file_that_is_linked_is_there():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize(
    ("page", "folders"),
    [("README.md", ["results"]), ("docs/pair.md", ["results/pair/plain", "results/pair/aligned"])],
)
def test_the_tables_are_made_from_the_results(page, folders):
    results = [path for folder in folders for path in sorted((SHIPPED / folder).glob("*.json"))]
    assert {path.stem for path in results} >= {"tokenizer", "t2i", "caption"}
    table.main([*map(str, results), "--readme", str(ROOT / page), "--check"])


def test_the_shipped_weights_are_small_and_in_half_precision():
    weights = list(SHIPPED.glob("*/model.safetensors"))
    assert {path.parent.name for path in weights} == {"tokenizer", "generator", "captioner"}
    assert sum(path.stat().st_size for path in weights) <= 24e6
