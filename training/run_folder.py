"""The folder of a training run: its configuration, its log, and the request to stop."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from tavq.base.arguments import load_yaml, to_plain
from tavq.base.files import atomic_write

MAY_CHANGE = {
    "steps", "checkpoint_minutes", "log_every", "num_workers", "patience", "min_usage", "keep_evaluated",
    "batch_size", "accumulation_steps",  # of which the loop checks the product with the number of processes
}  # fmt: skip


class RunLog:
    """`log.jsonl` and TensorBoard of one run.

    Lines after the step that is resumed from are dropped, and so is an evaluation that is made again.
    """

    def __init__(self, directory: Path, resumed_step: int, evaluated_step: int):
        self.path = directory / "log.jsonl"
        self.lines = []
        for line in read_log(self.path):
            is_evaluation = any(name.startswith("val/") for name in line)
            if line["step"] <= (evaluated_step if is_evaluation else resumed_step):
                self.lines.append(line)
        with atomic_write(self.path) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        line = {"step": step, **values}
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a `log.jsonl`; a half-written last line of a killed run is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def claim_folder(folder: Path, resolved: Any, is_main: bool) -> None:
    """Write the resolved configuration, or check that the run in `folder` has the same one."""
    path, values = folder / "config.yaml", to_plain(resolved)
    text = yaml.safe_dump(values, sort_keys=False)
    if path.exists():
        try:
            before = load_yaml(type(resolved), path)  # a field that is newer than the run has its default
        except ValueError as error:
            raise ValueError(
                f"the run in {folder.parent} was begun by another version, with other settings ({error}); "
                "finish it with that version, or begin anew with another --out"
            ) from error
        changed = _differences(to_plain(before), values)
        if changed:
            raise ValueError(
                f"{folder.parent} holds a run with another {', '.join(changed)}; "
                "take another folder, or repeat the command of that run"
            )
    elif is_main:
        print(text, flush=True)
    if is_main:
        with atomic_write(path) as temporary:
            temporary.write_text(text)


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            d for key in keys for d in _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if old == new or name.rsplit(".", 1)[-1] in MAY_CHANGE else [name]


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request to save and stop; a second one interrupts at once."""

    def __enter__(self) -> StopRequest:
        self.requested, self.exit_code = False, 0
        self.before = {
            int(number): signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _request(self, number: int, frame: Any) -> None:
        self.requested, self.exit_code = True, 128 + number  # as shells report a signal
        signal.signal(number, self.before[number])

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
