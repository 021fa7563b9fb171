"""`open_dataset` finds each layout by itself and names what is wrong with it."""

import io
import json
import pickle
import re
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from tavq.data import dataset as dataset_module
from tavq.data.dataset import (
    Example,
    ExampleFile,
    ImageTextDataset,
    collect,
    join_captions,
    readable_images,
)
from tavq.data.images import UnreadableImageError
from tavq.data.layouts import open_dataset
from tavq.eval.config import EvaluationRun
from tavq.tokenizer.training_images import TrainingImages


def put_image(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)


def put_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def karpathy(root, names_and_splits):
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": f"{name} one"}, {"raw": " a\u2028two . "}]}
        for name, split in names_and_splits
    ]
    put_json(root / "dataset_toy.json", {"images": images, "dataset": "toy"})


@pytest.fixture
def karpathy_dir(tmp_path):
    names = [("a.jpg", "train"), ("b.jpg", "restval"), ("c.jpg", "val"), ("d.jpg", "test")]
    karpathy(tmp_path, names)
    for name, _ in names:
        put_image(tmp_path / "images" / name)
    return tmp_path


def test_karpathy(karpathy_dir):
    assert open_dataset(karpathy_dir, "train").ids == ("a", "b")
    assert open_dataset(karpathy_dir / "dataset_toy.json", "test").ids == ("d",)
    dataset = open_dataset(karpathy_dir)
    assert dataset[2] == Example(
        "c", karpathy_dir / "images/c.jpg", ("c.jpg one", "a two ."), long_text=None, split="val"
    )
    assert dataset.load_image(0).getpixel((0, 0))[0] > 250


def test_coco(tmp_path):
    for split, number in (("train", 7), ("val", 9)):
        put_image(tmp_path / f"{split}2017/{number:012}.jpg")
        annotation = {
            "images": [{"id": number, "file_name": f"{number:012}.jpg"}],
            "annotations": [
                {"image_id": number, "caption": "A cat."},
                {"image_id": number, "caption": "Cat"},
            ],
        }
        put_json(tmp_path / f"annotations/captions_{split}2017.json", annotation)
    assert open_dataset(tmp_path).ids == ("7", "9")
    example = open_dataset(tmp_path, "val")[0]
    assert example.captions == ("A cat.", "Cat") and example.image == tmp_path / "val2017/000000000009.jpg"
    put_json(tmp_path / "annotations/captions_val2014.json", annotation)
    with pytest.raises(
        ValueError, match=r"captions_val2014.json and captions_val2017.json are the same split"
    ):
        open_dataset(tmp_path)


