"""Training the captioner end to end on a tiny token set: both stages, resume, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tavq.captioner.config import PRESETS, RUN_PRESETS, CaptionerRun, DecodingConfig
from tavq.captioner.dataset import quality_buckets
from tavq.captioner.decoding import decode_captions
from tavq.captioner.model import Captioner
from tavq.captioner.reward import CiderD, with_end
from tavq.captioner.self_critical import advantages, sample_rollout, self_critical_loss
from tavq.captioner.train import CaptionerTask, train_captioner
from tavq.captioner.vocabulary import metric_words
from tavq.commands.train_captioner import main
from tavq.data.token_writer import write_tokens
from tavq.data.tokens import TokenMeta, TokenRecord, open_tokens
from tavq.tokenizer.caption_scores import caption_alignment_scores
from tavq.training.provenance import TokenProvenance

NOUNS, PLACES = ("dog", "girl", "man", "bird"), ("snow", "grass", "water", "street")


@pytest.fixture(scope="module")
def tokens_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose captions can be read off their tokens: the first half says who, the second where."""
    random = np.random.default_rng(0)
    records = []
    for i in range(72):
        who, where = random.integers(0, 4, 2)
        ids = np.empty((2, 2, 4), dtype=np.int64)
        ids[:, 0], ids[:, 1] = who, 4 + where
        captions = (
            f"A {NOUNS[who]} in the {PLACES[where]} .",
            f"The {NOUNS[who]} runs over {PLACES[where]} .",
        )
        records.append(TokenRecord(f"{i}.jpg", "train" if i < 60 else "val", ids, captions))
    folder = tmp_path_factory.mktemp("captioner") / "tokens"
    write_tokens(folder, records, TokenMeta(8, (2, 4), "abc", "def", "made up", 16))
    return folder


@pytest.fixture(scope="module")
def trained_dir(tokens_dir: Path) -> Path:
    out = tokens_dir.parent / "captioner"
    main(["--preset", "tiny", "--tokens", str(tokens_dir), "--out", str(out), "--training.steps", "150"])
    return out


@pytest.mark.slow
def test_cross_entropy_learns_to_read_the_tokens(trained_dir: Path, tokens_dir: Path):
    captioner, val = Captioner.from_pretrained(trained_dir), open_tokens(tokens_dir, "val")
    assert captioner.config.codebook_hash == "abc"
    assert captioner.config.provenance == TokenProvenance("made up", "def", "cross-entropy")
    found = decode_captions(captioner, val.ids[:, 0].long())
    right = [
        sum(word in caption.text.split() for word in NOUNS + PLACES if word in references[0].split())
        for [caption], references in zip(found, val.captions, strict=True)
    ]
    assert np.mean(right) > 1.5  # of a noun and a place each


@pytest.mark.slow
def test_self_critical_raises_the_reward(trained_dir: Path, tokens_dir: Path):
    tokens = open_tokens(tokens_dir, "train")
    references = [[with_end(metric_words(text)) for text in texts] for texts in tokens.captions]
    reward, captioner = CiderD(references), Captioner.from_pretrained(trained_dir)
    ids, images = tokens.ids[:, 0].flatten(1).long(), list(range(60))
    optimizer = torch.optim.Adam(captioner.parameters(), lr=1e-3)
    torch.manual_seed(0)
    rewards = []
    for _ in range(12):
        output = self_critical_loss(captioner, ids, images, reward, samples=4, baseline="samples")
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(output.report["reward"])
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.15


def test_hand_worked_advantages():
    scores = torch.tensor([[1.0, 2.0, 6.0, 4.0]])
    assert advantages(scores, "greedy").tolist() == [[-3.0, -2.0, 2.0]]
    assert advantages(scores, "samples").tolist() == [[-3.0, -1.5, 4.5]]


