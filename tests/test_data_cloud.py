"""Shards in S3, against moto's server; s3fs finds it by environment variables, as it finds any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tavq import cli
from tavq.data.layouts import open_dataset
from tavq.data.tokens import open_tokens

from .test_data_shards import put_shard

pytestmark = pytest.mark.slow

NAMES = ("train-000.tar", "train-001.tar", "val-000.tar")
PATTERN = "{train-000,train-001,val-000}.tar"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    for name, keys, colour in zip(NAMES, ("ab", "bc", "d"), (10, 20, 30), strict=True):
        put_shard(folder / name, keys, colour)
    return folder


@pytest.fixture
def bucket(photos, monkeypatch) -> Iterator[str]:
    """A bucket of a server that speaks S3, with the photos; the client finds it as users' clients do."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # it keeps the address of an earlier server
    system = fsspec.filesystem("s3")
    system.makedirs("photos-of-anna", exist_ok=True)
    for name in NAMES:
        system.put_file(str(photos / name), f"photos-of-anna/train/{name}")
    yield "s3://photos-of-anna/train"
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def assert_tokenized_alike(remote: str, local: Path, checkpoint: Path, out: Path) -> None:
    flags = ["--checkpoint", str(checkpoint / "tokenizer"), "--crops", "0"]
    for data, folder in ((remote, "remote"), (str(local), "local")):
        cli.main(["tokenize", "--data", data, "--out", str(out / folder), *flags])
    shards = [(out / folder / "train-000000.tar").read_bytes() for folder in ("remote", "local")]
    assert shards[0] == shards[1]
    assert len(open_tokens(out / "remote", "train")) == 4 and len(open_tokens(out / "remote", "val")) == 1


def test_shards_in_s3_are_tokenized_like_local_ones(bucket, photos, tiny_checkpoint, tmp_path):
    assert_tokenized_alike(f"{bucket}/{PATTERN}", photos, tiny_checkpoint, tmp_path)


def test_images_in_s3_are_read_in_ranges_and_a_new_shard_is_listed_anew(bucket, photos):
    remote, local = open_dataset(f"{bucket}/train-000.tar", "train"), open_dataset(photos, "train")
    assert list(remote.ids) == ["a", "b"]
    for index in range(2):
        assert np.array_equal(np.asarray(remote.load_image(index)), np.asarray(local.load_image(index)))
    image = remote[0].image
    assert len(image.shard.read_range(image.offset, image.size)) == image.size < 1000

    put_shard(photos / "train-000.tar", "abcdefghij", 10)
    fsspec.filesystem("s3").put_file(str(photos / "train-000.tar"), "photos-of-anna/train/train-000.tar")
    assert len(open_dataset(f"{bucket}/train-000.tar", "train")) == 10


def test_what_is_not_in_s3_or_may_not_be_read_is_named_in_one_line(bucket, monkeypatch):
    for data in (f"{bucket}/none.tar", "s3://no-such-bucket/train-000.tar"):
        with pytest.raises(FileNotFoundError, match=f"no file {data}; check the address"):
            open_dataset(data)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(OSError, match=r"train-000\.tar cannot be read: EndpointConnectionError"):
        open_dataset(f"{bucket}/train-000.tar")