def test_webdataset_shards(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(picture, format="PNG")
    rows = {
        "train-000000.tar": {"a/one.png": picture.getvalue(), "a/one.txt": b"A dog .\n\nA hound .\n"},
        "validation-000000.tar": {"two.png": picture.getvalue()[:-40], "two.json": b'{"caption": "A cat ."}'},
        "more.tar": {"three.png": picture.getvalue(), "three.json": b'{"text": ["Cow"], "split": "test"}'},
    }
    for name, members in rows.items():
        put_shard(tmp_path / name, members | {"bare.png": b"no caption"})
    with pytest.warns(UserWarning, match="left out 3 images without a caption"):
        dataset = open_dataset(tmp_path)
    assert [(e.id, e.split, e.captions) for e in dataset.examples] == [
        ("three", "test", ("Cow",)),
        ("a/one", "train", ("A dog .", "A hound .")),
        ("two", "val", ("A cat .",)),
    ]
    assert dataset.load_image(1).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(UnreadableImageError, match=r"validation-000000\.tar: two\.png"):
        dataset.load_image(2)
    (tmp_path / "more.tar").write_bytes(b"x" * 600)
    with pytest.raises(ValueError, match=r"more.tar cannot be read as tar .* write the shard again"):
        open_dataset(tmp_path)


def put_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_original_flickr8k_with_split_lists(tmp_path):
    rows = [
        "a.jpg#0\tA dog .",
        "a.jpg#1\tA hound .",
        "b.jpg#0\tA cat .",
        "c.jpg#0\tA cow .",
        "x.jpg#0\tUnlisted .",
    ]
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join([*rows, "2258277193_586949ec62.jpg.1#0\tGone ."]))
    for name, listed in (("train", "a.jpg"), ("dev", "b.jpg"), ("test", "c.jpg")):
        (tmp_path / f"Flickr_8k.{name}Images.txt").write_text(listed + "\n")
        put_image(tmp_path / "Flicker8k_Dataset" / listed)
    assert [(e.id, e.split, e.captions) for e in open_dataset(tmp_path).examples] == [
        ("a", "train", ("A dog .", "A hound .")),
        ("b", "val", ("A cat .",)),
        ("c", "test", ("A cow .",)),
    ]
    (tmp_path / "Flickr_8k.devImages.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"devImages.txt; all three"):
        open_dataset(tmp_path)


def test_original_flickr8k_csv(tmp_path):
    (tmp_path / "captions.txt").write_text(
        'image,caption\na.jpg,A dog runs .\na.jpg,"A ""big"" dog, running ."\na.jpg,A dog, a cat .\n'
    )
    put_image(tmp_path / "Images/a.jpg")
    (example,) = open_dataset(tmp_path).examples
    assert example.captions == ("A dog runs .", 'A "big" dog, running .', "A dog, a cat .")


def test_sidecars_with_split_folders_and_long_text(tmp_path):
    for split in ("train", "valid", "test"):
        put_image(tmp_path / split / "one.png")
        (tmp_path / split / "one.txt").write_text("A red square.\n\nSecond caption\n")
    (tmp_path / "valid/one.long.txt").write_text("A very\nlong text.")
    dataset = open_dataset(tmp_path)
    assert {e.id: e.split for e in dataset.examples} == {
        "test/one": "test",
        "train/one": "train",
        "valid/one": "val",
    }
    assert open_dataset(tmp_path, "val")[0].text == "A very long text."
    assert open_dataset(tmp_path, "test")[0].text == "A red square. Second caption ."


def test_sidecars_warn_of_bare_images_and_refuse_when_all_are(tmp_path):
    put_image(tmp_path / "a.png")
    put_image(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"2 images and no caption; put a.txt beside a.png"):
        open_dataset(tmp_path)
    (tmp_path / "a.txt").write_text("A square.")
    with pytest.warns(UserWarning, match=r"left out 1 of 2 images without a .txt caption, first .*b.png"):
        assert open_dataset(tmp_path).ids == ("a",)


def test_metadata_jsonl(tmp_path):
    rows = [
        {"file_name": "a.png", "text": "One."},
        {"file_name": "sub/b.png", "captions": ["One.", "Two."], "long_text": "Long.", "split": "validation"},
        {"file_name": "c.png", "caption": "Three.", "split": "test"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for row in rows:
        put_image(tmp_path / row["file_name"])
    (example,) = open_dataset(tmp_path, "val").examples
    assert (example.id, example.captions, example.text) == ("sub/b", ("One.", "Two."), "Long.")
    assert open_dataset(tmp_path, "test").ids == ("c",)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 3}')
    with pytest.raises(ValueError, match=r"line 1: got keys file_name, label; expected file_name and text"):
        open_dataset(tmp_path)


def test_metadata_in_split_folders(tmp_path):
    for split in ("train", "test"):
        put_image(tmp_path / split / "a.png")
        (tmp_path / split / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "A square."}')
    assert open_dataset(tmp_path, "train").ids == ("train/a",)
    assert open_dataset(tmp_path, "test").ids == ("test/a",)


@pytest.mark.parametrize("kind", ["jsonl", "sharegpt4v"])
def test_long_text_beside_any_layout(karpathy_dir, kind):
    if kind == "jsonl":
        (karpathy_dir / "long_text.jsonl").write_text('{"id": "a", "text": "Dense."}\n')
    else:
        turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "Dense."}]
        put_json(karpathy_dir / "sharegpt4v_x.json", [{"image": "folder/a.jpg", "conversations": turns}])
    first, second = open_dataset(karpathy_dir, "train").examples
    assert first.text == "Dense." and second.long_text is None


def test_long_text_by_file_name_where_the_id_is_another(tmp_path):
    put_image(tmp_path / "sub/a.png")
    (tmp_path / "sub/a.txt").write_text("A square.")
    (tmp_path / "long_text.jsonl").write_text('{"image": "elsewhere/a.jpg", "text": "Dense."}\n')
    (example,) = open_dataset(tmp_path).examples
    assert (example.id, example.text) == ("sub/a", "Dense.")


