"""Properties of parsers, dataset layouts and text units on odd input, found by hypothesis.

Whatever a file holds, it is read or refused with one line; nobody sees a traceback. Examples are derived from
the name of the test, so that every run tries the same ones.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tavq.alignment.units import split_units
from tavq.base.arguments import USER_ERRORS, parse
from tavq.commands.complete import completion_mask
from tavq.commands.generate import GenerateRun, read_prompts
from tavq.data.config import SPLITS
from tavq.data.dataset import join_captions
from tavq.data.images import UnreadableImageError, load_image
from tavq.data.layouts import open_dataset
from tavq.data.token_writer import write_tokens
from tavq.data.tokens import TokenMeta, TokenRecord, TokenSet, open_tokens

settings.register_profile(
    "bounded",
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("bounded")

# Lone surrogates are no text, but json can hold them.
TEXTS = st.text(st.characters(), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just("../a.png") | st.just("a.png"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
PNG = io.BytesIO()
Image.new("RGB", (8, 8)).save(PNG, format="PNG")


@st.composite
def damaged(draw: st.DrawFn, valid: Any) -> Any:
    """`valid`, a JSON value, with one part anywhere in it replaced by any JSON value, or taken out."""
    value = json.loads(json.dumps(valid))
    parent, part = None, value
    while isinstance(part, dict | list) and part and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        parent, part = (part, key), part[key]
    if parent is None:
        return draw(JSON)
    container, key = parent
    if draw(st.booleans()):
        container[key] = draw(JSON)
    else:
        del container[key]
    return value


def read_or_refused(read: Callable[[], Any]) -> Any:
    """Call `read`; return what it returns, or None if it refuses its input as a user's mistake."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()
    except USER_ERRORS as error:
        assert str(error) and len(str(error)) < 2000
        return None


def check_dataset(folder: Path) -> None:
    """Open the dataset in `folder`; whatever is accepted is well-formed and lies in the folder."""
    dataset = read_or_refused(lambda: open_dataset(folder))
    for example in dataset.examples if dataset else ():
        assert example.split in SPLITS
        assert example.captions and all(caption.strip() for caption in example.captions)
        assert all(isinstance(text, str) for text in (example.id, example.text, *example.captions))
        "".join((example.id, example.text)).encode()
        if isinstance(example.image, Path):
            assert example.image.resolve().is_relative_to(folder.resolve())


