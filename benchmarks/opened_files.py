"""python benchmarks/opened_files.py COMMAND ...

Count the files of this repository that a reader opens to follow a command from the prompt to its result:
those in which at least one function runs. Imports alone do not count, nor do libraries. CONTRIBUTING.md has
a table of the counts. Examples:

python benchmarks/opened_files.py generate "a dog" --out out/
python benchmarks/opened_files.py caption app/examples/cat.jpg
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    files = sorted(str(path.relative_to(ROOT)) for path in opened_files(argv))
    print("\n".join(files))
    print(f"{len(files)} files")


def opened_files(argv: Sequence[str]) -> set[Path]:
    """Run `tavq argv` and return the files of this repository in which a function ran."""
    from tavq.cli import main as run

    codes: set[CodeType] = set()

    def record(frame: FrameType, event: str, argument: Any) -> None:
        # Bodies of modules and classes run while they are imported; they are no part of the way.
        if event == "call" and frame.f_code.co_flags & inspect.CO_NEWLOCALS and not _importing(frame):
            codes.add(frame.f_code)

    threading.setprofile(record)
    sys.setprofile(record)
    try:
        run(list(argv))
    except SystemExit as exit_:
        if exit_.code not in (0, None):
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    paths = {path for code in codes if (path := Path(code.co_filename).resolve()).is_file()}
    libraries = ROOT / ".venv"
    return {path for path in paths if path.is_relative_to(ROOT) and not path.is_relative_to(libraries)} - {
        Path(__file__).resolve()
    }


def _importing(frame: FrameType) -> bool:
    """Whether a module is being imported: decorators and dataclasses run functions then."""
    caller = frame.f_back
    while caller is not None:
        if caller.f_code.co_name == "<module>" and caller.f_code.co_filename.startswith(str(ROOT)):
            return caller.f_globals.get("__name__") != "__main__"
        caller = caller.f_back
    return False


if __name__ == "__main__":
    main()
