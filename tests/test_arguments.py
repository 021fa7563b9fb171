"""Command lines: presets, YAML, and one line for every mistake."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tavq.base.arguments import parse, run_main, to_plain
from tavq.cli import COMMANDS, main
from tavq.tokenizer.config import RUN_PRESETS, TokenizerRun


def read(*argv: str) -> TokenizerRun:
    return parse(TokenizerRun, argv, prog="tavq train tokenizer", presets=RUN_PRESETS)


def test_a_flag_changes_one_field_of_a_preset():
    run = read("--preset", "tiny", "--training.steps", "7")
    assert run == dataclasses.replace(
        RUN_PRESETS["tiny"], training=dataclasses.replace(RUN_PRESETS["tiny"].training, steps=7)
    )


def test_the_resolved_configuration_reloads_as_it_is(tmp_path):
    run = read("--preset", "tiny", "--model.quantizer.num-codes", "32", "--out", "a/b")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_plain(run)))
    assert dataclasses.replace(read("--config", str(path)), config=None) == run


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--colour", "red"], "Unrecognized options: --colour"),
        (["--preset", "huge"], "unknown preset 'huge'; choose one of: flickr8k, tiny, vqgan256"),
        (["--training.steps", "many"], "--training.steps"),
        (["--training.steps", "0"], "steps is 0, expected 1 or more"),
        (["--config", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        (["--align", "none", "--model.quantizer.name", "fsq"], "set it to 1000"),
    ],
)
def test_mistakes_take_one_line_and_exit_code_2(argv, message, capsys):
    @run_main
    def entry(argv=None):
        read(*argv)

    with pytest.raises(SystemExit) as stopped:
        entry(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_an_unknown_key_of_a_yaml_file_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: shapes\ncolour: red\n")
    with pytest.raises(ValueError, match="colour"):
        read("--config", str(path))


def test_debug_shows_the_traceback():
    @run_main
    def entry(argv=None):
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        entry(["--debug"])


@pytest.mark.parametrize(("code", "expected"), [("exit 3", 3), ("kill -TERM $$", 143)])
def test_a_command_that_fails_ends_the_one_that_ran_it(code, expected):
    @run_main
    def entry(argv=None):
        subprocess.run(["sh", "-c", code], check=True)

    with pytest.raises(SystemExit) as stopped:
        entry([])
    assert stopped.value.code == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code in (0, None)
    assert len(capsys.readouterr().out) > 100


def test_an_unknown_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["paint"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", ["run_tokenizer.py", "run_t2i.py", "run_caption.py", "run_scenes.py"])
def test_the_evaluations_run_as_scripts_from_the_checkout(script):
    root = Path(__file__).resolve().parent.parent
    shown = subprocess.run(
        [sys.executable, f"eval/{script}", "--help"], cwd=root, capture_output=True, text=True
    )
    assert shown.returncode == 0 and "--checkpoint" in shown.stdout
