"""Token sets: what is written is read again, and a damaged or foreign shard is refused by name."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
import time

import numpy as np
import pytest
import torch

from tavq.base.arrays import DiskArray
from tavq.data import token_index
from tavq.data.token_writer import write_tokens
from tavq.data.tokens import META_FILE, AllTexts, TokenMeta, TokenRecord, open_tokens, read_meta

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
        assert tuple(tokens.names) == tuple(r.id for r in expected)
        assert tuple(tokens.captions) == tuple(r.captions for r in expected)
        assert tuple(tokens.long_texts) == tuple(r.long_text for r in expected)
        assert tokens.ids[0].dtype == torch.int32
        assert torch.equal(tokens.ids[:], torch.from_numpy(np.stack([r.ids for r in expected])).int())


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


class TestIndex:
    """What is kept of a token set, so that it is not checked at each start."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TAVQ_CACHE", str(tmp_path / "cache"))

    @pytest.fixture
    def settled_dir(self, tokens_dir):
        """The token set as if it had been written a minute ago."""
        self.age(tokens_dir, 60)
        return tokens_dir

    @staticmethod
    def age(directory, seconds):
        for shard in directory.glob("*.tar"):
            os.utime(shard, (time.time() - seconds,) * 2)

    def test_it_is_kept_outside_the_folder_and_the_shards_are_not_checked_again(
        self, settled_dir, monkeypatch
    ):
        there = sorted(settled_dir.iterdir())
        first = open_tokens(settled_dir, "train")
        assert isinstance(first.rows, DiskArray) and sorted(settled_dir.iterdir()) == there
        monkeypatch.setattr(token_index, "_samples", None)
        again = open_tokens(settled_dir, "train")
        assert list(again.captions) == list(first.captions) == [record(n).captions for n in range(2)]
        assert torch.equal(again.ids[:], first.ids[:])

    def test_shards_that_changed_are_checked_again(self, settled_dir):
        assert len(open_tokens(settled_dir, "train")) == 2
        put_members(settled_dir / "train-000000.tar", GOOD)
        self.age(settled_dir, 30)
        assert len(open_tokens(settled_dir, "train")) == 1
        put_members(settled_dir / "train-000000.tar", GOOD | {"00000000.json": b"{"})
        self.age(settled_dir, 20)
        with pytest.raises(ValueError, match="no valid json"):
            open_tokens(settled_dir, "train")

    def test_that_of_shards_written_a_moment_ago_is_not_kept(self, tokens_dir, tmp_path):
        assert not isinstance(open_tokens(tokens_dir, "train").rows, DiskArray)
        assert not (tmp_path / "cache").exists()

    def test_ids_that_change_while_the_set_is_open_are_refused(self, settled_dir):
        tokens = open_tokens(settled_dir, "train")
        shard = settled_dir / "train-000000.tar"
        content = bytearray(shard.read_bytes())
        content[int(tokens.rows[0][1]) + 128] = 99  # the first id behind the header
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=r"outside 0\.\.7"):
            tokens.ids[0]


def test_texts_of_several_sets_are_numbered_one_after_the_other(tokens_dir, tmp_path):
    write_tokens(tmp_path / "more", [record(2), record(3)], META)
    sets = [open_tokens(folder, "train") for folder in (tokens_dir, tmp_path / "more")]
    sets[1] = dataclasses.replace(sets[1], with_long_texts=True)
    texts = AllTexts(*sets)
    long_texts = [(), (), (), ("A long text about 3.",)]
    expected = [text for n in range(4) for text in (*record(n).captions, *long_texts[n])]
    assert list(texts) == [texts[number] for number in range(len(texts))] == expected
    assert [texts[number] for number in sets[0].captions_of(1)] == list(record(1).captions)
    with pytest.raises(IndexError):
        texts[len(texts)]
