"""Codebook health by hand, its alarm, and the sheet that `tavq codebook` draws."""

import numpy as np
import pytest
import torch
from PIL import Image

from tavq.alignment.unit_index import UnitIndex
from tavq.commands import codebook, train_tokenizer
from tavq.data.dataset import ImageTextDataset
from tavq.data.layouts import open_dataset
from tavq.data.text_encoder import TextEncoder
from tavq.tokenizer import contact_sheet, train
from tavq.tokenizer.codebook_usage import (
    SAMPLE_TOKENS,
    CodebookMonitor,
    codebook_usage,
    level_costs,
    level_ids,
    usage_chart,
)
from tavq.tokenizer.config import PRESETS
from tavq.tokenizer.model import TAVQTokenizer, TokenizerConfig
from tavq.tokenizer.provenance import TokenizerProvenance
from tavq.training.run_folder import read_log


@pytest.fixture(scope="module")
def shapes() -> ImageTextDataset:
    return open_dataset("shapes", "val").take(24)


@pytest.fixture(scope="module")
def aligned_folder(tmp_path_factory):
    torch.manual_seed(0)
    provenance = TokenizerProvenance(
        align="ot", aligned_levels=(1, 2, 3), text_encoder="minilm", text_encoder_hash=TextEncoder().hash
    )
    folder = tmp_path_factory.mktemp("aligned")
    TAVQTokenizer(TokenizerConfig.of(PRESETS["tiny"], provenance=provenance)).save_pretrained(folder)
    return folder


def test_use_by_hand():
    use = codebook_usage(torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]]), 8)
    assert use.counts.tolist() == [2, 2, 2, 2, 0, 0, 0, 0]
    assert (use.tokens, use.dead, use.usage) == (8, 4, 0.5)
    assert use.perplexity == pytest.approx(4)


def test_use_is_counted_over_a_fixed_number_of_tokens():
    ids = torch.arange(4 * SAMPLE_TOKENS) % 1024
    once, again = codebook_usage(ids, 1024), codebook_usage(ids, 1024)
    assert once.tokens == SAMPLE_TOKENS and torch.equal(once.counts, again.counts)
    assert once.perplexity == pytest.approx(1024, rel=0.02)  # a sample over all, not the head


