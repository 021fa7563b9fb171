"""Command lines from frozen dataclasses: one parser, one way to fail.

A run is described by a frozen dataclass. `parse` turns it into a command line with tyro; fields named
`preset` and `config` in it choose the defaults: a named preset, or a YAML file of the same fields. `run_main`
turns the errors that a user can mend into one line and exit code 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import dacite
import tyro
import yaml

Config = TypeVar("Config")
HELP_FLAGS = {"-h", "--help"}
USER_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    FloatingPointError,
)
AGAIN_S = 0.02  # after which a signal that was lost is sent again
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system answers where nothing more can be written: disk, quota, or largest file."""
FULL_IN_WORDS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "disk is full",
    "disk I/O error",
)
"""The same from libraries that do not raise OSError: safetensors, SQLite."""


@dataclasses.dataclass(frozen=True)
class _Defaults:
    preset: str | None = None
    config: Path | None = None


def parse(
    config_class: type[Config],
    argv: Sequence[str] | None,
    *,
    prog: str,
    presets: Mapping[str, Config] | None = None,
) -> Config:
    """Read `argv` into an instance of `config_class`.

    Args:
        config_class: a frozen dataclass; its docstring is the help text, its fields become `--like-this`
            flags.
        argv: the arguments after the program's name; None takes those of the process.
        prog: the command as the user typed it, for the help text.
        presets: instances to start from, by name; the class then has a field `preset: str` and, for a YAML
            file of the same fields, `config: Path | None`. The first preset is the default one.

    Raises:
        ValueError: unknown flag, preset or key, or a value of the wrong type; the message is one line.
        FileNotFoundError: the YAML file does not exist.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    default: Any = tyro.MISSING_NONPROP
    if presets is not None:
        chosen, _ = _tyro(_Defaults, argv, prog, return_unknown_args=True, add_help=False)
        default = _defaults(config_class, chosen, presets)
    return _tyro(config_class, argv, prog, default=default)


def _defaults(config_class: type[Config], chosen: _Defaults, presets: Mapping[str, Config]) -> Config:
    if chosen.config is not None:
        return load_yaml(config_class, chosen.config)
    name = chosen.preset or next(iter(presets))
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}; choose one of: {', '.join(presets)}")
    return presets[name]


def _tyro(config_class: type, argv: list[str], prog: str, **options: Any) -> Any:
    """Call tyro; fold the box that it draws around an error into the one line that matters."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), _unwrapped(argv):
            return tyro.cli(config_class, args=argv, prog=prog, **options)
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        message = _first_section(stderr.getvalue()).rstrip(".")
        meant = _meant(argv, stderr.getvalue())
    raise ValueError(f"{message}; {f'did you mean {meant}? ' if meant else ''}see {prog} --help")


def _meant(argv: Sequence[str], box: str) -> str:
    """The flag that is nearest to an unknown one, among those that tyro offers; "" if there is none."""
    offered = re.findall(r"^[│\s]+(--[\w.-]+)", box.partition("Perhaps you meant")[2], flags=re.MULTILINE)
    unknown = [word for word in argv if word.startswith("--") and f"{word}" in box.partition("\n")[2]]
    near = [flag for word in unknown for flag in difflib.get_close_matches(word, offered, n=1)]
    return near[0] if near else ""


@contextlib.contextmanager
def _unwrapped(argv: Sequence[str]) -> Iterator[None]:
    """Let tyro write each message on one line, as wrapping breaks words; help is wrapped all the same."""
    if HELP_FLAGS & set(argv):
        yield
        return
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _first_section(box: str) -> str:
    """The text from the title of tyro's box to the next rule; the box is drawn in ASCII where stdout is."""
    lines = [line.strip(" │") for line in box.splitlines()]
    lines = [line for line in lines if line and line[0] not in "╭╰"]
    rules = [number for number, line in enumerate(lines) if set(line) in ({"─"}, {"-"})]
    if rules[:1] == [1] and set(lines[1]) == {"-"}:  # ASCII: title and rule are lines of their own
        lines, rules = lines[2:], [number - 2 for number in rules[1:]]
    end = rules[0] if rules else len(lines)
    message = " ".join(lines[:end]) or "the arguments could not be read"
    message = re.sub(r"^Error parsing (\w+: )?", "", message)  # the name of our dataclass helps nobody
    return message.replace("invalid literal for int() with base 10:", "expected a whole number, got")


