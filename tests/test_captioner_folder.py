"""Folder captioning: every kind of output, and resuming without a lost or doubled line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from tavq.captioner.caption_folder import caption_folder
from tavq.captioner.decoding import Caption, Word


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for i in range(7):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / ("deeper" if i > 4 else ".") / f"{i}.png")
    return folder


class Describer:
    """Names the red level of each image; stops before image `stop_at`, as a killed process would."""

    def __init__(self, stop_at: int | None = None):
        self.seen: list[int] = []
        self.stop_at = stop_at

    def __call__(self, images: list[Image.Image]) -> list[list[Caption]]:
        levels = [image.getpixel((0, 0))[0] for image in images]
        if self.stop_at in levels:
            raise KeyboardInterrupt
        self.seen += levels
        return [
            [Caption(f"red, {level}", -0.5, (Word("red", 0.9),)), Caption("b", -1.0, ())] for level in levels
        ]


def rows_of(out: Path) -> dict[str, str]:
    """image -> caption; fails when an image occurs twice."""
    if out.suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    elif out.suffix == ".json":
        rows = json.loads(out.read_text())
    elif out.suffix == ".csv":
        rows = list(csv.DictReader(out.open(newline="")))
    else:
        files = sorted(out.rglob("*.txt"))
        rows = [
            {"image": str(f.relative_to(out).with_suffix(".png")), "caption": f.read_text().strip()}
            for f in files
        ]
    assert len({row["image"] for row in rows}) == len(rows)
    return {row["image"]: row["caption"] for row in rows}


EXPECTED = {f"deeper/{i}.png" if i > 4 else f"{i}.png": f"red, {i}" for i in range(7)}


@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.csv", "texts"])
def test_stopped_and_resumed(photos: Path, tmp_path: Path, name: str):
    out, first, second = tmp_path / name, Describer(stop_at=4), Describer()
    with pytest.raises(KeyboardInterrupt):
        caption_folder(photos, out, first, batch_size=2)
    assert caption_folder(photos, out, second, batch_size=2) == 3
    assert first.seen == [0, 1, 2, 3] and second.seen == [4, 5, 6]
    assert rows_of(out) == EXPECTED
    third = Describer()
    assert caption_folder(photos, out, third) == 0 and third.seen == []
    assert rows_of(out) == EXPECTED
    assert not list(tmp_path.glob("*unfinished*"))


def test_each_image_is_shrunk_as_it_is_read(photos: Path, tmp_path: Path):
    Image.new("RGB", (640, 480), (7, 0, 0)).save(photos / "large.png")
    sizes = []

    def describe(images: list[Image.Image]) -> list[list[Caption]]:
        sizes.extend(image.size for image in images)
        return [[Caption("red", -0.5, ())] for _ in images]

    assert caption_folder(photos, tmp_path / "out.jsonl", describe, size_px=32) == 8
    assert sizes == [(32, 32)] * 8


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_new_images_are_added(photos: Path, tmp_path: Path, name: str):
    caption_folder(photos, tmp_path / name, Describer())
    Image.new("RGB", (16, 16), (9, 0, 0)).save(photos / "9.png")
    assert caption_folder(photos, tmp_path / name, Describer()) == 1
    assert rows_of(tmp_path / name) == EXPECTED | {"9.png": "red, 9"}


def test_half_written_last_line_is_dropped(photos: Path, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    caption_folder(photos, out, Describer())
    for cut in (10, 40):
        whole = out.read_bytes()
        out.write_bytes(whole[:-cut])
        assert caption_folder(photos, out, Describer()) == 1
        assert rows_of(out) == EXPECTED
    out.write_bytes(out.read_bytes()[:20])
    assert caption_folder(photos, out, Describer()) == 7
    assert rows_of(out) == EXPECTED


@pytest.mark.parametrize("name", ["out.json", "out.csv", "texts"])
def test_a_kill_between_output_and_journal_doubles_nothing(photos: Path, tmp_path: Path, name: str):
    out, journal = tmp_path / name, tmp_path / f"{name}.unfinished.jsonl"
    caption_folder(photos, tmp_path / "rows.jsonl", Describer())
    caption_folder(photos, out, Describer())
    journal.write_bytes((tmp_path / "rows.jsonl").read_bytes())  # as if it had not been removed yet
    assert caption_folder(photos, out, Describer()) == 0
    assert rows_of(out) == EXPECTED and not journal.exists()


def test_a_line_cut_within_a_character_is_dropped(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (16, 16), (3, 0, 0)).save(tmp_path / "photos" / "é.png")
    out = tmp_path / "out.jsonl"
    caption_folder(tmp_path / "photos", out, Describer())
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.index("é".encode()) + 1])
    assert caption_folder(tmp_path / "photos", out, Describer()) == 1
    assert rows_of(out) == {"é.png": "red, 3"}


def test_photos_of_one_name_have_side_cars_of_their_own(photos: Path, tmp_path: Path):
    Image.new("RGB", (16, 16), (200, 0, 0)).save(photos / "0.bmp")
    assert caption_folder(photos, tmp_path / "texts", Describer()) == 8
    found = {path.name: path.read_text().strip() for path in (tmp_path / "texts").glob("*.txt")}
    assert found["0.bmp.txt"] == "red, 200" and found["0.png.txt"] == "red, 0" and found["1.txt"] == "red, 1"
    again = Describer()
    assert caption_folder(photos, tmp_path / "texts", again) == 0 and not again.seen


def test_a_few_unreadable_photos_do_not_stop_the_second_call(tmp_path: Path):
    folder, out = tmp_path / "photos", tmp_path / "out.json"
    folder.mkdir()
    for i in range(200):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i:03d}.png")
    for i in (3, 150):
        (folder / f"{i:03d}.png").write_bytes(b"no picture")
    for expected in (198, 0):
        with pytest.warns(UserWarning, match="skipped 2 of"):
            assert caption_folder(folder, out, Describer()) == expected
    assert len(rows_of(out)) == 198


def test_lines_hold_words_and_other_captions(photos: Path, tmp_path: Path):
    caption_folder(photos, tmp_path / "out.jsonl", Describer())
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert row == {
        "image": "0.png",
        "caption": "red, 0",
        "score": -0.5,
        "words": [["red", 0.9]],
        "others": [{"caption": "b", "score": -1.0}],
    }


def test_side_cars_may_lie_beside_the_photos(photos: Path):
    caption_folder(photos, photos, Describer())
    assert (photos / "deeper" / "5.txt").read_text() == "red, 5\n"


def test_unreadable_image_is_named_and_skipped(photos: Path, tmp_path: Path):
    (photos / "3.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"skipped 1 of 7 .*3\.png"):
        assert caption_folder(photos, tmp_path / "out.jsonl", Describer()) == 6


def test_wrong_calls(photos: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"cannot write \.xml files .* name a \.jsonl"):
        caption_folder(photos, tmp_path / "out.xml", Describer())
    with pytest.raises(FileNotFoundError, match="no folder"):
        caption_folder(tmp_path / "nowhere", tmp_path / "out.jsonl", Describer())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image in"):
        caption_folder(tmp_path / "empty", tmp_path / "out.jsonl", Describer())