def test_long_text_of_other_images_is_an_error(karpathy_dir):
    (karpathy_dir / "long_text.jsonl").write_text('{"id": "zebra", "text": "Dense."}\n')
    with pytest.raises(ValueError, match=r"none of them in the dataset .*zebra"):
        open_dataset(karpathy_dir)


def test_split_by_hash_is_stable_and_near_its_shares(tmp_path):
    for number in range(200):
        put_image(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("A square.")
    before = {e.id: e.split for e in open_dataset(tmp_path).examples}
    assert 140 <= sum(split == "train" for split in before.values()) <= 180
    assert set(before.values()) == {"train", "val", "test"}
    (tmp_path / "0.png").unlink()
    assert all(before[e.id] == e.split for e in open_dataset(tmp_path).examples)


def test_missing_images_are_counted_and_the_first_is_named(karpathy_dir):
    (karpathy_dir / "images/b.jpg").unlink()
    (karpathy_dir / "images/c.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 4 annotated images are missing.*images/b.jpg"):
        open_dataset(karpathy_dir)
    assert len(open_dataset(karpathy_dir, "test")) == 1  # only the images of the split are asked for


def test_bad_paths_say_what_is_expected(tmp_path, karpathy_dir):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/notes.md").write_text("")
    (tmp_path / "odd/other.json").write_text("{}")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "dataset_x.json").write_text("{")
    cases = [
        (tmp_path / "none", FileNotFoundError, "no dataset at"),
        (empty, ValueError, "is empty; expected dataset_"),
        (tmp_path / "odd", ValueError, "holds no known layout; expected"),
        (tmp_path / "odd/other.json", ValueError, "no known annotation file"),
        (broken, ValueError, "no valid json"),
    ]
    for path, kind, message in cases:
        with pytest.raises(kind, match=message) as error:
            open_dataset(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=re.escape("unknown split 'dev'; choose one of train, val, test")):
        open_dataset(karpathy_dir, "dev")


def test_split_without_examples_lists_the_others(tmp_path):
    karpathy(tmp_path, [("a.jpg", "train")])
    put_image(tmp_path / "images/a.jpg")
    with pytest.raises(ValueError, match=r"no example in split 'test' \(it has train 1\)"):
        open_dataset(tmp_path, "test")


def test_two_annotation_files_ask_for_one(karpathy_dir):
    put_json(karpathy_dir / "dataset_other.json", {"images": []})
    with pytest.raises(ValueError, match=r"2 annotation files \(dataset_other.json, dataset_toy.json\)"):
        open_dataset(karpathy_dir)


def dataset_with_bad(tmp_path, good, bad):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    noise.save(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:500])
    files = ["bad.jpg"] * bad + ["good.jpg"] * good
    return ImageTextDataset(
        "toy", [Example(str(n), tmp_path / file, ("a",), None, "train") for n, file in enumerate(files)]
    )


def test_truncated_image_among_good_ones_is_skipped_counted_and_named(tmp_path):
    dataset = dataset_with_bad(tmp_path, good=10, bad=1)
    with pytest.raises(UnreadableImageError):
        dataset.load_image(0)
    with pytest.warns(
        UserWarning, match=r"toy: skipped 1 of 11 images that cannot be read: 0 \(.*bad.jpg"
    ) as seen:
        indices = [index for index, _ in readable_images(dataset)]
    assert indices == list(range(1, 11)) and len(seen) == 1


def test_more_than_one_percent_unreadable_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"2 images cannot be read, at most 1 of 12"):
        list(readable_images(dataset_with_bad(tmp_path, good=10, bad=2)))
    with pytest.warns(UserWarning, match="skipped 2 of 200"):
        assert len(list(readable_images(dataset_with_bad(tmp_path, good=198, bad=2)))) == 198
    with pytest.raises(ValueError, match=r"3 images cannot be read, at most 2 of 200"):
        list(readable_images(dataset_with_bad(tmp_path, good=197, bad=3)))


def test_training_stops_where_more_than_one_percent_is_unreadable(tmp_path, capsys):
    images = TrainingImages(dataset_with_bad(tmp_path, good=198, bad=2), 16)
    assert images[(0, 0)]["index"] == 2, "the next readable image takes the place of unreadable ones"
    assert capsys.readouterr().out.count("warning: skipped") == 2
    with pytest.raises(ValueError, match="3 images cannot be read; repair toy"):
        TrainingImages(dataset_with_bad(tmp_path, good=197, bad=3), 16)[(0, 0)]