def test_drift_is_the_mean_turn_of_a_code():
    monitor, ids = CodebookMonitor(), torch.arange(4)
    book = torch.eye(4)
    assert "drift" not in monitor.update(ids, book, 1)
    assert monitor.update(ids, book, 2)["drift"] == pytest.approx(0, abs=1e-6)
    turned = book.clone()
    turned[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # one code of four by a right angle
    assert monitor.update(ids, turned, 3)["drift"] == pytest.approx(0.25)


def test_a_collapse_is_warned_of_and_ends_the_run_where_a_limit_is_set():
    ids, book = torch.zeros(100, dtype=torch.long), torch.randn(64, 4)
    with pytest.warns(UserWarning, match=r"usage is only 1\.6% at step 7.*simvq"):
        CodebookMonitor().update(ids, book, 7)
    with pytest.raises(ValueError, match=r"usage is 1\.6% at step 7.*min_usage, 30\.0%.*lower --training"):
        CodebookMonitor(min_usage=0.3).update(ids, book, 7)


@pytest.mark.slow
def test_training_logs_the_health_and_stops_below_the_limit(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "open_dataset", lambda path, split: open_dataset(path, split).take(24))
    flags = ["--preset", "tiny", "--training.steps", "4", "--training.evaluate-every", "2"]
    flags += ["--training.batch-size", "2", "--losses.adversarial", "0"]
    train_tokenizer.main([*flags, "--out", str(tmp_path / "a")])
    first, last = (
        line for line in read_log(tmp_path / "a" / "training" / "log.jsonl") if "val/usage" in line
    )
    assert {"val/perplexity", "val/dead_codes", "val/words_cost", "val/sentences_gap"} <= first.keys()
    assert "val/drift" not in first and 0 < last["val/drift"] < 1
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train_tokenizer.main([*flags, "--min-usage", "1.01", "--out", str(tmp_path / "b")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "usage is" in error and "at step 2" in error


@pytest.mark.slow
def test_the_matched_cost_is_lower_where_codes_know_the_text(shapes):
    """Every image has one code, which lies where its own units lie (words, phrases, sentences apart)."""
    texts = UnitIndex.build(shapes, TextEncoder())
    centres = [
        torch.stack([texts.vectors_of(r).mean(0) for r in members_of(texts, level)]) for level in (1, 2, 3)
    ]

    class Knowing(TAVQTokenizer):
        def project(self, ids, level=3):
            return torch.nn.functional.normalize(centres[level - 1][ids], dim=-1)

    tokenizer = Knowing(
        TokenizerConfig.of(
            PRESETS["tiny"], provenance=TokenizerProvenance(align="ot", aligned_levels=(1, 2, 3))
        )
    )
    ids = torch.arange(len(shapes)).view(-1, 1, 1).expand(-1, 3, 16)
    found = level_costs(tokenizer, ids, texts, range(len(shapes)))
    assert all(found[f"{name}_gap"] > 0.02 for name in ("words", "phrases", "sentences")), found
    strangers = level_costs(tokenizer, ids.roll(3, 0), texts, range(len(shapes)))
    assert strangers["words_cost"] > found["words_cost"] + 0.03
    assert abs(strangers["words_gap"]) < 0.03


def members_of(texts: UnitIndex, level: int) -> list[torch.Tensor]:
    return [torch.from_numpy(rows) for rows in texts.kinds[level]]


def test_level_ids_are_those_of_encode_levels(tiny_tokenizer):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = level_ids(tiny_tokenizer, tiny_tokenizer(images).latents)
    assert torch.equal(ids, tiny_tokenizer.encode_levels(images).flatten(2))


def test_the_chart_falls_from_left_to_right():
    chart = usage_chart(codebook_usage(torch.tensor([0] * 50 + [1] * 5 + [2]), 8))
    heights = (chart[..., 0] != 255).sum(0)
    assert (np.diff(heights) <= 0).all() and heights[0] == len(chart) and heights[-1] == 0


def test_codes_are_the_most_used_then_others_in_use():
    counts = torch.tensor([5, 0, 9, 1, 2, 0, 3])
    codes = contact_sheet.select_codes(counts, 2, 2, seed=0)
    assert codes[:2] == [2, 0] and len(codes) == 4 and set(codes[2:]) < {3, 4, 6}
    assert codes == contact_sheet.select_codes(counts, 2, 2, seed=0)
    assert contact_sheet.select_codes(counts, 10, 10, seed=0) == [2, 0, 6, 4, 3]


def test_patches_come_from_different_photos_first():
    ids = torch.zeros(3, 2, 2, dtype=torch.long)
    ids[1, 1], ids[1, 0, 1], ids[2] = 1, 1, 1  # photo 0 has the code four times, photo 1 once
    found = contact_sheet.occurrences(ids, 0, 3, seed=0)
    assert {photo for photo, _, _ in found[:2]} == {0, 1} and len(set(found)) == 3
    assert contact_sheet.occurrences(ids, 7, 3, seed=0) == []


@pytest.mark.parametrize(
    ("place", "middle"), [((4, 4), (0.5, 0.5)), ((7, 0), (0.9, 0.1)), ((4, 1), (0.5, 0.3))]
)
def test_the_frame_marks_the_token_in_the_middle_but_at_the_edge(place, middle):
    photo, (y, x) = Image.new("RGB", (80, 80)), place
    photo.paste((255, 0, 0), (10 * x, 10 * y, 10 * x + 10, 10 * y + 10))
    patch = np.asarray(contact_sheet.patch_in_context(photo, place, (8, 8), 2)).astype(int)
    red = np.argwhere((patch[..., 0] > 200) & (patch[..., 1] < 60))
    white = np.argwhere((patch > 250).all(-1))
    assert np.allclose(red.mean(0) / len(patch), middle, atol=0.03)
    assert np.allclose(white.mean(0) / len(patch), middle, atol=0.03)


def test_near_words_are_those_of_the_code_and_not_those_near_all():
    class Narrow(TAVQTokenizer):
        """Code k lies at axis k, but nearer to axis 64, which all share."""

        def project(self, ids, level=3):
            common = torch.nn.functional.one_hot(torch.full_like(ids, 64), 65) * 2
            return torch.nn.functional.normalize(torch.eye(65)[ids] + common, dim=-1)

    words = torch.eye(65)[[64, 5, 9]]
    found = contact_sheet.nearest_words(Narrow(PRESETS["tiny"]), [5, 9], torch.arange(64), words, 3, 1)
    assert found == {5: [1], 9: [2]}


@pytest.mark.slow
def test_the_command_draws_a_sheet_and_prints_the_use(aligned_folder, tmp_path, capsys):
    flags = ["--data", "shapes", "--codes", "2", "--random-codes", "1", "--patches", "3"]
    codebook.main([str(aligned_folder), *flags, "--out", str(tmp_path / "sheet.png")])
    printed = capsys.readouterr().out
    assert "of 3,200 tokens of level 3 (shapes val)" in printed and printed.count("times") <= 3
    words = [line.split("times")[1].split(",") for line in printed.splitlines() if line.startswith("code")]
    assert all(len(near) == 5 for near in words)
    assert Image.open(tmp_path / "sheet.png").width == contact_sheet.LABEL_PX + 3 * 75


def test_a_plain_tokenizer_has_a_sheet_without_words(tmp_path, capsys):
    TAVQTokenizer(PRESETS["tiny"]).save_pretrained(tmp_path)
    flags = ["--data", "shapes", "--codes", "1", "--random-codes", "0", "--patches", "2"]
    codebook.main([str(tmp_path), *flags, "--out", str(tmp_path / "sheet.png")])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("code "))
    assert line.rstrip().endswith("times")
