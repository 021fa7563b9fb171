"""Token sets: what is written is read again, and a damaged or foreign shard is refused by name."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch

from tavq.data.tokens import META_FILE, TokenMeta, TokenRecord, open_tokens, read_meta, write_tokens

META = TokenMeta(8, (2, 4), "codebook", "tokenizer", "made up", 16)


def record(number: int, split: str = "train") -> TokenRecord:
    ids = (np.arange(16).reshape(2, 2, 4) + number) % 8
    long_text = f"A long text about {number}." if number % 2 else None
    return TokenRecord(f"{split}{number}", split, ids, (f"Caption {number}.", "Another."), long_text)


def put_members(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def text_json(**changes) -> bytes:
    return json.dumps({"id": "a", "captions": ["A dog."], "long_text": None} | changes).encode()


@pytest.fixture
def tokens_dir(tmp_path):
    write_tokens(tmp_path / "tokens", [record(0), record(1)], META)
    return tmp_path / "tokens"


def test_a_new_shard_starts_after_so_many_images_of_a_split_and_none_is_lost(tmp_path):
    records = [record(n, split) for n in range(7) for split in ("train", "val")]
    write_tokens(tmp_path / "tokens", records, META, images_per_shard=3)
    shards = sorted(path.name for path in (tmp_path / "tokens").glob("*.tar"))
    assert shards == [f"{split}-00000{n}.tar" for split in ("train", "val") for n in range(3)]
    assert read_meta(tmp_path / "tokens") == META
    for split in ("train", "val"):
        tokens = open_tokens(tmp_path / "tokens", split)
        expected = [record(n, split) for n in range(7)]
        assert tokens.names == tuple(r.id for r in expected)
        assert tokens.captions == tuple(r.captions for r in expected)
        assert tokens.long_texts == tuple(r.long_text for r in expected)
        assert tokens.ids.dtype == torch.int32
        assert torch.equal(tokens.ids, torch.from_numpy(np.stack([r.ids for r in expected])).int())


def test_an_exactly_full_shard_is_followed_by_none(tmp_path):
    write_tokens(tmp_path / "tokens", [record(n) for n in range(6)], META, images_per_shard=3)
    assert len(list((tmp_path / "tokens").glob("*.tar"))) == 2
    assert len(open_tokens(tmp_path / "tokens", "train")) == 6


GOOD = {"00000000.json": text_json(), "00000000.npy": npy(np.zeros((1, 2, 4), np.int32))}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"00000000.json": b"{"}, "no valid json"),
        ({"00000000.json": b"[" * 100_000}, "no valid json"),
        ({"00000000.json": b"[]"}, "json holds a list"),
        ({"00000000.json": text_json(captions="A dog.")}, 'wrong value type for field "captions"'),
        ({"00000000.npy": b"no npy"}, "no valid npy file"),
        ({"00000000.npy": GOOD["00000000.npy"][:-4]}, "cut short"),
        ({"00000000.npy": npy(np.zeros((1, 4, 2), np.int32))}, r"of shape \(1, 4, 2\), expected integers"),
        ({"00000000.npy": npy(np.zeros((1, 2, 4), np.float32))}, "ids are float32"),
        ({"00000000.npy": npy(np.full((1, 2, 4), 8))}, r"outside 0\.\.7"),
        ({"00000000.npy": npy(np.full((1, 2, 4), -1))}, r"outside 0\.\.7"),
        ({"00000001.json": text_json()}, "00000001 has json, expected json and npy"),
        ({"00000001.json": text_json(), "00000001.npy": npy(np.zeros((2, 2, 4), int))}, r"\[1, 2\] variants"),
        ({"README": b"hello"}, "holds README, expected .json and .npy files alone"),
    ],
)
def test_a_damaged_sample_is_refused_by_name(tokens_dir, members, message):
    put_members(tokens_dir / "train-000000.tar", GOOD)
    assert len(open_tokens(tokens_dir, "train")) == 1
    put_members(tokens_dir / "train-000000.tar", GOOD | members)
    with pytest.raises(ValueError, match=message):
        open_tokens(tokens_dir, "train")


def test_a_header_that_asks_for_a_petabyte_reserves_no_memory(tokens_dir):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<i4", "fortran_order": False, "shape": (10**12, 2, 4)}
    )
    put_members(tokens_dir / "train-000000.tar", GOOD | {"00000000.npy": file.getvalue()})
    with pytest.raises(ValueError, match="cut short"):
        open_tokens(tokens_dir, "train")


def test_a_link_in_a_shard_is_refused(tokens_dir):
    with tarfile.open(tokens_dir / "train-000000.tar", "w") as archive:
        link = tarfile.TarInfo("00000000.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(ValueError, match=r"train-000000\.tar holds 00000000\.json"):
        open_tokens(tokens_dir, "train")


@pytest.mark.parametrize("lost", [600, 512 * 20, 512 * 22])
def test_a_shard_that_was_cut_short_is_refused(tokens_dir, lost):
    shard = tokens_dir / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-lost] if lost != 600 else shard.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"train-000000\.tar (has no end mark|cannot be read as tar)"):
        open_tokens(tokens_dir, "train")


def test_a_compressed_shard_is_refused(tokens_dir):
    shard = tokens_dir / "train-000000.tar"
    with tarfile.open(shard, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("00000000.json"))
    with pytest.raises(ValueError, match=r"cannot be read as tar .* uncompressed"):
        open_tokens(tokens_dir, "train")


def test_a_missing_set_or_split_and_a_foreign_meta_file_are_named(tokens_dir):
    with pytest.raises(FileNotFoundError, match="no token set in"):
        open_tokens(tokens_dir / "other", "train")
    with pytest.raises(FileNotFoundError, match="no split 'test'; it has train"):
        open_tokens(tokens_dir, "test")
    (tokens_dir / META_FILE).write_text('{"num_codes": 8}')
    with pytest.raises(ValueError, match=r"meta\.json: missing value"):
        open_tokens(tokens_dir, "train")
    with pytest.raises(FileExistsError, match="holds no token set"):
        write_tokens(tokens_dir.parent, [record(0)], META)