def load_yaml(config_class: type[Config], path: Path) -> Config:
    """Load a YAML file of the fields of `config_class`; an unknown key or a wrong type is a ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}; write one, or start from --preset")
    return from_dict(config_class, yaml.safe_load(path.read_text()) or {}, source=str(path))


def from_dict(config_class: type[Config], values: Mapping[str, Any], *, source: str) -> Config:
    """Build `config_class` from plain values (as `dataclasses.asdict` gives them); `source` names them in
    errors."""
    try:
        return dacite.from_dict(config_class, values, dacite.Config(strict=True, cast=[tuple, Path, float]))
    except dacite.DaciteError as error:
        raise ValueError(f"{source}: {error}; the fields are those of {config_class.__name__}") from error


def to_plain(config: Any) -> dict[str, Any]:
    """The dataclass `config` as values that YAML and JSON can hold (paths as strings, tuples as lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


class EntryPoint(Protocol):
    """A `main`: takes the arguments after the program's name, by default those of the process."""

    def __call__(self, argv: Sequence[str] | None = None) -> None: ...


def run_main(main: EntryPoint) -> EntryPoint:
    """Decorate an entry point: a mistake the user can mend becomes `error: ...` and exit code 2.

    `--debug` anywhere among the arguments shows the traceback instead. Where a command that it ran failed,
    it ends with that command's exit code. Warnings are shown as one line each.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> None:
        argv = list(sys.argv[1:] if argv is None else argv)
        debug = "--debug" in argv
        argv = [argument for argument in argv if argument != "--debug"]
        with warnings.catch_warnings(), _quiet_threads(debug), _ended_by_sigterm() as ending:
            warnings.showwarning = _one_line_warning
            try:
                _run(main, argv, ending)
            except USER_ERRORS as error:
                if debug:
                    raise
                sys.exit(_complain(_disk_error(error) or error))
            except ModuleNotFoundError as error:
                if debug:
                    raise
                sys.exit(_complain(f"{error}; install it, or all optional packages: pip install -e '.[all]'"))
            except subprocess.CalledProcessError as error:  # the child has said why
                sys.exit(error.returncode if error.returncode >= 0 else 128 - error.returncode)
            except BrokenPipeError:  # `tavq ... | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)
                sys.exit(130)
            except Exception as error:
                message = _disk_error(error)
                if debug or message is None:
                    raise
                sys.exit(_complain(message))

    return guarded


@contextlib.contextmanager
def _quiet_threads(debug: bool) -> Iterator[None]:
    """Leave out the traceback of a thread that the disk failed: the error of the command itself says so.

    TensorBoard writes in a thread, and raises its error once more where the command hands it the next value.
    """
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if debug or not isinstance(failed.exc_value, OSError):
            before(failed)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@dataclasses.dataclass
class _Ending:
    """Whether SIGTERM asked for the end of a command."""

    exit_code: int | None = None


def _run(main: EntryPoint, argv: Sequence[str], ending: _Ending) -> None:
    try:
        main(argv)
    except Exception:
        # A library that was interrupted by SystemExit may have raised an error of its own in its place.
        if ending.exit_code is not None:
            raise SystemExit(ending.exit_code) from None
        raise


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[_Ending]:
    """End by SIGTERM as by Ctrl-C, so that what was begun is cleaned up. Commands may take over from here."""
    ending = _Ending()
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield ending
        return

    def stop(number: int, frame: Any) -> None:
        if ending.exit_code is None:
            print("stopped", file=sys.stderr)
        ending.exit_code = 128 + number
        raise SystemExit(ending.exit_code)

    def again() -> None:
        if callable(signal.getsignal(signal.SIGTERM)):  # else the command has ended meanwhile
            os.kill(os.getpid(), signal.SIGTERM)

    def hook(swallowed: sys.UnraisableHookArgs) -> None:
        # In a __del__ Python drops every exception. The signal comes again when that has ended.
        if ending.exit_code is not None and isinstance(swallowed.exc_value, SystemExit):
            threading.Timer(AGAIN_S, again).start()
        else:
            hook_before(swallowed)

    hook_before, sys.unraisablehook = sys.unraisablehook, hook
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield ending
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook_before


def _disk_error(error: BaseException) -> str | None:
    """Say what is wrong with the disk, if that is what an error, or one that led to it, is about."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)

    for link in chain:
        number = link.errno if isinstance(link, OSError) else None
        if number in FULL or any(words in str(link) for words in FULL_IN_WORDS):
            where = f" ({link.filename})" if isinstance(link, OSError) and link.filename else ""
            return (
                f"the disk is full or broken{where}; free some space, or name another folder, and repeat the "
                "command: what was finished before stays"
            )
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return None


def print_json(value: Any) -> None:
    """Print a value as one line of JSON, as --json asks for."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def _complain(error: Exception | str) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning | RuntimeWarning):
        print("warning: " + " ".join(str(message).split()), file=sys.stderr)
