"""Training the generator: what it draws from the token set, and that the text comes to matter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tavq.commands.train_generator import main
from tavq.data.text_encoder import TextEncoder
from tavq.data.token_writer import write_tokens
from tavq.data.tokens import AllTexts, TokenMeta, TokenRecord, open_tokens
from tavq.generator import text_states, train
from tavq.generator.config import RUN_PRESETS, SamplingConfig
from tavq.generator.model import GeneratorModel
from tavq.generator.sampling import sample
from tavq.generator.text_states import open_states, pack_states
from tavq.generator.train import GeneratorTask, TokenExamples, train_generator
from tavq.training.checkpoint import tensor_hash
from tavq.training.loop import EVALUATED_FOLDER
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
    assert torch.equal(pack_states(encoder, SUBJECTS, 12, tmp_path).rows([2, 0]).states, rows.states)
    with pytest.raises(TypeError):
        pack_states(encoder, SUBJECTS[:2], 12, tmp_path)


def test_states_that_are_encoded_in_each_batch_equal_those_on_disk(tmp_path, monkeypatch):
    encoder = TextEncoder()
    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path))
    texts = [f"{subject} number {number}" for number in range(3) for subject in SUBJECTS]
    live = open_states(encoder, texts, 6, "none")
    chosen = [7, 0, 11, 7]
    with pytest.warns(UserWarning, match="of 4 texts are longer than 6 tokens") as heard:
        rows = [live.rows(chosen) for _ in range(3)][-1]
    assert len(heard) == 1 and not list(tmp_path.iterdir()), "one warning, and nothing on disk"
    with pytest.warns(UserWarning):
        kept = open_states(encoder, texts, 6, "disk").rows(chosen)
    assert torch.equal(rows.mask, kept.mask) and list(tmp_path.iterdir())
    torch.testing.assert_close(rows.states, kept.states, atol=2e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_generator_learns_alike_with_states_on_disk_and_in_each_batch(tokens, tmp_path):
    logs = {}
    for cache in ("disk", "none"):
        flags = ["--preset", "tiny", "--tokens", str(tokens), "--cache", cache, "--training.log-every", "1"]
        steps = ["--training.steps", "6", "--training.evaluate-every", "6"]
        main([*flags, *steps, "--out", str(tmp_path / cache)])
        logs[cache] = [
            line["loss"] for line in read_log(tmp_path / cache / "training/log.jsonl") if "loss" in line
        ]
    assert len(logs["disk"]) == 6
    np.testing.assert_allclose(logs["none"], logs["disk"], rtol=2e-3)


@pytest.mark.slow
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


@pytest.mark.slow
def test_null_text_replaces_a_share_of_the_captions(tokens):
    run = dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens, null_text_rate=0.25)
    task = GeneratorTask(run)
    seen = []
    task.model.generator.forward = lambda ids, states, mask, order: (
        seen.append(mask) or torch.zeros(*ids.shape, 64)
    )
    batch = task.collate([task.dataset[(n % 32, n)] for n in range(400)])
    task.model(batch, 0)
    assert 0.18 < (~seen[0].any(1)).float().mean() < 0.32
    assert torch.equal(seen[0][seen[0].any(1)], batch["mask"][seen[0].any(1)])


def test_a_foreign_codebook_is_refused(tokens):
    run = dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens)
    with pytest.raises(ValueError, match="the generator learned ids of"):
        GeneratorTask(run, codebook=CODEBOOK.flip(0))


@pytest.mark.slow
def test_training_goes_on_from_a_generator_whose_tokenizer_was_trained_further(tokens, tmp_path):
    run = dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens)
    before = GeneratorTask(run).model.generator
    for parameter in before.parameters():
        torch.nn.init.normal_(parameter)
    before.config = dataclasses.replace(before.config, codebook_hash="before")
    before.card = "---\n---\n# The first training\n"
    before.save_pretrained(tmp_path / "before")
    task = GeneratorTask(
        dataclasses.replace(RUN_PRESETS["flickr8k"], tokens=tokens, start=tmp_path / "before")
    )
    generator = task.model.generator
    generator.check_codebook(tensor_hash(CODEBOOK))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), generator.parameters(), strict=True))
    assert task.earlier_card == before.card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_size": (2, 2)}, r"has grid_size \(2, 2\), .* needs \(4, 4\)"),
        ({"num_codes": 32}, "has num_codes 32, .* needs 64"),
        ({"text_encoder_hash": "another"}, "has text_encoder_hash another, .* needs"),
    ],
)
def test_a_start_that_does_not_fit_the_tokens_is_refused(tokens, tmp_path, change, message):
    run = dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens)
    fitting = GeneratorTask(run).shipped.config
    GeneratorModel(dataclasses.replace(fitting, **change)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        GeneratorTask(dataclasses.replace(run, start=tmp_path))


@pytest.mark.slow
def test_the_first_weights_come_from_the_seed_of_the_run(tokens):
    run = dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens)
    torch.manual_seed(1)
    first = GeneratorTask(run).shipped.token_embedding.weight
    torch.manual_seed(2)
    assert torch.equal(GeneratorTask(run).shipped.token_embedding.weight, first)
    other = dataclasses.replace(run, training=dataclasses.replace(run.training, seed=1))
    assert not torch.equal(GeneratorTask(other).shipped.token_embedding.weight, first)


@pytest.mark.slow
def test_the_weights_with_the_lowest_validation_loss_are_saved(tokens, tmp_path, monkeypatch):
    losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(GeneratorTask, "evaluate", lambda *_: {"loss": next(losses)})
    training = dataclasses.replace(
        RUN_PRESETS["tiny"].training, steps=3, evaluate_every=1, batch_size=2, keep_evaluated=True
    )
    train_generator(dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens, out=tmp_path, training=training))
    evaluated = sorted((tmp_path / "training" / EVALUATED_FOLDER).glob("*/model.safetensors"))
    saved = (tmp_path / "model.safetensors").read_bytes()
    assert [path.read_bytes() == saved for path in evaluated] == [False, True, False]


def test_the_loss_is_smoothed_and_the_report_is_not(tokens):
    run = dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens, label_smoothing=0.2, null_text_rate=0.0)
    task = GeneratorTask(run)
    logits = torch.randn(8, 16, 64)
    task.model.generator.forward = lambda ids, states, mask, order: logits
    batch = task.collate([task.dataset[(n, n)] for n in range(8)])
    output = task.model(batch, 0)

    log_probability = logits.log_softmax(-1)
    nats = -log_probability.gather(-1, batch["ids"][..., None]).mean()
    uniform = -log_probability.mean()
    torch.testing.assert_close(output.report["nats_per_token"], nats)
    torch.testing.assert_close(output.loss, 0.8 * nats + 0.2 * uniform)


def test_muon_trains_the_matrices_of_the_blocks_alone(tokens):
    task = GeneratorTask(dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens))
    config = dataclasses.replace(task.run.training, optimizer="muon")
    muon = [group for group in task.parameter_groups(config) if group.get("muon")]
    expected = {id(parameter) for parameter in task.model.generator.blocks.parameters()}
    assert len(muon) == 1 and {id(parameter) for parameter in muon[0]["params"]} == expected


@pytest.mark.slow
def test_evaluation_is_the_mean_over_all_tokens_of_unchanged_images_with_first_captions(tokens, monkeypatch):
    monkeypatch.setattr(train, "EVALUATION_BATCH", 3)  # 3 + 3 + 2
    task = GeneratorTask(dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens))
    generator = task.shipped.eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    val = open_tokens(tokens, "val")
    texts = pack_states(TextEncoder(), [captions[0] for captions in val.captions], 32).rows(range(8))
    ids = val.ids[:, 0].flatten(1).long()
    expected = {}
    for name, mask in (("loss", texts.mask), ("loss_null_text", texts.mask & False)):
        log_probability = generator(ids, texts.states, mask).log_softmax(-1)
        expected[name] = -log_probability.gather(-1, ids[..., None]).mean().item()
    assert task.evaluate(generator, 0) == pytest.approx(expected, rel=1e-5)
    assert expected["loss"] != pytest.approx(expected["loss_null_text"], rel=1e-3)


@pytest.mark.slow
def test_the_sample_images_are_those_of_the_sampling_settings(tokens):
    greedy = SamplingConfig(temperature=0.0, guidance_scale=2.0)
    shown = []

    def decode(ids: torch.Tensor) -> torch.Tensor:
        shown.append(ids)
        return torch.zeros(len(ids), 3, 8, 8)

    run = dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens, sampling=greedy)
    task = GeneratorTask(run, decode)
    generator = task.shipped.eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert task.sample_images(generator)["samples"].dtype == np.uint8
    expected = sample(generator, task.val_texts.rows(range(8)), list(range(8)), greedy)
    assert torch.equal(shown[0].flatten(1), expected)
    assert GeneratorTask(run).sample_images(generator) == {}


def test_the_token_embeddings_start_from_the_codebook(tokens):
    task = GeneratorTask(dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens), codebook=CODEBOOK)
    embedded = torch.nn.functional.normalize(task.shipped.token_embedding.weight, dim=-1)
    torch.testing.assert_close(embedded @ embedded.T, CODEBOOK @ CODEBOOK.T, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_flag_that_start_would_overwrite_is_refused(tokens, tmp_path):
    run = dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens)
    GeneratorTask(run).shipped.save_pretrained(tmp_path)
    start = dataclasses.replace(run, start=tmp_path)
    assert GeneratorTask(start).run.model == run.model
    wider = dataclasses.replace(start, model=dataclasses.replace(run.model, hidden_width=128))
    with pytest.raises(
        ValueError, match=r"model.hidden_width is 128, .* has 64; leave out --model.hidden-width"
    ):
        GeneratorTask(wider)


def test_a_tokenizer_by_name_alone_is_refused(tokens, tmp_path):
    run = dataclasses.replace(RUN_PRESETS["tiny"], tokens=tokens, out=tmp_path, tokenizer=tmp_path)
    with pytest.raises(ValueError, match="were not handed in; use the command `tavq train generator`"):
        train_generator(run, codebook=CODEBOOK)


def test_states_of_other_encoders_lengths_and_texts_are_encoded_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(text_states, "TEXTS_AT_ONCE", 3)  # 3 + 1
    encoder = TextEncoder()
    packed = pack_states(encoder, SUBJECTS, 12, tmp_path)
    torch.testing.assert_close(
        packed.rows(range(4)).states, encoder.token_states(SUBJECTS, 12).states, atol=2e-3, rtol=1e-3
    )
    assert pack_states(encoder, SUBJECTS, 9, tmp_path).rows([0]).mask.shape == (1, 9)
    pack_states(encoder, SUBJECTS[::-1], 12, tmp_path)
    monkeypatch.setattr(encoder, "hash", "another")
    pack_states(encoder, SUBJECTS, 12, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


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


def test_long_texts_are_drawn_like_captions(tmp_path):
    records = [
        TokenRecord("a", "train", np.zeros((1, 2, 2), int), ("one", "two"), "all of a"),
        TokenRecord("b", "train", np.zeros((1, 2, 2), int), ("three",)),
    ]
    write_tokens(tmp_path / "few", records, TokenMeta(8, (2, 2), "abc", "def", "made up", 16))
    longer = dataclasses.replace(open_tokens(tmp_path / "few", "train"), with_long_texts=True)
    assert list(AllTexts(longer)) == ["one", "two", "all of a", "three"]
    drawn = {TokenExamples(longer)[(0, draw)][1] for draw in range(60)}
    assert drawn == {0, 1, 2}
    assert TokenExamples(longer)[(1, 0)][1] == 3


def test_random_orders_turn_to_raster_order():
    run = dataclasses.replace(RUN_PRESETS["tiny"], random_order_until=0.5, raster_order_from=0.75)
    shares = [train.random_order_share(progress, run) for progress in (0, 0.49, 0.5, 0.625, 0.74, 0.75, 1)]
    assert shares == pytest.approx([1, 1, 1, 0.5, 0.04, 0, 0])
    assert train.random_order_share(0.0, RUN_PRESETS["flickr8k"]) == 0
    with pytest.raises(ValueError, match="expected 0 <= random_order_until <= raster_order_from <= 1"):
        dataclasses.replace(run, raster_order_from=0.3)


def test_each_image_has_an_order_of_its_own_and_the_last_steps_have_none():
    run = dataclasses.replace(RUN_PRESETS["tiny"], random_order_until=0.5, raster_order_from=0.75)
    model = train.GeneratorTrainer(run, torch.nn.Identity())
    steps, ids = run.training.steps, torch.zeros(256, 16, dtype=torch.long)
    torch.manual_seed(0)
    first, middle, last = (model._orders(ids, round(part * steps)) for part in (0, 0.625, 0.75))
    raster = torch.arange(16)
    assert last is None and len(first.unique(dim=0)) == 256
    assert torch.equal(first.sort(1).values, raster.expand(256, -1))
    assert 0.35 < float((middle == raster).all(1).float().mean()) < 0.65


@pytest.mark.slow
def test_training_in_random_orders_ends_with_a_generator_that_follows_the_text_in_raster_order(
    tokens, tmp_path
):
    flags = [
        "--preset",
        "tiny",
        "--tokens",
        str(tokens),
        "--training.steps",
        "160",
        "--training.evaluate-every",
        "160",
    ]
    main([*flags, "--random-order-until", "0.5", "--raster-order-from", "0.75", "--out", str(tmp_path)])
    (line,) = [line for line in read_log(tmp_path / "training" / "log.jsonl") if "val/loss" in line]
    assert line["val/loss"] < line["val/loss_null_text"] - 0.05


def test_a_share_of_another_token_set_joins_the_training_with_its_own_captions(tokens, tmp_path):
    scene = np.full((1, 4, 4), 63)
    records = [
        TokenRecord(f"more{n}", split, scene, ("made up",)) for n, split in enumerate(("train", "val") * 3)
    ]
    meta = TokenMeta(64, (4, 4), tensor_hash(CODEBOOK), "tokenizer-hash", "more", 32)
    write_tokens(tmp_path / "more", records, meta)
    run = dataclasses.replace(
        RUN_PRESETS["tiny"], tokens=tokens, more_tokens=tmp_path / "more", more_share=0.25, out=tmp_path
    )
    task = GeneratorTask(run)
    assert len(task.dataset) == 32
    drawn = [task.dataset[(index % 32, index)] for index in range(2000)]
    from_more = [example for example in drawn if int(example[0][0]) == 63]
    assert 0.2 < len(from_more) / len(drawn) < 0.3
    assert {caption for _, caption in from_more} == set(range(64, 70)), (
        "after the 64 captions of the first set"
    )
    texts = task.collate(from_more[:1])
    expected = TextEncoder().token_states(["made up"], task.texts.max_tokens)
    torch.testing.assert_close(texts["states"], expected.states, atol=2e-3, rtol=1e-3)

    foreign = dataclasses.replace(meta, codebook_hash="another")
    write_tokens(tmp_path / "foreign", records, foreign)
    with pytest.raises(
        ValueError, match="holds ids of another tokenizer than the other tokens; encode its images"
    ):
        GeneratorTask(dataclasses.replace(run, more_tokens=tmp_path / "foreign"))
