"""tavq index and tavq search: what is found is what exact scores say; the index follows its folder."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from tavq import photo_index
from tavq.cli import main
from tavq.data.images import load_image, to_tensor
from tavq.data.layouts import open_dataset
from tavq.photo_index import PhotoIndex, new_index
from tavq.ranking import combine_scores
from tavq.tokenizer.retrieval import alignment_scores, text_encoder_of

WORDS = "a red circle on the left"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    dataset = open_dataset("shapes", "train").take(12)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for number in range(12):
        folder = tmp_path / "photos" / ("deep" if number > 8 else ".")
        dataset.load_image(number).save(folder / f"{number:02d}.png")
    return tmp_path / "photos"


@pytest.fixture
def index(tmp_path, tiny_tokenizer) -> PhotoIndex:
    return PhotoIndex(tmp_path / "index", tiny_tokenizer, "weights")


def ids_of(tokenizer, path: Path) -> torch.Tensor:
    return tokenizer.encode(to_tensor(load_image(path), tokenizer.image_size_px).unsqueeze(0)).flatten(1)


@pytest.mark.slow
def test_words_a_photo_and_both_find_what_exact_scores_find(photos, index, tiny_tokenizer):
    index.update(photos)
    files = sorted(photos.rglob("*.png"))
    encoder = text_encoder_of(tiny_tokenizer)
    ids = torch.cat([ids_of(tiny_tokenizer, file) for file in files])
    words = alignment_scores(tiny_tokenizer, ids, encoder.encode([WORDS]))[:, 0]
    projected = tiny_tokenizer.project(torch.arange(tiny_tokenizer.num_codes))
    vectors = projected[ids].mean(1)
    centred = normalize(vectors - vectors.mean(0), dim=1)
    photo = centred @ centred[4]

    for query, exact in {
        (WORDS, None): words,
        (None, files[4]): photo,
        (WORDS, files[4]): combine_scores([words, photo]),
    }.items():
        like = None if query[1] is None else load_image(query[1])
        hits = index.search(encoder.encode, query[0], like, top=5)
        assert [hit.path for hit in hits] == [files[n] for n in exact.argsort(descending=True)[:5]]
        assert torch.allclose(torch.tensor([hit.score for hit in hits]), exact.topk(5).values, atol=1e-4)
    assert index.search(encoder.encode, None, load_image(files[4]), top=1)[0].path == files[4]


def test_the_index_follows_its_folder_and_encodes_each_photo_once(photos, index, monkeypatch):
    encoded = []
    encode = index._ids
    monkeypatch.setattr(index, "_ids", lambda image: encoded.append(image) or encode(image))
    first = index.update(photos)
    assert (first.added, first.removed, first.unchanged, first.unreadable) == (12, 0, 0, ())
    assert index.update(photos).unchanged == 12 and len(encoded) == 12

    (photos / "00.png").unlink()
    shutil.copy(photos / "02.png", photos / "01.png")
    (photos / "broken.png").write_text("no image")
    changes = index.update(photos)
    assert (changes.added, changes.removed, changes.unchanged) == (1, 1, 10) and len(encoded) == 13
    assert "broken.png" in changes.unreadable[0]
    rows = dict(sqlite3.connect(index.directory / "photos.sqlite").execute("SELECT name, ids FROM photos"))
    assert sorted(rows) == sorted(
        [*(f"{n:02d}.png" for n in range(1, 9)), "deep/09.png", "deep/10.png", "deep/11.png"]
    )
    assert rows["01.png"] == rows["02.png"] != rows["03.png"]


def test_a_build_that_is_stopped_goes_on_and_is_not_searched(photos, index, monkeypatch):
    monkeypatch.setattr(photo_index, "COMMIT_EVERY", 3)
    encode, seen = index._ids, []

    def stop_at_the_eighth(image):
        seen.append(image)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return encode(image)

    monkeypatch.setattr(index, "_ids", stop_at_the_eighth)
    with pytest.raises(KeyboardInterrupt):
        index.update(photos)
    with pytest.raises(FileNotFoundError, match="no finished index"):
        index.search(lambda _: torch.ones(1, 384), "a dog")
    changes = index.update(photos)
    assert (changes.added, changes.unchanged) == (6, 6) and len(seen) == 14


def test_an_index_of_other_weights_or_of_another_folder_is_refused(photos, index, tmp_path, tiny_tokenizer):
    index.update(photos)
    with pytest.raises(ValueError, match="weights"):
        PhotoIndex(index.directory, tiny_tokenizer, "others").update(photos)
    with pytest.raises(ValueError, match="folder"):
        index.update(photos / "deep")


def test_many_vectors_are_divided_into_cells_and_little_is_lost(monkeypatch):
    monkeypatch.setattr(photo_index, "EXACT_UP_TO", 1000)
    rng = torch.Generator().manual_seed(0)
    vectors = normalize(torch.randn(4000, 16, generator=rng), dim=1).numpy()
    index = new_index(vectors, 4000)
    index.add_with_ids(vectors, torch.arange(4000).numpy())
    _, found = index.search(vectors[:50], 1)
    assert index.ntotal == 4000 and (found[:, 0] == range(50)).all()
    exact = new_index(vectors[:900], 900)
    assert not hasattr(exact, "nprobe") and index.nprobe == 32


@pytest.mark.slow
def test_the_commands_print_photos_and_show_them(photos, tmp_path, tiny_checkpoint, capsys):
    checkpoint = ["--checkpoint", str(tiny_checkpoint), "--device", "cpu"]
    main(["index", str(photos), "--out", str(tmp_path / "i"), *checkpoint])
    assert "12 photos encoded" in capsys.readouterr().out
    page = tmp_path / "found.html"
    main(
        [
            "search",
            str(tmp_path / "i"),
            WORDS,
            "--like",
            str(photos / "03.png"),
            "--top",
            "4",
            "--page",
            str(page),
            *checkpoint,
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(Path(line.split()[1]).is_file() for line in lines[:4])
    assert page.read_text().count("data:image/jpeg") == 5
    main(["index", str(photos), "--out", str(tmp_path / "i"), "--json", *checkpoint])
    main(["search", str(tmp_path / "i"), WORDS, "--top", "2", "--json", *checkpoint])
    changes, *found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (changes["added"], changes["unchanged"], changes["unreadable"]) == (0, 12, [])
    assert all(Path(hit["path"]).is_file() for hit in found) and found[0]["score"] >= found[1]["score"]
    for arguments, message in {
        ("search", str(tmp_path / "i")): "nothing to look for",
        ("search", str(tmp_path / "none"), "a dog"): "make it with: tavq index PHOTOS",
        ("search", str(photos), "a dog"): "holds no finished index",
        ("index", str(tmp_path / "i"), "--out", str(tmp_path / "j")): "no image in",
    }.items():
        with pytest.raises(SystemExit) as left:
            main([*arguments, *checkpoint])
        assert left.value.code == 2 and message in capsys.readouterr().err
