"""Shards of images by name: one file, a pattern, a URL; equal keys in two of them."""

from __future__ import annotations

import http.server
import io
import re
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from tavq import cli
from tavq.data import layouts_shards
from tavq.data.layouts import open_dataset
from tavq.data.tokens import open_tokens


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path / "cache"))


def put_shard(path: Path, keys: str, colour: int) -> None:
    """Write a shard with an image of one colour and a caption for each letter of `keys`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key in keys:
            image = io.BytesIO()
            Image.new("RGB", (16, 16), (colour, 0, 0)).save(image, "PNG")
            for extension, content in (
                ("png", image.getvalue()),
                ("txt", f"Image {key} of {colour}.".encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two training shards that share the key b, and one of validation."""
    folder = tmp_path / "photos"
    put_shard(folder / "train-000.tar", "ab", 10)
    put_shard(folder / "train-001.tar", "bc", 20)
    put_shard(folder / "val-000.tar", "d", 30)
    return folder


def red(dataset) -> list[int]:
    return [dataset.load_image(index).getpixel((0, 0))[0] for index in range(len(dataset))]


def test_equal_keys_of_two_shards_are_told_apart_by_the_name_of_the_shard(photos):
    dataset = open_dataset(photos, "train")
    assert list(dataset.ids) == ["a", "train-000/b", "train-001/b", "c"]
    assert red(dataset) == [10, 10, 20, 20]
    assert dataset[2].captions == ("Image b of 20.",)
    assert list(open_dataset(photos, "val").ids) == ["d"]


@pytest.mark.parametrize(
    ("pattern", "split", "reds"),
    [
        ("train-000.tar", "train", [10, 10]),
        ("train-{000..001}.tar", "train", [10, 10, 20, 20]),
        ("{train-001,val-000}.tar", None, [20, 20, 30]),
    ],
)
def test_one_shard_or_a_pattern_is_opened(photos, pattern, split, reds):
    dataset = open_dataset(f"{photos}/{pattern}", split)
    assert red(dataset) == reds and dataset.name == "photos"


def test_a_folder_whose_name_has_braces_is_just_a_folder(photos):
    odd = photos.rename(photos.with_name("{a..b}"))
    assert red(open_dataset(odd, "val")) == [30]


def test_a_missing_shard_and_too_many_are_named(photos, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"names 3 shards, no file .*train-002\.tar"):
        open_dataset(f"{photos}/train-{{000..002}}.tar")
    monkeypatch.setattr(layouts_shards, "MAX_SHARDS", 100)
    with pytest.raises(ValueError, match=r"names more than 100 shards"):
        open_dataset(f"{photos}/train-{{000..999999999}}.tar")
    with pytest.raises(ValueError, match=r"names more than 100 shards"):
        open_dataset(f"{photos}/{{00..99}}-{{00..99}}.tar")


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files, whole or the range that is asked for, and keeps what it served."""

    served: ClassVar[list[tuple[str, str]]] = []
    whole_only = False

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.served.append((path.name, self.headers.get("Range", "all")))
        if asked and not self.whole_only:
            start, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            content = content[start:end]
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(photos, monkeypatch) -> Iterator[str]:
    """An HTTP server on the loopback address with the photos."""
    monkeypatch.setattr(RangeHandler, "served", [])
    handler = lambda *arguments: RangeHandler(*arguments, directory=str(photos))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_remote_shards_are_read_in_parts_and_listed_once(server, photos):
    dataset = open_dataset(f"{server}/train-{{000..001}}.tar", "train")
    local = open_dataset(photos, "train")
    assert list(dataset.ids) == list(local.ids)
    assert [e.captions for e in dataset.examples] == [e.captions for e in local.examples]

    RangeHandler.served.clear()
    for index in range(4):
        assert np.array_equal(np.asarray(dataset.load_image(index)), np.asarray(local.load_image(index)))
    assert len(RangeHandler.served) == 4 and all(part.startswith("bytes=") for _, part in RangeHandler.served)

    RangeHandler.served.clear()
    assert list(open_dataset(f"{server}/train-{{000..001}}.tar", "train").ids) == list(local.ids)
    assert RangeHandler.served == [], "the listing is in the cache"


def test_a_remote_shard_that_changed_is_listed_again(server, photos):
    assert len(open_dataset(f"{server}/train-000.tar", "train")) == 2
    put_shard(photos / "train-000.tar", "abcdefghijklmnop", 10)
    assert len(open_dataset(f"{server}/train-000.tar", "train")) == 16


def test_a_remote_dataset_is_tokenized_like_the_local_one(server, photos, tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", str(tiny_checkpoint / "tokenizer"), "--crops", "0"]
    for data, out in ((f"{server}/{{train-000,train-001,val-000}}.tar", "remote"), (str(photos), "local")):
        cli.main(["tokenize", "--data", data, "--out", str(tmp_path / out), *flags])
    shards = [(tmp_path / out / "train-000000.tar").read_bytes() for out in ("remote", "local")]
    assert shards[0] == shards[1] and len(open_tokens(tmp_path / "remote", "val")) == 1


def test_a_server_that_sends_whole_files_instead_of_parts_is_named(server, monkeypatch):
    dataset = open_dataset(f"{server}/train-000.tar", "train")
    monkeypatch.setattr(RangeHandler, "whole_only", True)
    with pytest.raises(OSError, match=r"train-000\.tar: the server sends whole files"):
        dataset.load_image(0)


def test_a_remote_file_that_is_missing_is_named(server):
    with pytest.raises(FileNotFoundError, match=r"no file http://127.0.0.1:\d+/none\.tar"):
        open_dataset(f"{server}/none.tar")
    with pytest.raises(ValueError, match=r"names no \.tar file"):
        open_dataset(f"{server}/photos")


@pytest.mark.parametrize(
    "address",
    [
        "ftp://127.0.0.1/a.tar",
        "file:///etc/passwd",
        "local:///a.tar",
        "simplecache::http://127.0.0.1/a.tar",
        "http://127.0.0.1/a::file:///b.tar",
        "pipe://touch exploded/a.tar",
    ],
)
def test_addresses_of_other_schemes_are_refused(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"is no address that is opened; expected one that begins with https://"
    ):
        open_dataset(address)


def test_a_pipe_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("pipe:touch exploded.tar", "pipe:touch {exploded,other}.tar"):
        with pytest.raises(FileNotFoundError):
            open_dataset(path)
    assert not list(tmp_path.glob("*exploded*"))