def test_roll_out_draws_from_the_model_and_ends_with_greedy(trained_dir: Path, tokens_dir: Path):
    captioner, val = Captioner.from_pretrained(trained_dir), open_tokens(tokens_dir, "val")
    ids = val.ids[:, 0].flatten(1).long()
    torch.manual_seed(0)
    rollout = sample_rollout(captioner, ids, samples=3)
    assert rollout.words.shape[:2] == (12, 4) and rollout.ended.any()
    place = torch.arange(rollout.words.shape[-1])
    words_only = place < rollout.lengths[..., None]
    assert (rollout.words[~words_only] == captioner.text.pad_id).all()
    logits = captioner(ids, rollout.words)[:, -1]
    logits[..., captioner.text.suppressed_ids] = -torch.inf
    greedy, best = rollout.words[:, -1], logits.argmax(-1)[:, :-1]
    assert torch.equal(greedy[words_only[:, -1]], best[words_only[:, -1]])
    assert any(len({tuple(row) for row in words}) > 1 for words in rollout.words.tolist())
    cold = sample_rollout(captioner, ids, samples=2, temperature=1e-4).words
    assert torch.equal(cold[:, 0], cold[:, -1]) and torch.equal(cold[:, 1], cold[:, -1])


def test_the_second_stage_goes_on_from_the_first(trained_dir: Path, tokens_dir: Path, tmp_path: Path):
    arguments = ["--preset", "tiny-self-critical", "--tokens", str(tokens_dir), "--out", str(tmp_path)]
    main([*arguments, "--start", str(trained_dir), "--training.steps", "3"])
    second, first = Captioner.from_pretrained(tmp_path), Captioner.from_pretrained(trained_dir)
    assert second.config.provenance.stage == "self-critical"
    assert second.config.words == first.config.words
    assert not torch.equal(second.start_embedding.weight, first.start_embedding.weight)