def test_an_image_that_is_gone_is_skipped_and_named(tmp_path):
    dataset = dataset_with_bad(tmp_path, good=2, bad=1)
    (tmp_path / "bad.jpg").unlink()
    with pytest.warns(UserWarning, match=r"skipped 1 of 3 .*no image at .*bad\.jpg"):
        assert [index for index, _ in readable_images(dataset)] == [1, 2]


def test_examples_are_selected_by_number_and_by_split(tmp_path):
    rows = [Example(str(n), tmp_path, ("a",), None, "val" if n % 2 else "train") for n in range(5)]
    dataset = ImageTextDataset("toy", rows)
    assert dataset.take(2).ids == ("0", "1") and dataset.take(None).ids == dataset.ids
    assert dataset.select_split("val").ids == ("1", "3") and len(dataset.select_split("test")) == 0


def test_readable_images_are_silent_when_all_is_well(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [index for index, _ in readable_images(dataset_with_bad(tmp_path, 2, 0))] == [0, 1]


def test_repeated_ids_are_refused(tmp_path):
    put_image(tmp_path / "a.png")
    put_image(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("A square.")
    with pytest.raises(ValueError, match=r"1 ids occur more than once \(first: a\)"):
        open_dataset(tmp_path)


def test_join_adds_a_full_stop_only_where_it_is_missing():
    assert join_captions(["A dog .", "Two  cats", "What?", 'He says "no."', " "]) == (
        'A dog . Two cats . What? He says "no."'
    )


@pytest.mark.slow
def test_flickr8k_as_published(flickr8k_dir):
    sizes = {split: len(open_dataset(flickr8k_dir, split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 6000, "val": 1000, "test": 1000}
    dataset = open_dataset(flickr8k_dir)
    assert len(dataset) == 8000 and all(len(example.captions) == 5 for example in dataset.examples)
    words = sum(len(re.findall(r"\w+", example.text)) for example in dataset.examples) / 8000
    assert 50 < words < 65  # five captions together average 59 tokens
    assert dataset.load_image(0).size == (224, 224)


def test_the_environment_may_name_the_data_set(monkeypatch, tmp_path):
    monkeypatch.setenv("TAVQ_DATA", "shapes")
    assert EvaluationRun().data == "shapes"
    monkeypatch.delenv("TAVQ_DATA")
    monkeypatch.chdir(tmp_path)  # which must not be taken for the dataset
    with pytest.raises(ValueError, match="no dataset is named; give one with --data DIR, or set TAVQ_DATA"):
        open_dataset(EvaluationRun().data)


@pytest.mark.parametrize("layout", ["shards", "sidecars"])
def test_a_large_dataset_is_read_from_a_temporary_file_and_is_the_same(tmp_path, monkeypatch, layout):
    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    for number in range(9):
        put_image(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"Caption {number}.\nAnother.")
    (data / "long_text.jsonl").write_text('{"id": "3", "text": "A long text."}\n')
    if layout == "shards":
        for split, numbers in (("train", (1, 2, 3, 4, 5, 6)), ("val", (0, 7, 8))):
            with tarfile.open(data / f"{split}-0.tar", "w") as archive:
                for number in numbers:
                    for suffix in ("png", "txt"):
                        archive.add(data / f"{number}.{suffix}", f"{number}.{suffix}")
    small = open_dataset(data)
    monkeypatch.setattr(dataset_module, "IN_MEMORY", 2)
    large = open_dataset(data)
    assert isinstance(small.examples, tuple) and isinstance(large.examples, ExampleFile)
    assert tuple(large.examples) == small.examples and tuple(large.ids) == small.ids
    assert large.fingerprint() == small.fingerprint() and len(large) == 9
    for split in ("train", "val", "test"):
        assert tuple(large.select_split(split).examples) == small.select_split(split).examples
    assert tuple(large.take(3).examples) == small.examples[:3] and large[-1] == small[-1]
    assert np.array_equal(np.asarray(large.load_image(4)), np.asarray(small.load_image(4)))
    assert pickle.loads(pickle.dumps(large)).examples == small.examples
    assert not list((tmp_path / "cache").glob("tmp*"))
    with pytest.raises(ValueError, match=r"2 ids occur more than once \(first: a\)"):
        twice = [Example(name, data / "0.png", ("A",), None, "train") for name in "abcabd"]
        ImageTextDataset("twice", collect(twice))
