"""What a machine does to a run: a full disk, folders that vanish, two runs in one folder, signals."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tavq import cli
from tavq.base.arguments import run_main
from tavq.base.files import atomic_write
from tavq.base.journal import append_row, read_journal
from tavq.base.locks import only_writer
from tavq.base.progress import Progress
from tavq.captioner.caption_folder import caption_folder
from tavq.captioner.decoding import Caption

from .demo_server import PHOTO

TINY = ("--preset", "tiny", "--training.steps", "2", "--losses.adversarial", "0", "--align", "none")
FULL = "error: the disk is full or broken"


@contextlib.contextmanager
def disk_of(kib: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size; writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kib, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def ended(*command: str) -> int:
    """Run a command in this process, and return its exit code."""
    try:
        cli.main(list(command))
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        Image.open(PHOTO).resize((64, 64)).rotate(30 * number).save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kib", "command"),
    [
        (16, ["train", "tokenizer", *TINY, "--out", "OUT"]),
        (16, ["tokenize", "--data", "shapes", "--checkpoint", "CHECKPOINT/tokenizer", "--out", "OUT"]),
        (4, ["export", "CHECKPOINT/tokenizer", "--out", "OUT"]),
        (4, ["generate", "a dog", "--checkpoint", "CHECKPOINT", "--out", "OUT"]),
        (4, ["reconstruct", str(PHOTO), "--checkpoint", "CHECKPOINT", "--out", "OUT"]),
        (4, ["index", "PHOTOS", "--checkpoint", "CHECKPOINT", "--out", "OUT"]),
        (0, ["caption", "PHOTOS", "--checkpoint", "CHECKPOINT", "--out", "OUT.jsonl"]),
        (0, ["caption", "PHOTOS", "--checkpoint", "CHECKPOINT", "--out", "OUT.csv"]),
        (1, ["codebook", "CHECKPOINT/tokenizer", "--data", "shapes", "--out", "OUT.png"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_full_disk_is_one_line_and_the_repeated_command_goes_on(
    kib: int, command: list[str], tiny_checkpoint: Path, photos: Path, tmp_path: Path, capsys
):
    places = {"OUT": str(tmp_path / "out"), "CHECKPOINT": str(tiny_checkpoint), "PHOTOS": str(photos)}
    for name, place in places.items():
        command = [part.replace(name, place) for part in command]
    with disk_of(kib):
        assert ended(*command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(FULL) and not any("Traceback" in line for line in lines)
    assert ended(*command) == 0
    assert not [name for name in visible(tmp_path) if name.endswith((".lock", ".new", ".tmp"))]


def test_an_output_that_is_removed_while_images_are_described_is_no_success(photos: Path, tmp_path: Path):
    out = tmp_path / "captions" / "all.jsonl"

    def caption(images: list[Image.Image]) -> list[list[Caption]]:
        for file in out.parent.iterdir():
            file.unlink()
        out.parent.rmdir()
        return [[Caption("a dog", 0.5, ())] for _ in images]

    with pytest.raises(FileNotFoundError, match=r"all\.jsonl was removed meanwhile; repeat"):
        caption_folder(photos, out, caption)


def _hold(path: Path, held: multiprocessing.synchronize.Event) -> None:
    with only_writer(path):
        held.set()
        time.sleep(60)


@pytest.fixture
def holder() -> Iterator[Callable[[Path], multiprocessing.Process]]:
    """Start a process that writes somewhere."""
    context = multiprocessing.get_context("fork")
    processes = []

    def start(path: Path) -> multiprocessing.Process:
        held = context.Event()
        process = context.Process(target=_hold, args=(path, held))
        process.start()
        processes.append(process)
        assert held.wait(30)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize(
    "command",
    [
        ["train", "tokenizer", *TINY, "--out", "OUT"],
        ["tokenize", "--data", "shapes", "--checkpoint", "CHECKPOINT/tokenizer", "--out", "OUT"],
        ["caption", "PHOTOS", "--checkpoint", "CHECKPOINT", "--out", "OUT"],
        ["index", "PHOTOS", "--checkpoint", "CHECKPOINT", "--out", "OUT"],
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_a_second_run_in_one_folder_is_refused_until_the_first_is_gone(
    command: list[str], holder, tiny_checkpoint: Path, photos: Path, tmp_path: Path, capsys
):
    out = tmp_path / "out"
    places = {"OUT": str(out), "CHECKPOINT": str(tiny_checkpoint), "PHOTOS": str(photos)}
    for name, place in places.items():
        command = [part.replace(name, place) for part in command]
    first = holder(out)
    assert ended(*command) == 2
    assert f"error: another process writes {out}; wait until it has ended" in capsys.readouterr().err

    first.kill()  # as the system does when memory is short: nothing is cleaned up
    first.join()
    with only_writer(out):
        pass
    assert not list(tmp_path.glob(".*.lock"))


def test_the_next_writer_deletes_what_a_killed_one_had_begun(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    for out, file in ((tmp_path / "run", tmp_path / "run" / "weights"), (tmp_path / "a.csv",) * 2):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / ".hidden").touch()
        process = context.Process(target=_write_for_ever, args=(file,))
        process.start()
        while not list(file.parent.glob(f".{file.name}.*")):
            time.sleep(0.01)
        process.kill()
        process.join()
        assert list(file.parent.glob(f".{file.name}.*")) and not file.exists()
        with only_writer(out):
            pass
        assert not list(file.parent.glob(f".{file.name}.*")) and (tmp_path / "run" / ".hidden").exists()


def _write_for_ever(file: Path) -> None:
    with atomic_write(file):
        time.sleep(60)


@pytest.mark.slow
def test_sigterm_ends_tokenising_as_ctrl_c_does(tiny_checkpoint: Path, tmp_path: Path):
    out = tmp_path / "tokens"
    command = [
        sys.executable,
        "-m",
        "tavq",
        "tokenize",
        "--data",
        "shapes",
        "--checkpoint",
        str(tiny_checkpoint / "tokenizer"),
    ]
    with subprocess.Popen(
        [*command, "--crops", "200", "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        while process.poll() is None and not list(tmp_path.glob("tokens.unfinished/plan.json")):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert error.splitlines()[-1] == "stopped" and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_sigterm_ends_a_command_even_if_a_library_raises_an_error_in_its_place(capsys):
    @run_main
    def main(argv=None):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except SystemExit:  # as torch does while it asks a tensor for its length
            raise TypeError("could not determine the shape") from None

    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines() == ["stopped"]


def test_a_thread_that_the_disk_fails_adds_no_traceback_to_the_line_of_the_command(capfd):
    def write() -> None:
        raise FileNotFoundError("events")

    @run_main
    def main(argv=None):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        raise FileNotFoundError("events")

    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2 and capfd.readouterr().err.splitlines() == ["error: events"]


@pytest.mark.slow
def test_prompts_of_a_file_go_on_where_they_were_killed(tiny_checkpoint: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a red dog\na cat\na red dog\nwater\n")
    flags = ["--prompts-file", str(tmp_path / "prompts.txt"), "--checkpoint", str(tiny_checkpoint)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        assert ended("generate", *flags, "--out", str(out)) == 0
    lines = (whole / "result.jsonl").read_text().splitlines(keepends=True)
    (killed / "000003.png").unlink()  # the third image was there, and its line half written
    (killed / "result.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    kept = (killed / "000002.png").stat().st_mtime_ns

    assert ended("generate", *flags, "--out", str(killed)) == 0
    rows = [
        [json.loads(line) for line in (o / "result.jsonl").read_text().splitlines()] for o in (whole, killed)
    ]
    assert rows[0] == rows[1]
    assert (killed / "000002.png").stat().st_mtime_ns == kept
    for file in whole.glob("*.png"):
        assert file.read_bytes() == (killed / file.name).read_bytes()
    assert visible(killed) == visible(whole)

    assert ended("generate", *flags, "--seed", "7", "--out", str(killed)) == 0
    assert len((killed / "result.jsonl").read_text().splitlines()) == 8, "other images are generated"


def test_a_bar_that_a_signal_ended_before_it_was_made_says_nothing():
    Progress.__new__(Progress).close()


def test_sigterm_is_not_lost_where_python_drops_exceptions(capsys):
    class Dying:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    @run_main
    def main(argv=None):
        Dying()
        time.sleep(30)

    began = time.monotonic()
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 128 + signal.SIGTERM and time.monotonic() - began < 10
    assert capsys.readouterr().err.splitlines() == ["stopped"]


def test_a_journal_that_is_removed_while_it_grows_is_no_success(tmp_path: Path):
    journal = tmp_path / "rows.jsonl"
    for _ in range(2):  # the repeated command begins anew
        assert read_journal(journal) == []
        append_row(journal, {"id": 1})
        journal.unlink()
        with pytest.raises(FileNotFoundError, match=r"rows\.jsonl was removed meanwhile; repeat the command"):
            append_row(journal, {"id": 2})
        assert not journal.exists()
