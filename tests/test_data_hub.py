"""Datasets of the hub and folders of parquet files: the same images and captions as in a folder of files.

The hub is a server on this machine (`hub_server`). What is asked of it runs in a process of its own, because
huggingface_hub reads its address when it is imported.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tavq import cli
from tavq.data import dataset as dataset_module
from tavq.data import parquet_rows
from tavq.data.images import UnreadableImageError
from tavq.data.layouts import open_dataset
from tavq.data.tokens import open_tokens

from .conftest import ROOT
from .hub_server import hub_server
from .test_data_shards import put_shard

pytestmark = pytest.mark.slow

SIZES = {"train": 10, "val": 4, "test": 3}
ROWS_PER_GROUP = 4
FEATURES = {"image": "image", "caption": "strings"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path / "cache"))


def write_parquet(path: Path, rows: list[dict], features: dict[str, str] | None = None) -> None:
    """Write rows as `datasets` does; `features` are the kinds of the columns."""
    import datasets  # here, as it takes seconds

    string = datasets.Value("string")
    kinds = {
        "image": datasets.Image(),
        "binary": datasets.Value("binary"),
        "string": string,
        "strings": datasets.List(string),
        "sentences": datasets.List({"raw": string, "sentid": datasets.Value("int32")}),
    }
    columns = datasets.Features({name: kinds[kind] for name, kind in (features or FEATURES).items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows, features=columns)
    table.to_parquet(str(path), batch_size=ROWS_PER_GROUP)


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """The same dataset twice: `folder/photos` of files, and `hub/anna/photos` of parquet files."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in SIZES.items():
        rows = []
        for number in range(count):
            content = png(1000 * len(split) + number)
            captions = [f"Image {number} of {split}.", f"A small image, number {number}."]
            rows.append({"image": {"bytes": content, "path": None}, "caption": captions})
            stem = root / "folder" / "photos" / split / f"{number:03d}"
            stem.parent.mkdir(parents=True, exist_ok=True)
            stem.with_suffix(".png").write_bytes(content)
            stem.with_suffix(".txt").write_text("\n".join(captions))
        name = {"val": "validation"}.get(split, split)
        half = count // 2 + 1
        for part, some in enumerate((rows[:half], rows[half:])):
            write_parquet(root / f"hub/anna/photos/data/{name}-{part:05d}-of-00002.parquet", some)
    return root


