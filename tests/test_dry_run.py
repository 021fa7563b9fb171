"""`--dry-run` of a training: what it prints, and that it writes nothing."""

import re

import pytest
import torch

from tavq.cli import main
from tavq.training.dry_run import batch_shapes, num_parameters


@pytest.mark.slow
def test_a_dry_run_prints_shapes_parameters_memory_and_time_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["train", "tokenizer", "--preset", "tiny", "--training.batch-size", "2", "--dry-run"])
    printed = capsys.readouterr().out
    assert re.search(r"^image +\(2, 3, 32, 32\) float32$", printed, flags=re.MULTILINE)
    counts = re.search(r"^parameters +([\d,]+) in the tokenizer, ([\d,]+) with", printed, flags=re.MULTILINE)
    shipped, trained = (int(count.replace(",", "")) for count in counts.groups())
    assert 0 < shipped < trained
    assert re.search(r"^memory +\d+\.\d GiB", printed, flags=re.MULTILINE)
    assert re.search(r"^in all +about .* for 60 steps on cpu", printed, flags=re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_shapes_of_nested_batches_are_named():
    batch = {"image": torch.zeros(2, 3), "texts": [torch.zeros(1, dtype=torch.int64)], "name": "a"}
    assert list(batch_shapes(batch)) == [("image", "(2, 3) float32"), ("texts[0]", "(1,) int64")]


def test_only_what_is_trained_counts():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert num_parameters(model) == 6
