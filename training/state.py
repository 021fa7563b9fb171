"""The state that a run resumes from: tensors in safetensors, numbers in JSON, a hash of each. No pickle.

A state is a directory. It is written beside the old one, read back and verified, and only then takes its
place, so that a kill or a full disk at any moment leaves one good state.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from tavq.base.files import file_sha256

FORMAT = 2  # 1 was accelerate's, which holds pickles
MANIFEST = "manifest.json"
VALUES = "values.json"

Tensors = dict[str, dict[str, Tensor]]
"""Name of a part, such as "model" -> its tensors by name."""


def save_state(folder: Path, tensors: Tensors, values: dict[str, Any]) -> None:
    """Write a state and put it in the place of the one before.

    Args:
        folder: becomes the state; `folder.new` and `folder.old` are used meanwhile.
        tensors: one safetensors file each.
        values: everything else, as JSON can hold it; floats come back bit for bit.

    Raises:
        FileNotFoundError: the folder of the run was removed.
        OSError: the disk is full or broken; the state before is untouched.
    """
    new = folder.with_name(folder.name + ".new")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    if not folder.parent.is_dir():  # a new one would hold a state without the log of the steps before it
        raise FileNotFoundError(
            f"{folder.parent} was removed while training; repeat the command to begin anew"
        )
    new.mkdir()

    for part, named in tensors.items():
        # A copy of its own for each: safetensors refuses tensors that share memory.
        save_file({name: t.detach().cpu().clone() for name, t in named.items()}, new / f"{part}.safetensors")
    (new / VALUES).write_text(json.dumps(values))
    hashes = {file.name: _synced_hash(file) for file in sorted(new.iterdir())}
    (new / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": hashes}, indent=2) + "\n")
    _synced_hash(new / MANIFEST)

    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def find_state(folder: Path) -> Path | None:
    """The state to resume from: `folder`, or the one before where a kill fell between two renames."""
    candidates = (folder, folder.with_name(folder.name + ".old"))
    return next((path for path in candidates if path.is_dir()), None)


def load_state(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read what `save_state` wrote, after comparing every file with its hash.

    Raises:
        ValueError: another format, a file is missing, or a file is not as it was written.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(
            f"{folder} is no state of this version: it has no {MANIFEST}; states of before 0.2 held pickles, "
            "which can run code, and are not read any more. Start from the run's weights with --start, in "
            "another folder"
        )
    try:
        described = json.loads(manifest.read_text())
    except ValueError as error:
        raise ValueError(
            f"{manifest} is damaged; delete {folder} and start from the run's weights with --start"
        ) from error
    if described.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has state format {described.get('format')}, this version reads {FORMAT}; resume it "
            "with the version that wrote it, or start from its weights with --start"
        )

    for name, expected in described["sha256"].items():
        file = folder / name
        if Path(name).name != name or not file.is_file() or file_sha256(file) != expected:
            raise ValueError(
                f"{file} is missing or damaged; delete {folder} and start from the run's weights with --start"
            )
    try:
        tensors = {
            Path(name).stem: load_file(folder / name) for name in described["sha256"] if name != VALUES
        }
    except SafetensorError as error:
        raise ValueError(f"{folder} cannot be read ({error}); delete it and use --start") from error
    return tensors, json.loads((folder / VALUES).read_text())


def split_optimizer_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an optimizer's state dict by "parameter|moment", and all that JSON can hold."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, moments in state.get("state", {}).items():
        for name, value in moments.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}|{name}"] = value
            else:
                values.setdefault(parameter, {})[name] = value
    return tensors, {"state": values, "param_groups": state.get("param_groups", [])}


def join_optimizer_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split_optimizer_state`."""
    state: dict[str, dict[str, Any]] = {name: dict(moments) for name, moments in values["state"].items()}
    for key, value in tensors.items():
        parameter, name = key.rsplit("|", 1)
        state.setdefault(parameter, {})[name] = value
    return {"state": state, "param_groups": values["param_groups"]}


def forget_other_moments(module: nn.Module, optimizer: Optimizer, known: Collection[str]) -> None:
    """Drop the moments of the parameters that are not `known` by name.

    `set_optimizer_state_dict` gives some to all, with a step counted: a parameter whose first gradient comes
    after a stop would learn otherwise than without the stop.
    """
    for name, parameter in module.named_parameters():
        if name not in known:
            optimizer.state.pop(parameter, None)


def _synced_hash(file: Path) -> str:
    """The hash of a file, once its bytes are on the disk and not only in memory."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
    return file_sha256(file)
