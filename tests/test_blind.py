"""tavq blind: the key tells the truth, and nothing else does."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tavq.cli import main
from tavq.data.images import squash
from tavq.data.layouts import open_dataset
from tavq.eval.blind_sheets import chosen_images, reconstruction
from tavq.tokenizer.model import TAVQTokenizer

CELL_PX = 192
GAP_PX = 2


@pytest.fixture
def tokenizers(tiny_checkpoint, tmp_path) -> tuple[str, str]:
    """Two tokenizers that differ in one weight of the decoder."""
    folders = [shutil.copytree(tiny_checkpoint / "tokenizer", tmp_path / name) for name in ("one", "two")]
    tokenizer = TAVQTokenizer.from_pretrained(folders[1])
    torch.nn.init.constant_(tokenizer.decoder.to_rgb[-1].bias, 0.5)
    tokenizer.save_pretrained(folders[1])
    return str(folders[0]), str(folders[1])


def blind(tokenizers: tuple[str, str], out: Path, *flags: str) -> dict:
    main(["blind", *tokenizers, "--data", "shapes", "--out", str(out), "--device", "cpu", *flags])
    return json.loads((out / "key.json").read_text())


def cell(out: Path, row: int, column: int) -> np.ndarray:
    """Cell of a row, counted from 0: column 0 shows the image, 1 and 2 left and right."""
    sheet, row = divmod(row, 10)
    line, place = divmod(row, 2)
    pixels = np.asarray(Image.open(out / f"sheet{sheet + 1}.png"))
    x = (3 * place + column) * (CELL_PX + GAP_PX)
    y = line * (CELL_PX + GAP_PX)
    return pixels[y : y + CELL_PX, x : x + CELL_PX]


@pytest.mark.slow
def test_the_key_names_who_made_each_side(tokenizers, tmp_path):
    out = tmp_path / "blind"
    key = blind(tokenizers, out, "--images", "13")
    assert sorted(path.name for path in out.iterdir()) == ["key.json", "sheet1.png", "sheet2.png"]
    assert list(key["tokenizers"]) == list(tokenizers) and [row["row"] for row in key["rows"]] == [
        *range(1, 14)
    ]

    models = {source: TAVQTokenizer.from_pretrained(source) for source in tokenizers}
    dataset = open_dataset("shapes", "val")
    for number, row in enumerate(key["rows"]):
        image = dataset.load_image(dataset.ids.index(row["id"]))
        shown = cell(out, number, 0)
        assert np.array_equal(shown[40:], np.asarray(squash(image, CELL_PX))[40:]), "below the number"
        for column, side in ((1, "left"), (2, "right")):
            expected = squash(reconstruction(models[row[side]], image), CELL_PX)
            assert np.array_equal(cell(out, number, column), np.asarray(expected)), (number, side)


@pytest.mark.slow
def test_the_seed_chooses_images_but_not_the_order(tokenizers, tmp_path):
    keys = [blind(tokenizers, tmp_path / name) for name in ("a", "b")]
    ids, orders = ([[row[field] for row in key["rows"]] for key in keys] for field in ("id", "left"))
    assert ids[0] == ids[1] and len(set(ids[0])) == 40
    assert orders[0] != orders[1], "the same 40 sides twice: chance 1 in 10^12"
    assert all(set(order) == set(tokenizers) for order in orders)

    dataset = open_dataset("shapes", "val")
    assert chosen_images(dataset, 40, seed=1).ids != tuple(ids[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("key", "is the key of sheets made before"),
        ("same", "have the same weights"),
        ("many", "images are asked for and the split has"),
        ("none", "images is 0, expected 1 or more"),
    ],
)
def test_refused(tokenizers, tmp_path, capsys, change, words):
    out = tmp_path / "blind"
    flags = {"many": ["--images", "999999"], "none": ["--images", "0"]}.get(change, [])
    if change == "key":
        out.mkdir()
        (out / "key.json").write_text("{}")
    if change == "same":
        tokenizers = (tokenizers[0], str(shutil.copytree(tokenizers[0], tmp_path / "copy")))
    with pytest.raises(SystemExit) as stopped:
        main(["blind", *tokenizers, "--data", "shapes", "--out", str(out), *flags])
    assert stopped.value.code == 2 and words in capsys.readouterr().err
    assert list(tmp_path.glob("blind/*.png")) == []