def run_with_hub(root: Path, code: str, cache: Path) -> tuple[subprocess.CompletedProcess, list]:
    """Run Python code that asks a hub of the repositories below `root`; return also what it was asked."""
    with hub_server(root) as (address, log):
        own = {"HF_ENDPOINT": address, "HF_HOME": str(cache / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **own, "TAVQ_CACHE": str(cache / "tavq"), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
    return done, log


def test_parquet_files_hold_what_the_folder_holds(photos, monkeypatch):
    monkeypatch.setattr(parquet_rows, "ROWS_AT_ONCE", ROWS_PER_GROUP - 1)
    for split in SIZES:
        table = open_dataset(photos / "hub/anna/photos", split)
        folder = open_dataset(photos / "folder/photos", split)
        assert [e.captions for e in table.examples] == [e.captions for e in folder.examples]
        for index in range(len(folder)):
            assert np.array_equal(table.load_image(index), folder.load_image(index))
    assert table.ids[0] == "data/test-00000-of-00002/0" and table.name == "photos"


def test_many_rows_are_kept_in_a_file_and_one_image_brings_its_group_alone(photos, tmp_path, monkeypatch):
    few = open_dataset(photos / "hub/anna/photos")
    monkeypatch.setattr(dataset_module, "IN_MEMORY", 3)
    many = open_dataset(photos / "hub/anna/photos")
    assert isinstance(many.examples, dataset_module.ExampleFile) and len(many) == sum(SIZES.values())
    assert many.fingerprint() == few.fingerprint() and list(many.ids) == list(few.ids)
    assert not (tmp_path / "cache" / "parquet_images").exists(), "no image is read to list them"
    assert np.array_equal(many.load_image(5), few.load_image(5))
    assert len(list((tmp_path / "cache" / "parquet_images").iterdir())) == 1
    assert [len(many.select_split(split)) for split in SIZES] == list(SIZES.values())


TRAIN = "train tokenizer --preset tiny --align none --training.evaluate-every 20"


def commands(data: str, checkpoint: Path, out: Path) -> list[list[str]]:
    """Train three steps, go on to six, and tokenize."""
    train = [*TRAIN.split(), "--data", data, "--out", str(out / "run")]
    tokenize = ["tokenize", "--data", data, "--out", str(out / "tokens"), "--crops", "1"]
    return [
        [*train, "--training.steps", "3"],
        [*train, "--training.steps", "6"],
        [*tokenize, "--checkpoint", str(checkpoint / "tokenizer")],
    ]


def test_a_dataset_of_the_hub_trains_resumes_and_is_tokenized_as_the_folder(
    photos, tiny_checkpoint, tmp_path
):
    for command in commands(str(photos / "folder/photos"), tiny_checkpoint, tmp_path / "folder"):
        cli.main(command)
    code = "import json, sys, torch; torch.set_num_threads(1)\nfrom tavq import cli\n"
    for command in commands("hf:anna/photos", tiny_checkpoint, tmp_path / "hub"):
        code += f"cli.main(json.loads({json.dumps(command)!r}))\n"
    done, log = run_with_hub(photos / "hub", code, tmp_path)
    assert done.returncode == 0, done.stderr

    weights = [(tmp_path / place / "run" / "model.safetensors").read_bytes() for place in ("hub", "folder")]
    assert weights[0] == weights[1]
    for split in SIZES:
        hub, folder = (open_tokens(tmp_path / place / "tokens", split) for place in ("hub", "folder"))
        assert np.array_equal(np.stack(list(hub.ids)), np.stack(list(folder.ids)))
        assert list(hub.captions) == list(folder.captions)

    fetched = [part for _, path, part in log if path.endswith(".parquet")]
    assert fetched and all(part.startswith("bytes=") for part in fetched), "files are read in ranges"


def test_shards_of_the_hub_by_url_and_by_name(tiny_checkpoint, tmp_path):
    repository = tmp_path / "hub" / "anna" / "shards"
    for name, keys, colour in (("train-000", "ab", 10), ("train-001", "bc", 20), ("validation-000", "d", 30)):
        put_shard(repository / f"{name}.tar", keys, colour)
    pattern = "hf://datasets/anna/shards/{train-000,train-001,validation-000}.tar"
    flags = ["--checkpoint", str(tiny_checkpoint / "tokenizer"), "--crops", "0"]
    cli.main(["tokenize", "--data", str(repository), "--out", str(tmp_path / "local"), *flags])
    code = "from tavq import cli\n"
    for data, out in ((pattern, "url"), ("hf:anna/shards", "name")):
        code += f"cli.main({['tokenize', '--data', data, '--out', str(tmp_path / out), *flags]!r})\n"
    done, _ = run_with_hub(tmp_path / "hub", code, tmp_path)
    assert done.returncode == 0, done.stderr
    shards = [(tmp_path / out / "train-000000.tar").read_bytes() for out in ("local", "url", "name")]
    assert shards[0] == shards[1] == shards[2]
    assert len(open_tokens(tmp_path / "name", "val")) == 1


def test_bad_names_of_the_hub_end_in_one_line(photos, tmp_path):
    hub = tmp_path / "hub"
    (hub / "anna").mkdir(parents=True)
    (hub / "anna" / "photos").symlink_to(photos / "hub/anna/photos")
    row = {"image": {"bytes": png(0), "path": None}, "caption": ["A."]}
    for split in ("train", "test"):
        write_parquet(hub / f"anna/no-val/{split}-0.parquet", [row] * 3)
    write_parquet(hub / "anna/gated/train-0.parquet", [row] * 3)
    write_parquet(hub / "anna/broken/train-0.parquet", [row] * 3)
    (hub / "anna/broken/train-0.parquet").write_bytes(b"PAR1" + bytes(100))
    (hub / "anna/texts").mkdir()
    (hub / "anna/texts/train.csv").write_text("text\na\n")
    elsewhere = "configs:\n- config_name: default\n  data_files: hf://datasets/anna/no-val/train-0.parquet\n"
    (hub / "anna/elsewhere").mkdir()
    (hub / "anna/elsewhere/README.md").write_text(f"---\n{elsewhere}---\n")

    expected = {
        "hf:anna/none": "Dataset 'anna/none' doesn't exist on the Hub or cannot be accessed",
        "hf:anna/gated": "'anna/gated' is a gated dataset on the Hub",
        "hf:anna/photos@later": "later",
        "hf:anna/photos?val=dev": "has the splits train, validation, test, and none called dev",
        "hf:anna/no-val": "has no example in split 'val' (it has train 3, test 3); choose another --split",
        "hf:anna/texts": "has .csv files, expected .parquet or .tar; the hub keeps most datasets as parquet",
        "hf:anna/broken": "train-0.parquet cannot be read as parquet",
        "hf:anna/elsewhere": "Data files don't belong to anna/elsewhere",
    }
    code = "import sys\nfrom tavq import cli\n"
    for data in expected:
        command = [*TRAIN.split(), "--data", data, "--out", str(tmp_path / "out")]
        code += f"try: cli.main({command!r})\nexcept SystemExit as end: print(end.code)\n"
    done, _ = run_with_hub(hub, code, tmp_path)
    assert done.stdout.split() == ["2"] * len(expected), done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(expected), done.stderr
    for (data, message), line in zip(expected.items(), lines, strict=True):
        assert line.startswith("error: ") and message in line, (data, line)


@pytest.mark.parametrize(
    ("features", "option", "message"),
    [
        ({"caption": "string"}, "", "has no column of image (caption (string))"),
        (
            {**FEATURES, "text": "string"},
            "",
            "has several columns that may hold captions (image (Image), caption (list of string), text "
            "(string)); name one with ?captions=COLUMN",
        ),
        ({**FEATURES, "mask": "image"}, "?image=photo", "has no column photo; it has image (Image)"),
        (FEATURES, "?image=caption", "column caption cannot be read as image"),
        (FEATURES, "?picture=image", "has picture behind the ?, expected some of config, image, captions"),
        (FEATURES, "?image=", "has image behind the ?"),
    ],
)
def test_columns_that_cannot_be_guessed_are_listed(features, option, message, tmp_path):
    value = {"image": {"bytes": png(0), "path": None}, "mask": None, "caption": ["A."], "text": "B."}
    row = {name: value[name] for name in features}
    if features["caption"] == "string":
        row["caption"] = "A."
    write_parquet(tmp_path / "photos" / "train.parquet", [row], features)
    with pytest.raises(ValueError) as error:
        open_dataset(f"{tmp_path}/photos{option}")
    assert message in str(error.value)


def test_named_columns_splits_and_other_kinds_of_values_are_read(tmp_path):
    features = {
        "photo": "binary",
        "mask": "image",
        "sentences": "sentences",
        "url": "string",
        "long_text": "string",
        "split": "string",
    }
    said = [{"raw": "A dog.", "sentid": 1}, {"raw": " ", "sentid": 2}]
    rows = [
        {"photo": png(n), "mask": None, "sentences": said, "url": "u", "long_text": None, "split": split}
        for n, split in enumerate(("train", "restval", "val"))
    ]
    rows[0]["long_text"] = "A dog that runs."
    write_parquet(tmp_path / "photos" / "everything-0.parquet", rows[::2], features)
    named = f"{tmp_path}/photos?image=photo&captions=sentences"
    dataset = open_dataset(named, "train")
    assert dataset[0].captions == ("A dog.",) and dataset[0].long_text == "A dog that runs."
    assert dataset.load_image(0).size == (20, 20)
    assert open_dataset(named, "val")[0].long_text is None

    write_parquet(tmp_path / "photos" / "everything-0.parquet", rows, features)
    with pytest.raises(ValueError, match=r"is in split 'restval', expected train, val, test"):
        open_dataset(named, "train")


def test_one_split_alone_is_divided_and_others_are_named(tmp_path):
    row = {"image": {"bytes": png(0), "path": None}, "caption": ["A."]}
    write_parquet(tmp_path / "one" / "train-0.parquet", [row] * 60)
    sizes = {split: len(open_dataset(tmp_path / "one", split)) for split in SIZES}
    assert sum(sizes.values()) == 60 and sizes["train"] > 40 and sizes["val"] and sizes["test"]

    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for split, count in (("train2014", 4), ("val2014", 2)):
        write_parquet(tmp_path / "two" / f"{split}.parquet", [row] * count)
        readme += f"  - split: {split}\n    path: {split}.parquet\n"
    (tmp_path / "two" / "README.md").write_text(f"{readme}---\n")
    with pytest.raises(ValueError, match=r"has the splits train2014, val2014; say which is which, as in \?"):
        open_dataset(tmp_path / "two", "train")
    named = f"{tmp_path}/two?train=train2014&val=val2014"
    assert len(open_dataset(named, "train")) == 4 and len(open_dataset(named, "val")) == 2


def test_an_absent_image_is_unreadable_and_a_file_that_leads_out_is_refused(tmp_path):
    rows = [{"image": {"bytes": content, "path": "a.png"}, "caption": ["A."]} for content in (png(0), None)]
    write_parquet(tmp_path / "photos" / "train.parquet", rows)
    dataset = open_dataset(tmp_path / "photos")
    with pytest.raises(UnreadableImageError, match="row 1 of group 0 holds no bytes of an image"):
        dataset.load_image(1)

    elsewhere = f"configs:\n- config_name: default\n  data_files: {tmp_path}/photos/train.parquet\n"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.parquet").write_bytes((tmp_path / "photos" / "train.parquet").read_bytes())
    (tmp_path / "other" / "README.md").write_text(f"---\n{elsewhere}---\n")
    with pytest.raises(ValueError, match="out of the dataset"):
        open_dataset(tmp_path / "other")
