"""The `tavq` command itself: versions, help, what is meant, completion, and how soon it answers."""

import dataclasses
import importlib.metadata
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tavq import cli, completion
from tavq.base import progress
from tavq.base.files import check_directory, check_file
from tavq.base.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {
    "torch",
    "transformers",
    "accelerate",
    "torchvision",
    "scipy",
    "matplotlib",
    "nltk",
    "webdataset",
    "gradio",
    "ray",
}
SECONDS = 1.0
PRINT_NO_RESULTS = {"demo", "serve", "tokenize", "preferences", "export", "blind", "report", "completion"} | {
    f"train {model}" for model in ("tokenizer", "decoder", "generator", "captioner", "lexicon")
}
"""Commands that print at most the path of what they wrote, or where they are."""


def said(capsys: pytest.CaptureFixture[str], *argv: str, code: int | None = None) -> str:
    """Run a command line; return what it printed. `code` is that of the exit it must end with."""
    capsys.readouterr()
    if code is None:
        cli.main(argv)
    else:
        with pytest.raises(SystemExit) as left:
            cli.main(argv)
        assert left.value.code == code
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_version_and_help(capsys):
    assert said(capsys, "--version") == f"tavq {importlib.metadata.version('ta-vq')}\n"
    overview = said(capsys, "--help")
    assert all(f"  {name} " in overview for name in cli.COMMANDS)
    assert said(capsys) == said(capsys, "help") == overview
    assert said(capsys, "help", "units", code=0) == said(capsys, "units", "--help", code=0)
    assert "usage: tavq train tokenizer" in said(capsys, "help", "train", "tokenizer", code=0)


@pytest.mark.parametrize("group", ["train", "eval", "score"])
def test_a_group_alone_lists_what_is_in_it(capsys, group):
    names = {name for name in cli.COMMANDS if name.startswith(f"{group} ")}
    for argv in ([group], [group, "--help"], ["help", group]):
        listed = said(capsys, *argv)
        assert set(re.findall(rf"^  ({group} \w+)", listed, flags=re.MULTILINE)) == names


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        ("generat a", "did you mean tavq generate?"),
        ("train tokeniser", "did you mean tavq train tokenizer?"),
        ("evel t2i", "did you mean tavq eval?"),
        ("train paint", "choose one of: tokenizer, decoder, generator, captioner"),
        ("paint", "tavq --help lists the commands"),
        ("generate a --num-image 4", "did you mean --num-images?"),
        ("train tokenizer --training.step 4", "did you mean --training.steps?"),
    ],
)
def test_what_is_meant_is_named(capsys, argv, meant):
    message = said(capsys, *argv.split(), code=2)
    assert message.startswith("error: ") and message.count("\n") == 1 and meant in message


def test_completion_knows_every_command():
    assert set(completion.FLAGS) == set(cli.COMMANDS)


def test_every_command_that_prints_results_has_json():
    with_json = {
        name
        for name, flags in completion.FLAGS.items()
        if not isinstance(flags, dict) and "json" in {field.name for field in dataclasses.fields(flags)}
    }
    assert set(cli.COMMANDS) - with_json == PRINT_NO_RESULTS


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_for_every_shell(shell):
    script = subprocess.run(
        [sys.executable, "-m", "tavq", "completion", shell], cwd=ROOT, capture_output=True, text=True
    )
    assert script.returncode == 0 and "--negative-prompt" in script.stdout and "tavq" in script.stdout


@pytest.mark.slow
def test_bash_completes_commands_flags_and_choices(tmp_path):
    script = subprocess.run(
        [sys.executable, "-m", "tavq", "completion", "bash"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    (tmp_path / "tavq.bash").write_text(script)
    asked = """
    source tavq.bash
    ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _tyro_tavq; echo "${COMPREPLY[*]}"; }
    ask tavq ge
    ask tavq train t
    ask tavq generate --neg
    ask tavq generate --rank-by ""
    ask tavq train tokenizer --training.opt
    """
    answers = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True)
    assert answers.stdout.splitlines() == [
        "generate",
        "tokenizer",
        "--negative-prompt",
        "likelihood alignment sum",
        "--training.optimizer",
    ]


@pytest.mark.slow
def test_help_and_mistakes_of_every_command_need_no_torch():
    """In one process, one command after the other; none may load a library that takes long."""
    code = f"""
import contextlib, io, sys, time
from tavq import cli
for name in cli.COMMANDS:
    for last in ("--help", "--no-such-flag"):
        started = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                cli.main([*name.split(), last])
            except SystemExit as left:
                code = left.code or 0
        print(name, last, code, time.process_time() - started, *({HEAVY!r} & set(sys.modules)), sep=",")
"""
    answered = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answered.returncode == 0, answered.stderr[-1000:]
    rows = [line.split(",") for line in answered.stdout.splitlines()]
    assert len(rows) == 2 * len(cli.COMMANDS)
    for name, last, exit_code, seconds, *loaded in rows:
        assert not loaded, f"tavq {name} {last} loads {loaded}"
        assert exit_code == ("0" if last == "--help" else "2") and float(seconds) < SECONDS, name


@pytest.mark.slow
def test_help_answers_within_a_second():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "tavq", "train", "tokenizer", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0 and "--training.steps" in shown.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS


@pytest.mark.slow
def test_ctrl_c_in_the_first_seconds_is_one_line(tmp_path):
    command = [sys.executable, "-m", "tavq", "generate", "a dog", "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # a job in the background of a shell ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "libtorch" not in maps.read_text():
            time.sleep(0.01)
        for _ in range(10):  # libraries swallow an interrupt now and then while they are imported
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=10)
                break
            except subprocess.TimeoutExpired:
                continue
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "stopped\n")


def test_an_interrupt_while_a_command_is_imported_is_one_line(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "entry_point", interrupted)
    assert said(capsys, "units", "a dog", code=130) == "stopped\n"


def test_progress_is_a_line_now_and_then_where_stderr_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with Progress(total=4, initial=1, desc="seed 0", unit="image") as bar:
        bar.refresh()
        for _ in range(3):
            bar.update(1)
            bar.refresh()
            bar.write("a file")
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert printed.out == "a file\n" * 3
    assert lines[0].startswith("seed 0: 2 of 4 images, ") and lines[-1].startswith("seed 0: 4 of 4 images, ")
    assert "\r" not in printed.err and all(line.startswith("seed 0: ") for line in lines)


def test_what_cannot_be_written_to_is_found_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    check_directory(tmp_path / "new" / "deep")
    check_file(tmp_path / "new" / "x.json", ".json")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"], "nothing is made"
    with pytest.raises(NotADirectoryError, match="file is a file, and --out needs a directory"):
        check_directory(tmp_path / "file" / "below")
    with pytest.raises(IsADirectoryError, match="is a directory, and a file is to be written"):
        check_file(tmp_path)
    with pytest.raises(ValueError, match=r"ends in nothing, expected \.json"):
        check_file(tmp_path / "file", ".json")