def test_self_critical_needs_a_start(tokens_dir: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        main(["--preset", "tiny-self-critical", "--tokens", str(tokens_dir), "--out", str(tokens_dir / "x")])
    assert stop.value.code == 2 and "add --start DIR" in capsys.readouterr().err


def test_tokens_of_another_codebook_are_refused(trained_dir: Path, tokens_dir: Path, tmp_path: Path):
    records = [
        TokenRecord("0.jpg", split, np.zeros((1, 2, 4), int), ("a dog",)) for split in ("train", "val")
    ]
    write_tokens(tmp_path / "other", records, TokenMeta(8, (2, 4), "xyz", "def", "made up", 16))
    run = CaptionerRun(tokens=tmp_path / "other", start=trained_dir, stage="self-critical")
    with pytest.raises(ValueError, match="of codebook xyz, the captioner was trained on abc"):
        CaptionerTask(run)
    further = dataclasses.replace(run, tokenizer=tmp_path / "trained-further")
    captioner = CaptionerTask(further, torch.zeros(8, 6)).model.captioner
    captioner.check_codebook("xyz")
    before = Captioner.from_pretrained(trained_dir)
    embeddings = [model.image_encoder.code_embedding.weight for model in (captioner, before)]
    assert torch.equal(*embeddings)
    write_tokens(tmp_path / "other", records, TokenMeta(9, (2, 4), "xyz", "def", "made up", 16))
    with pytest.raises(ValueError, match="train a captioner anew"):
        CaptionerTask(further, torch.zeros(9, 6))


def test_the_codebook_gives_the_first_embeddings(tokens_dir: Path):
    run = CaptionerRun(tokens=tokens_dir, tokenizer=Path("somewhere"), min_word_count=1)
    codebook = torch.nn.functional.normalize(torch.randn(8, 6), dim=-1)
    task = CaptionerTask(run, codebook)
    torch.testing.assert_close(task.model.captioner.image_encoder.code_embedding.weight, codebook * 6**0.5)
    with pytest.raises(ValueError, match="no codebook of tokenizer somewhere"):
        train_captioner(run)


def test_examples_hold_a_variant_and_every_caption(tokens_dir: Path):
    run = CaptionerRun(tokens=tokens_dir, min_word_count=1)
    dataset = CaptionerTask(run).dataset
    example = dataset[(3, 17)]
    assert torch.equal(example["ids"], dataset[(3, 17)]["ids"])
    assert sorted(example["lengths"].tolist()) == [-1, -1, -1, 5, 5]
    texts = {
        tuple(row[:length].tolist())
        for row, length in zip(example["words"], example["lengths"], strict=True)
        if length > 0
    }
    assert texts == {tuple(dataset.words[text].tolist()) for text in dataset.tokens.captions_of(3)}


@pytest.mark.slow
def test_long_text_is_a_style_of_its_own(tmp_path: Path):
    dense = "a dog sits in the snow and looks at a red ball that lies before it on the white ground"
    ids = np.arange(8).reshape(1, 2, 4)
    records = [TokenRecord(f"{s}.jpg", s, ids, ("a dog in the snow",), dense) for s in ("train", "val")]
    write_tokens(tmp_path / "tokens", records, TokenMeta(8, (2, 4), "abc", "def", "made up", 16))
    model = dataclasses.replace(PRESETS["tiny"], long_words=24, dropout=0.0, token_dropout=0.0)
    training = dataclasses.replace(RUN_PRESETS["tiny"].training, steps=150, batch_size=4, evaluate_every=150)
    folders = {"tokens": tmp_path / "tokens", "out": tmp_path / "out"}
    run = dataclasses.replace(RUN_PRESETS["tiny"], **folders, model=model, training=training)
    train_captioner(run)
    captioner = Captioner.from_pretrained(tmp_path / "out")
    image = torch.arange(8)[None]
    assert decode_captions(captioner, image)[0][0].text == "a dog in the snow"
    assert decode_captions(captioner, image, DecodingConfig(style="long"))[0][0].text == dense


def test_quality_buckets_are_equally_full():
    scores = np.random.default_rng(0).normal(size=(60, 2))
    buckets = np.array(quality_buckets(list(scores), 4))
    assert np.bincount(buckets.ravel()).tolist() == [30] * 4
    assert buckets.ravel()[scores.argmax()] == 3 and buckets.ravel()[scores.argmin()] == 0


@pytest.mark.slow
def test_a_captioner_learns_a_word_for_how_well_a_caption_fits(
    tmp_path, tiny_checkpoint, tiny_tokenizer, capsys
):
    grid, hashes = tiny_tokenizer.grid_size, (tiny_tokenizer.codebook_hash, "the tokenizer's")
    random = np.random.default_rng(0)
    records = [
        TokenRecord(
            f"{number}.jpg", split, random.integers(64, size=(1, *grid)), ("A red cat.", "A dog runs.")
        )
        for number, split in enumerate(["train"] * 6 + ["val"] * 2)
    ]
    write_tokens(tmp_path / "tokens", records, TokenMeta(64, grid, *hashes, "made up", 32))
    flags = [
        "--preset",
        "tiny",
        "--tokens",
        tmp_path / "tokens",
        "--tokenizer",
        tiny_checkpoint / "tokenizer",
    ]
    few = ["--training.steps", 2, "--training.evaluate-every", 2, "--training.batch-size", 2]
    flags += ["--model.quality-buckets", 3, "--out", tmp_path / "captioner"]
    main([str(word) for word in [*flags, *few]])
    captioner = Captioner.from_pretrained(tmp_path / "captioner")
    assert captioner.start_id() == 2 and captioner.start_embedding.num_embeddings == 3
    further = [
        "--preset",
        "tiny-self-critical",
        "--tokens",
        tmp_path / "tokens",
        "--start",
        tmp_path / "captioner",
    ]
    main([str(word) for word in [*further, "--out", tmp_path / "further", "--training.steps", 1]])
    assert "quality_buckets: 3" in (tmp_path / "further" / "training" / "config.yaml").read_text()
    meta = TokenMeta(64, grid, "another", "tokenizer", "made up", 32)
    write_tokens(tmp_path / "others", records, meta)
    with pytest.raises(SystemExit):
        main([str(word) for word in [*flags, *few, "--tokens", tmp_path / "others"]])
    assert "was made by another tokenizer" in capsys.readouterr().err
    fit = caption_alignment_scores(tiny_tokenizer, tmp_path / "tokens")
    assert [scores.shape for scores in fit] == [(2,)] * 6 and all((scores < 0).all() for scores in fit)


def test_buckets_need_the_tokenizer_that_scores():
    model = dataclasses.replace(PRESETS["tiny"], quality_buckets=3)
    with pytest.raises(ValueError, match="name the --tokenizer that gives it"):
        dataclasses.replace(CaptionerRun(), model=model)
