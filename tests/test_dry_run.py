"""`--dry-run` of each training: what it prints, and that it writes nothing."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tavq.cli import main
from tavq.data.token_writer import write_tokens
from tavq.data.tokens import TokenMeta, TokenRecord
from tavq.tokenizer.model import TAVQTokenizer
from tavq.training.dry_run import batch_shapes, num_parameters

SMALL = ["--training.batch-size", "2"]


@pytest.fixture(scope="module")
def tokens(tiny_tokenizer: TAVQTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token set that the tiny tokenizer could have made."""
    random = np.random.default_rng(0)
    h, w = tiny_tokenizer.grid_size
    records = [
        TokenRecord(str(n), split, random.integers(0, 64, (1, h, w)), ("a dog runs", "a cat on the grass"))
        for n, split in enumerate(["train"] * 8 + ["val"] * 2)
    ]
    meta = TokenMeta(tiny_tokenizer.num_codes, (h, w), tiny_tokenizer.codebook_hash, "weights", "made up", 32)
    folder = tmp_path_factory.mktemp("dry") / "tokens"
    write_tokens(folder, records, meta)
    return folder


@pytest.fixture
def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs `tavq train ... --dry-run` and returns what it printed, row by row."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> dict[str, str]:
        main(["train", *map(str, arguments), "--dry-run"])
        rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        shipped, trained = (
            int(count.replace(",", "")) for count in re.findall(r"[\d,]{3,}", rows["parameters"])
        )
        assert 0 < shipped <= trained
        assert re.match(r"\d+\.\d GiB", rows["memory"])
        assert re.match(r"\d+\.\d\d s a step at the start, \d+\.\d\d s with every loss on", rows["time"])
        assert list(tmp_path.iterdir()) == []
        return rows

    return run


@pytest.mark.slow
def test_of_the_tokenizer(dry_run):
    rows = dry_run("tokenizer", "--preset", "tiny", *SMALL)
    assert rows["image"] == "(2, 3, 32, 32) float32"
    assert re.match(r"all +about .* for 60 steps on cpu", rows["in"])


def test_of_the_decoder(dry_run, tiny_checkpoint):
    rows = dry_run("decoder", "--preset", "tiny", "--tokenizer", tiny_checkpoint / "tokenizer", *SMALL)
    assert " for 20 steps on cpu" in rows["in"]


def test_of_the_generator(dry_run, tokens):
    rows = dry_run("generator", "--preset", "tiny", "--tokens", tokens, *SMALL)
    assert rows["ids"] == "(2, 16) int64"
    assert "in the generator" in rows["parameters"]


def test_of_the_captioner(dry_run, tokens):
    rows = dry_run("captioner", "--preset", "tiny", "--tokens", tokens, *SMALL)
    assert rows["ids"] == "(2, 16) int64"
    assert "in the captioner" in rows["parameters"]


def test_of_self_critical_training(dry_run, tokens, tiny_checkpoint):
    start = ["--start", tiny_checkpoint / "captioner"]
    rows = dry_run("captioner", "--preset", "tiny-self-critical", "--tokens", tokens, *start, *SMALL)
    assert " for 10 steps on cpu" in rows["in"]


def test_shapes_of_nested_batches_are_named():
    batch = {"image": torch.zeros(2, 3), "texts": [torch.zeros(1, dtype=torch.int64)], "name": "a"}
    assert list(batch_shapes(batch)) == [("image", "(2, 3) float32"), ("texts[0]", "(1,) int64")]


def test_only_what_is_trained_counts():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert num_parameters(model) == 6
