"""Training the generator: what it draws from the token set, and that the text comes to matter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tavq.commands.train_generator import main
from tavq.data.text_encoder import TextEncoder
from tavq.data.tokens import TokenMeta, TokenRecord, open_tokens, write_tokens
from tavq.generator.model import GeneratorModel
from tavq.generator.sampling import SamplingConfig, sample
from tavq.generator.text_states import pack_states
from tavq.generator.train import RUN_PRESETS, GeneratorTask, TokenExamples, train_generator
from tavq.training.checkpoint import tensor_hash
from tavq.training.provenance import TokenProvenance
from tavq.training.run_folder import read_log

CODEBOOK = torch.nn.functional.normalize(
    torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), dim=-1
)
SUBJECTS = ("a dog in the grass", "a red car", "two children play football", "the sea at night")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A token set in which the caption decides every id: image i shows subject i % 4, in two variants."""
    directory = tmp_path_factory.mktemp("generator") / "tokens"

    def record(number: int, split: str) -> TokenRecord:
        subject = number % len(SUBJECTS)
        ids = np.arange(16).reshape(1, 4, 4) % 3 + 16 * subject + np.array([0, 4]).reshape(2, 1, 1)
        captions = (SUBJECTS[subject], SUBJECTS[subject] + " in a photo")
        return TokenRecord(f"{split}{number}", split, ids, captions)

    records = [record(n, "train") for n in range(32)] + [record(n, "val") for n in range(8)]
    meta = TokenMeta(64, (4, 4), tensor_hash(CODEBOOK), "tokenizer-hash", "made-up", 32)
    write_tokens(directory, records, meta)
    return directory


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path_factory.getbasetemp() / "generator-cache"))


def test_examples_draw_every_variant_and_caption_and_nothing_foreign(tokens):
    tokens = open_tokens(tokens, "train")
    examples = TokenExamples(tokens)
    drawn = [examples[(5, draw)] for draw in range(60)]
    assert {int(ids[0]) for ids, _ in drawn} == {16, 20}
    assert {caption for _, caption in drawn} == {10, 11}
    assert len({(int(ids[0]), caption) for ids, caption in drawn}) == 4


def test_packed_states_are_those_of_the_encoder_and_come_from_the_cache(tmp_path, monkeypatch):
    encoder = TextEncoder()
    packed = pack_states(encoder, SUBJECTS, 12, tmp_path)
    expected = encoder.token_states(SUBJECTS, 12)
    rows = packed.rows([2, 0])
    assert torch.equal(rows.mask, expected.mask[[2, 0]])
    torch.testing.assert_close(rows.states, expected.states[[2, 0]], atol=2e-3, rtol=1e-3)
    monkeypatch.setattr(encoder, "token_states", None)
    assert torch.equal(pack_states(encoder, SUBJECTS, 12, tmp_path).states, packed.states)
    with pytest.raises(TypeError):
        pack_states(encoder, SUBJECTS[:2], 12, tmp_path)


def test_training_learns_to_follow_the_text(tokens, tmp_path):
    shown = []

    def decode(ids: torch.Tensor) -> torch.Tensor:
        shown.append(ids)
        return torch.zeros(len(ids), 3, 8, 8)

    run = dataclasses.replace(
        RUN_PRESETS["tiny"],
        tokens=tokens,
        out=tmp_path / "run",
        tokenizer=tmp_path,
        training=dataclasses.replace(RUN_PRESETS["tiny"].training, steps=150, evaluate_every=75),
    )
    train_generator(run, decode=decode, codebook=CODEBOOK)
    log = {
        name: value for line in read_log(tmp_path / "run/training/log.jsonl") for name, value in line.items()
    }
    assert log["val/loss"] < 0.5 and log["val/loss_null_text"] > log["val/loss"] + 0.05
    assert {tuple(ids.shape) for ids in shown} == {(8, 4, 4)}
    generator = GeneratorModel.from_pretrained(tmp_path / "run")
    texts = pack_states(TextEncoder(), SUBJECTS, generator.config.max_text_tokens).rows(range(4))
    ids = sample(generator, texts, [0, 1, 2, 3], SamplingConfig(temperature=0.0))
    assert torch.equal(ids // 16, torch.arange(4)[:, None].expand(-1, 16))
    assert generator.config.text_encoder_hash == TextEncoder().hash
    assert generator.config.provenance == TokenProvenance("made-up", "tokenizer-hash")
    generator.check_codebook(tensor_hash(CODEBOOK))


def test_null_text_replaces_a_share_of_the_captions(tokens):
    run = dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens, null_text_rate=0.25)
    task = GeneratorTask(run)
    seen = []
    task.model.generator.forward = lambda ids, states, mask: seen.append(mask) or torch.zeros(*ids.shape, 64)
    batch = task.collate([task.dataset[(n % 32, n)] for n in range(400)])
    task.model(batch, 0)
    assert 0.18 < (~seen[0].any(1)).float().mean() < 0.32
    assert torch.equal(seen[0][seen[0].any(1)], batch["mask"][seen[0].any(1)])


def test_a_foreign_codebook_is_refused(tokens):
    run = dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens)
    with pytest.raises(ValueError, match="the generator learned ids of"):
        GeneratorTask(run, codebook=CODEBOOK.flip(0))


def test_training_goes_on_from_a_generator_whose_tokenizer_was_trained_further(tokens, tmp_path):
    run = dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens)
    before = GeneratorTask(run).model.generator
    before.config = dataclasses.replace(before.config, codebook_hash="before")
    before.card = "---\n---\n# The first training\n"
    before.save_pretrained(tmp_path / "before")
    task = GeneratorTask(
        dataclasses.replace(RUN_PRESETS["flickr8k"], tokens=tokens, start=tmp_path / "before")
    )
    generator = task.model.generator
    generator.check_codebook(tensor_hash(CODEBOOK))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), generator.parameters(), strict=True))
    task.save(task.shipped, tmp_path / "after", "---\n---\n# The second\n")
    assert (
        "# What it went on from: The first training"
        in GeneratorModel.from_pretrained(tmp_path / "after").card
    )
    other = dataclasses.replace(before.config, grid_size=(2, 2))
    GeneratorModel(other).save_pretrained(tmp_path / "before")
    with pytest.raises(ValueError, match=r"has grid_size \(2, 2\), .* needs \(4, 4\)"):
        GeneratorTask(dataclasses.replace(run, start=tmp_path / "before"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokens", "nowhere"], "no token set in nowhere; make one with: tavq tokenize"),
        (["--tokenizer", "somewhere"], "no directory somewhere"),
        (["--null-text-rate", "1.5"], "null_text_rate is 1.5"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["--preset", "tiny", "--out", str(tmp_path), *argv])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