@pytest.fixture(scope="module")
def folder():
    """A folder with an image, in which each example writes its annotations."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "a.png").write_bytes(PNG.getvalue())
        (Path(name) / "annotations").mkdir()
        yield Path(name)


def written(path: Path, content: str | bytes) -> Path:
    """Write the one annotation file of an example; the file of the example before is replaced."""
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    path.write_bytes(content)
    return path


SENTENCES = [{"raw": "A dog."}, {"raw": "A"}]
KARPATHY = {"images": [{"filename": "a.png", "filepath": "", "split": "train", "sentences": SENTENCES}]}
COCO = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "annotations": [{"image_id": 1, "caption": "A dog."}, {"image_id": 1, "caption": "A"}],
}
METADATA = {"file_name": "a.png", "text": "A dog.", "split": "val", "long_text": "A dog on grass."}
FILES = {
    "dataset_a.json": KARPATHY,
    "annotations/captions_train.json": COCO,
    "metadata.jsonl": METADATA,
}


@pytest.mark.parametrize("name", FILES)
def test_valid_annotations_are_accepted(folder, name):
    file = written(folder / name, json.dumps(FILES[name]))
    assert len(open_dataset(folder)) == 1
    file.unlink()


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_damaged_annotations_are_read_or_refused(folder, name, data):
    file = written(folder / name, json.dumps(data.draw(damaged(FILES[name]))))
    check_dataset(folder)
    file.unlink()


@pytest.mark.parametrize("name", [*FILES, "captions.txt", "Flickr8k.token.txt", "a.txt", "a.tar"])
@given(content=st.binary(max_size=60) | TEXTS.map(lambda text: f"a.png,{text}\na.png#1\t{text}"))
def test_any_bytes_are_read_or_refused(folder, name, content):
    file = written(folder / name, content)
    check_dataset(folder)
    file.unlink()


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("long_text.jsonl", {"id": "a", "text": "A dog on grass."}),
        ("sharegpt4v.json", [{"image": "a.png", "conversations": [{"from": "gpt", "value": "A dog."}]}]),
    ],
)
@given(data=st.data())
def test_damaged_descriptions_are_read_or_refused(folder, name, valid, data):
    captions = written(folder / "a.txt", "A dog.")
    file = written(folder / name, json.dumps(data.draw(damaged(valid))))
    check_dataset(folder)
    file.unlink()
    captions.unlink()


@given(row=damaged(METADATA), key=TEXTS, extension=st.sampled_from(["png", "PNG", "jpg", "x", ""]))
def test_damaged_samples_of_shards_are_read_or_refused(folder, row, key, extension):
    with tarfile.open(folder / "train-0.tar", "w", errors="surrogatepass") as archive:
        for name, content in ((f"{key}.{extension}", PNG.getvalue()), (f"{key}.json", json.dumps(row))):
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    check_dataset(folder)
    (folder / "train-0.tar").unlink()


META = TokenMeta(8, (2, 3), "codebook", "tokenizer", "made up", 16)
GOOD_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def records(draw: st.DrawFn) -> list[TokenRecord]:
    variants = draw(st.integers(1, 3))
    count = draw(st.integers(1, 5))
    return [
        TokenRecord(
            draw(GOOD_TEXTS),
            "train",
            np.array(draw(st.lists(st.integers(0, 7), min_size=6 * variants, max_size=6 * variants))).reshape(
                variants, 2, 3
            ),
            tuple(draw(st.lists(GOOD_TEXTS, max_size=3))),
            draw(st.none() | GOOD_TEXTS),
        )
        for _ in range(count)
    ]


def as_records(tokens: TokenSet) -> list[tuple]:
    columns = (tokens.names, tokens.ids[:].tolist(), tokens.captions, tokens.long_texts)
    return list(zip(*columns, strict=True))


@given(written_records=records(), per_shard=st.integers(1, 4))
def test_tokens_are_read_as_they_were_written(written_records, per_shard):
    with tempfile.TemporaryDirectory() as name:
        write_tokens(Path(name) / "tokens", written_records, META, per_shard)
        found = as_records(open_tokens(Path(name) / "tokens", "train"))
    assert found == [(r.id, r.ids.tolist(), r.captions, r.long_text) for r in written_records]


@pytest.mark.slow
@given(written_records=records(), position=st.floats(0, 1), flipped=st.integers(1, 255))
def test_a_flipped_byte_in_a_shard_is_refused_or_gives_a_set_of_valid_ids(written_records, position, flipped):
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "tokens"
        write_tokens(directory, written_records, META)
        shard = directory / "train-000000.tar"
        content = bytearray(shard.read_bytes())
        content[int(position * (len(content) - 1))] ^= flipped
        shard.write_bytes(content)
        tokens = read_or_refused(lambda: open_tokens(directory, "train"))
        if tokens is not None:
            ids = tokens.ids[:]
            assert ids.min() >= 0 and ids.max() < META.num_codes
            assert ids.shape[2:] == META.grid_size


@pytest.mark.slow
@given(written_records=records(), share=st.floats(0, 0.999))
def test_a_shard_that_was_cut_anywhere_never_loses_an_image_in_silence(written_records, share):
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "tokens"
        write_tokens(directory, written_records, META)
        shard = directory / "train-000000.tar"
        content = shard.read_bytes()
        shard.write_bytes(content[: int(share * len(content))])
        tokens = read_or_refused(lambda: open_tokens(directory, "train"))
    assert tokens is None or len(tokens) == len(written_records)


IMAGE_HEADS = st.sampled_from([b"", PNG.getvalue()[:40], b"GIF89a", b"BM", b"II*\0"])


@given(content=st.binary(max_size=200), head=IMAGE_HEADS)
def test_no_bytes_make_an_image_reader_fail_otherwise_than_by_name(folder, content, head):
    file = written(folder / "odd.bin", head + content)
    try:
        assert load_image(file).mode == "RGB"
    except UnreadableImageError as error:
        assert "odd.bin" in str(error) and "\n" not in str(error)
    file.unlink()


@given(captions=st.lists(GOOD_TEXTS, max_size=4))
def test_joined_captions_are_sentences_on_one_line(captions):
    joined = join_captions(captions)
    assert joined == " ".join(joined.split())
    assert bool(joined) == any(caption.split() for caption in captions)
    if joined:
        assert joined.rstrip("\"')").endswith((".", "!", "?"))
        assert join_captions([joined]) == joined


ODD_LETTERS = "a dog's 3 cats.!?;,\"'()-_\u2028\t\n\u00e9\u4e2d\U0001f600"


@given(text=st.text(st.sampled_from(ODD_LETTERS), max_size=40) | GOOD_TEXTS)
def test_units_of_odd_text_are_clean_and_stay_the_same(text):
    units = read_or_refused(lambda: split_units(text))
    assert (units is None) == (not text.strip())
    if units is None:
        return
    assert split_units.__wrapped__(text) == units
    for kind in (units.words, units.phrases, units.sentences):
        assert len(set(kind)) == len(kind)
        assert all(unit and unit == " ".join(unit.split()) for unit in kind)
    assert all(unit == unit.lower() for unit in (*units.words, *units.phrases))
    assert bool(units.sentences) == any(character.isalnum() for character in text)


ARGUMENTS = st.sampled_from(["--seed", "--out", "-1", "7", "", "--", "a dog", "--num-images"]) | TEXTS
HELP = {"-h", "--help", "--tyro-print-completion", "--tyro-write-completion"}


@given(argv=st.lists(ARGUMENTS).filter(lambda argv: not HELP & set(argv)))
def test_any_command_line_is_read_or_refused_in_one_line(argv):
    try:
        assert isinstance(parse(GenerateRun, argv, prog="tavq generate"), GenerateRun)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).endswith("see tavq generate --help")


@given(keep=TEXTS | st.lists(st.integers(-99, 99).map(str), max_size=5).map(lambda n: "box=" + ",".join(n)))
def test_a_part_to_keep_leaves_something_to_generate_or_is_refused(keep):
    mask = read_or_refused(lambda: completion_mask(keep, 40, 30))
    if mask is not None:
        assert mask.shape == (30, 40) and not mask.all()


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
@given(content=st.binary(max_size=40) | TEXTS.map(lambda text: f'prompt\n{text}\n{{"prompt": "{text}"}}'))
def test_prompt_files_give_prompts_or_are_refused(folder, suffix, content):
    file = written(folder / f"prompts{suffix}", content)
    prompts = read_or_refused(lambda: read_prompts(file))
    assert prompts is None or all(prompt == prompt.strip() and prompt for prompt in prompts)
    file.unlink()
