"""Files from strangers are data, never code: a hostile file ends a command with exit code 2 and one line."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tavq.commands.train_generator import main as train_generator
from tavq.data.tokens import TokenMeta, TokenRecord, open_tokens, write_tokens


class Bomb:
    """Unpickling this makes the file `exploded`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def refused(main, *arguments: object) -> str:
    """Run a command that must refuse its input; return the one line that it says."""
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr("sys.stderr", stderr)
        main([str(argument) for argument in arguments])
    lines = [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]
    assert exit_.value.code == 2 and len(lines) == 1 and "Traceback" not in stderr.getvalue()
    return lines[0]


def put_tokens(directory: Path) -> Path:
    records = [TokenRecord(s, s, np.zeros((1, 2, 4), int), ("A dog.",)) for s in ("train", "val")]
    write_tokens(directory, records, TokenMeta(8, (2, 4), "codebook", "tokenizer", "made up", 16))
    return directory


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth"])
def test_a_pickle_in_a_token_shard_is_refused_by_name_and_never_runs(tmp_path, extension):
    tokens, exploded = put_tokens(tmp_path / "tokens"), tmp_path / "exploded"
    content = pickle.dumps(Bomb(exploded))
    with tarfile.open(tokens / "train-000000.tar", "a") as archive:
        member = tarfile.TarInfo(f"00000000.{extension}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    line = refused(train_generator, "--preset", "tiny", "--tokens", tokens, "--out", tmp_path / "out")
    assert f"train-000000.tar holds 00000000.{extension}, expected .json and .npy files alone" in line
    assert not exploded.exists()


def test_pickled_objects_in_an_npy_file_are_refused_and_never_run(tmp_path):
    tokens, exploded = put_tokens(tmp_path / "tokens"), tmp_path / "exploded"
    file = io.BytesIO()
    objects = np.full((1, 2, 4), None)
    objects[0, 0, 0] = Bomb(exploded)
    np.save(file, objects, allow_pickle=True)
    with tarfile.open(tokens / "train-000000.tar", "w") as archive:
        for name, content in {"0.json": b'{"id": "a", "captions": ["A"]}', "0.npy": file.getvalue()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    line = refused(train_generator, "--preset", "tiny", "--tokens", tokens, "--out", tmp_path / "out")
    assert "train-000000.tar, sample 0: ids are object" in line
    assert not exploded.exists()


def test_a_token_folder_whose_name_is_a_shell_command_is_just_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens = put_tokens(Path("pipe:touch exploded;#"))
    assert open_tokens(tokens, "train").names == ("train",)
    assert os.listdir() == [str(tokens)]
    line = refused(train_generator, "--preset", "tiny", "--tokens", "pipe:touch exploded;#no", "--out", "out")
    assert "no token set in pipe:touch exploded;#no" in line
    assert os.listdir() == [str(tokens)]
