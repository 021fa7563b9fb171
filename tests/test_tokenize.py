"""tavq tokenize: a run that is stopped anywhere goes on, and its result has the bytes of one that was not."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from tavq import cli
from tavq.data.tokens import open_tokens
from tavq.tokenizer import encode_dataset as module
from tavq.tokenizer.encode_dataset import encode_dataset
from tavq.tokenizer.run_config import TokenizeRun

from .demo_server import PHOTO

PER_SHARD = 7


class KilledError(Exception):
    """Stands for a signal that ends the process."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty training images, of which one cannot be read, and three of validation; no test split."""
    folder = tmp_path / "photos"
    (folder / "train").mkdir(parents=True)
    (folder / "val").mkdir()
    photo = Image.open(PHOTO).resize((40, 40))
    for number in range(23):
        image = folder / ("train" if number < 20 else "val") / f"{number:02d}.png"
        photo.rotate(15 * number).save(image)
        image.with_suffix(".txt").write_text(f"Photo {number}.")
    (folder / "train" / "04.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def tokenize(photos: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch):
    """Tokenize the photos into a folder, small shards and batches; killed after so many batches."""
    monkeypatch.setattr(module, "IMAGES_AT_ONCE", 4)
    encode_batch = module._encode_batch

    def run(out: str, killed_after: int | None = None, **changes) -> list[list[int]]:
        batches: list[list[int]] = []

        def watched(tokenizer, batch):
            if len(batches) == killed_after:
                raise KilledError
            batches.append([index for index, _ in batch])
            return encode_batch(tokenizer, batch)

        monkeypatch.setattr(module, "_encode_batch", watched)
        values = {"data": str(photos), "checkpoint": str(tiny_checkpoint / "tokenizer")} | changes
        encode_dataset(TokenizeRun(out=tmp_path / out, device="cpu", **values), PER_SHARD)
        return batches

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:photos. skipped 1 of 20")
@pytest.mark.parametrize("batches", range(1, 5))
def test_a_killed_run_goes_on_and_gives_the_same_bytes(tokenize, tmp_path, batches):
    whole = tokenize("whole")
    with pytest.raises(KilledError):
        tokenize("killed", killed_after=batches)
    shards = contents(tmp_path / "killed.unfinished") if (tmp_path / "killed.unfinished").exists() else {}
    reached = list(itertools.accumulate(len(batch) for batch in whole))  # a batch lacks what is unreadable
    images = reached[batches - 1]
    assert sum(name.endswith(".tar") for name in shards) == images // PER_SHARD

    rest = tokenize("killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert set(contents(tmp_path / "killed")) == {
        "meta.json", "train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar"
    }  # fmt: skip
    assert rest == whole[-len(rest) :], "the same images stand in one batch"
    kept = images // PER_SHARD * PER_SHARD
    assert len(rest) == sum(count > kept for count in reached)
    assert not list(tmp_path.glob("*unfinished*")) and not list(tmp_path.glob(".*"))


def test_the_warning_of_the_second_run_names_what_the_first_left_out(tokenize):
    with pytest.raises(KilledError):
        tokenize("out", killed_after=3)
    with pytest.warns(UserWarning, match=r"skipped 1 of 20 images that cannot be read: train/04 "):
        tokenize("out")


@pytest.mark.filterwarnings("ignore:photos. skipped 1 of 20")
def test_a_run_killed_behind_the_last_image_of_a_split_goes_on_with_the_next(tokenize, tmp_path):
    whole = tokenize("whole")
    with pytest.raises(KilledError):
        tokenize("killed", killed_after=len(whole) - 1)
    assert tokenize("killed") == whole[-1:]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:photos. skipped 1 of 20")
@pytest.mark.parametrize("changed", ["data", "crops", "tokenizer"])
def test_shards_of_another_dataset_or_tokenizer_are_refused(
    tokenize, photos, tiny_tokenizer, tmp_path, changed
):
    with pytest.raises(KilledError):
        tokenize("out", killed_after=3)
    there = contents(tmp_path / "out.unfinished")
    changes = {}
    if changed == "data":
        (photos / "train" / "07.txt").write_text("Another caption.")
    elif changed == "crops":
        changes["crops"] = 3
    else:
        config = json.loads((tmp_path / "out.unfinished" / "plan.json").read_text())
        (tmp_path / "out.unfinished" / "plan.json").write_text(json.dumps(config | {"tokenizer": "0"}))
        there = contents(tmp_path / "out.unfinished")
    name = "dataset" if changed == "data" else changed
    with pytest.raises(ValueError, match=rf"out\.unfinished holds 1 shards of a run with another {name} \("):
        tokenize("out", **changes)
    assert contents(tmp_path / "out.unfinished") == there


@pytest.mark.filterwarnings("ignore:photos. skipped 1 of 20")
def test_an_image_that_could_not_be_read_before_is_not_put_in_in_silence(tokenize, photos):
    image, broken = (photos / "train" / f"{number:02d}.png" for number in (5, 4))
    broken.write_bytes(bytes(image.stat().st_size))
    with pytest.raises(KilledError):
        tokenize("out", killed_after=3)
    broken.write_bytes(image.read_bytes())  # of the same size: the fingerprint does not tell
    with pytest.raises(ValueError, match="train/04 could not be read before, and now it can"):
        tokenize("out")


@pytest.mark.filterwarnings("ignore:photos. skipped 1 of 20")
def test_a_finished_set_stays_until_the_next_one_is_there(tokenize, tmp_path):
    tokenize("out")
    before = contents(tmp_path / "out")
    with pytest.raises(KilledError):
        tokenize("out", killed_after=3, crops=0)
    assert contents(tmp_path / "out") == before
    tokenize("out", crops=0)
    assert open_tokens(tmp_path / "out", "train").ids[0].shape[0] == 2
    assert not (tmp_path / "out.unfinished").exists()


def test_official_coco_has_no_test_split_and_is_tokenized(tmp_path, tiny_checkpoint):
    """The layout of the download: captions_train2017.json, captions_val2017.json, train2017/, val2017/."""
    data = tmp_path / "coco"
    (data / "annotations").mkdir(parents=True)
    for number, split in enumerate(("train", "val")):
        folder = data / f"{split}2017"
        folder.mkdir()
        name = f"{number:012d}.jpg"
        Image.open(PHOTO).resize((32, 32)).convert("RGB").save(folder / name)
        content = {
            "info": {"year": 2017},
            "images": [{"id": number, "file_name": name, "height": 32, "width": 32}],
            "annotations": [{"id": 1, "image_id": number, "caption": "A photo of a woman."}],
        }
        (data / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(content))
        (data / "annotations" / f"instances_{split}2017.json").write_text("{}")
    checkpoint = str(tiny_checkpoint / "tokenizer")
    cli.main(["tokenize", "--data", str(data), "--checkpoint", checkpoint, "--out", str(tmp_path / "tokens")])
    assert list(open_tokens(tmp_path / "tokens", "val").names) == ["1"]
