"""tavq check-data: what is wrong on purpose is found, and keep.txt leaves it out of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from tavq.cli import main
from tavq.data.dataset import Example, ImageTextDataset
from tavq.data.keep import keep_only, write_keep
from tavq.data.layouts import open_dataset
from tavq.data.tokens import open_tokens
from tavq.tokenizer.check_dataset import copies_to_drop, foreign_captions
from tavq.tokenizer.data_checks import caption_fit, near_duplicates, sibling_agreement
from tavq.tokenizer.retrieval import alignment_scores


def dataset_of(*rows: tuple[str, tuple[str, ...]], split: str = "train") -> ImageTextDataset:
    image = Image.new("RGB", (16, 16))
    return ImageTextDataset(
        "made up", [Example(id_, lambda: image, texts, None, split) for id_, texts in rows]
    )


def test_fit_is_standardised_over_other_images_and_over_other_captions(tiny_tokenizer):
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(tiny_tokenizer.num_codes, (6, 16), generator=rng)
    vectors = normalize(torch.randn(9, 384, generator=rng), dim=1)
    image_of = torch.tensor([0, 3, 1, 2, 2, 5, 4, 0, 3])  # captions need not lie in the images' order
    scores = alignment_scores(tiny_tokenizer, ids, vectors)
    among_images = (scores - scores.mean(0)) / scores.std(0)
    among_captions = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
    expected = ((among_images + among_captions) / 2)[image_of, torch.arange(9)]
    assert torch.allclose(caption_fit(tiny_tokenizer, ids, vectors, image_of), expected, atol=1e-4)


def test_a_caption_that_its_siblings_contradict_agrees_least_and_a_single_one_counts_nothing():
    direction = normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors = direction[torch.tensor([0, 0, 1, 1, 1, 0, 0])]
    agreement = sibling_agreement(vectors, torch.tensor([0, 0, 0, 1, 1, 1, 2]))
    assert agreement[6] == 0 and set(agreement.argsort()[:2].tolist()) == {2, 5}
    assert float(agreement[:6].mean()) == pytest.approx(0, abs=1e-6)


def test_copies_are_found_and_an_evaluated_one_stays(tiny_tokenizer):
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(tiny_tokenizer.num_codes, (8, 16), generator=rng)
    ids[6], ids[7] = ids[1], ids[2]
    ids[7, 0] = (ids[7, 0] + 1) % tiny_tokenizer.num_codes
    pairs = near_duplicates(tiny_tokenizer, ids, 0.8)
    assert [pair[:2] for pair in pairs] == [(1, 6), (2, 7)] and pairs[0][2] == pytest.approx(1, abs=1e-5)
    examples = [Example(str(n), Path(), ("a",), None, "train" if n < 6 else "test") for n in range(8)]
    assert copies_to_drop(ImageTextDataset("x", examples), pairs) == {"1", "2"}
    assert copies_to_drop(ImageTextDataset("x", examples), [(0, 1, 1.0), (1, 2, 1.0)]) == {"1"}


def test_captions_in_another_language_are_found():
    dataset = dataset_of(
        ("a", ("A brown dog runs through the grass.", "Ein brauner Hund läuft durch das hohe Gras.")),
        ("b", ("hund", "Un chien brun court dans l'herbe avec une balle rouge.")),
    )
    captions = [(i, k) for i in range(2) for k in range(2)]
    assert foreign_captions("en", dataset, captions) == [(0, 1), (1, 1)]
    assert foreign_captions("", dataset, captions) == []


def test_keep_leaves_out_images_and_captions_and_refuses_what_does_not_fit(tmp_path):
    dataset = dataset_of(
        ("a", ("one", "two")), ("b c", ("one", "two", "three")), ("d", ("one",)), ("e", ("x",))
    )
    file = tmp_path / "keep.txt"
    write_keep(file, dataset, {"e"}, {"b c": {1}, "d": {0}})
    assert file.read_text() == "a\nb c\t0 2\n"
    kept = keep_only(dataset, file)
    assert [(example.id, example.captions) for example in kept.examples] == [
        ("a", ("one", "two")),
        ("b c", ("one", "three")),
    ]
    assert keep_only(dataset, None) is dataset
    for text, message in {
        "z\n": "names none of the 4",
        "a\t5\n": "caption 5 of a",
        "a\tx\n": "expected numbers",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            keep_only(dataset, file)
    with pytest.raises(FileNotFoundError, match="check --keep"):
        keep_only(dataset, tmp_path / "none.txt")


@pytest.mark.slow
def test_the_command_finds_what_is_wrong_and_training_leaves_it_out(tmp_path, tiny_checkpoint, capsys):
    photos = tmp_path / "photos"
    shapes = {split: open_dataset("shapes", split).take(8) for split in ("train", "test")}
    for split, dataset in shapes.items():
        (photos / split).mkdir(parents=True)
        for number, example in enumerate(dataset.examples):
            file = photos / split / f"{number}.png"
            dataset.load_image(number).resize((96, 96)).save(file)
            file.with_suffix(".txt").write_text("\n".join(example.captions))
    shutil.copy(photos / "test" / "3.png", photos / "train" / "5.png")
    (photos / "train" / "6.png").write_bytes((photos / "train" / "6.png").read_bytes()[:200])
    Image.new("RGB", (96, 20)).save(photos / "train" / "7.png")
    (photos / "train" / "1.txt").write_text("a red circle\nEin roter Kreis liegt links neben einem Quadrat.")

    tokenizer = str(tiny_checkpoint / "tokenizer")
    flags = ["--tokenizer", tokenizer, "--device", "cpu", "--duplicate-similarity", "0.999"]
    main(["check-data", str(photos), "--out", str(tmp_path / "out"), "--drop-worst", "1", *flags])
    said = capsys.readouterr().out
    # A tokenizer with random weights takes some other shapes for copies, too.
    assert "pairs of copies, 1 of them across splits" in said and "1 unreadable and 1 tiny images" in said
    assert "1 captions in another language than en" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "copy of test/3" in page and "96 x 20 px" in page
    kept = dict(
        line.partition("\t")[::2] for line in (tmp_path / "out" / "keep.txt").read_text().splitlines()
    )
    assert set(kept) <= {f"test/{n}" for n in range(8)} | {f"train/{n}" for n in range(5)}
    table = [line.split("\t") for line in (tmp_path / "out" / "captions.tsv").read_text().splitlines()[1:]]
    assert [float(row[0]) for row in table] == sorted(float(row[0]) for row in table)
    worst_id, worst_number = table[0][1:3]
    assert worst_id not in kept or worst_number not in (kept[worst_id] or "0 1 2 3 4 5").split()
    assert kept.get("train/1", "0") == "0"

    main(["check-data", str(photos), "--out", str(tmp_path / "again"), "--json", *flags])
    found = json.loads(capsys.readouterr().out)
    counts = ("copies_across_splits", "unreadable", "tiny", "foreign_captions")
    assert [found[name] for name in counts] == [1, 1, 1, 1]
    assert all(Path(file).is_file() for file in found["files"])

    keep = ["--keep", str(tmp_path / "out" / "keep.txt")]
    main(["tokenize", "--data", str(photos), "--out", str(tmp_path / "t"), "--checkpoint", tokenizer, *keep])
    tokens = open_tokens(tmp_path / "t", "train")
    assert set(tokens.names) == {id_ for id_ in kept if id_.startswith("train/")}
    tiny = ["--preset", "tiny", "--training.steps", "2", "--training.batch-size", "2", "--fit-steps", "0"]
    run = ["train", "tokenizer", "--data", str(photos), *tiny, *keep]
    with pytest.raises(SystemExit):
        main([*run, "--out", str(tmp_path / "run"), "--keep", str(tmp_path / "none.txt")])
    assert "check --keep" in capsys.readouterr().err
