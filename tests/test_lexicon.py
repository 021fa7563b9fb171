"""Image words: what they say, how many count, and how prompts and images go together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tavq.commands.export import main as export
from tavq.commands.generate import main as generate
from tavq.commands.train_lexicon import main as train_lexicon
from tavq.data.text_encoder import TokenStates
from tavq.data.token_writer import write_tokens
from tavq.data.tokens import TokenMeta, TokenRecord
from tavq.generator.config import LEXICON_PRESETS, LexiconRun
from tavq.generator.lexicon import Lexicon, with_words
from tavq.generator.train_lexicon import LexiconTask
from tavq.pipeline import Pipeline
from tavq.training.run_folder import read_log

from .demo_server import PHOTO

pytestmark = pytest.mark.slow  # a lexicon is trained


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a generator that does not ignore what it is given, and with a lexicon."""
    folder = tmp_path_factory.mktemp("lexicon") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    pipeline = Pipeline(folder)
    generator, config = pipeline.generator, pipeline.generator.config
    torch.manual_seed(0)
    for name, weight in generator.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "head.weight")):
            torch.nn.init.normal_(weight, std=0.3)
    generator.save_pretrained(folder / "generator")

    tokens = folder.parent / "tokens"
    rng = np.random.default_rng(0)
    h, w = config.grid_size
    scenes = rng.integers(config.num_codes, size=(4, 1, h, w))
    records = [
        TokenRecord(f"{split}{n}", split, scenes[n % 4], ("a dog",))
        for split in ("train", "val")
        for n in range(16)
    ]
    tokenizer = pipeline.tokenizer
    meta = TokenMeta(
        config.num_codes, (h, w), tokenizer.codebook_hash, "t", "made-up", tokenizer.image_size_px
    )
    write_tokens(tokens, records, meta)
    train_lexicon([
        *("--preset", "tiny", "--tokens", str(tokens), "--generator", str(folder / "generator")),
        *("--out", str(folder / "lexicon"), "--training.steps", "60"),
    ])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Pipeline:
    return Pipeline(checkpoint)


def test_words_tell_the_frozen_generator_which_image_is_meant(checkpoint: Path):
    lines = [
        line for line in read_log(checkpoint / "lexicon" / "training" / "log.jsonl") if "val/loss" in line
    ]
    first, last = lines[0], lines[-1]
    assert last["val/loss"] < last["val/loss_text"] - 0.1 and last["val/loss"] < first["val/loss"]
    assert last["val/loss_text"] == first["val/loss_text"], "the generator is trained, too"


def test_training_leaves_the_generator_alone_and_in_evaluation_mode(checkpoint: Path):
    run = LexiconRun(
        tokens=checkpoint.parent / "tokens",
        generator=checkpoint / "generator",
        model=LEXICON_PRESETS["tiny"].model,
    )
    task = LexiconTask(run)
    task.model.train()
    assert task.shipped.training and not task.model.generator.training
    groups = task.parameter_groups(run.training)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in task.shipped.parameters()}

    example = task.collate([task.dataset[(0, 0)], task.dataset[(1, 0)]])
    task.model(example, 0).loss.backward()
    assert all(parameter.grad is None for parameter in task.model.generator.parameters())
    assert all(parameter.grad is not None for parameter in task.shipped.parameters())


def test_tail_drop_hides_the_last_words_and_keeps_the_first(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    run = LexiconRun(
        tokens=checkpoint.parent / "tokens",
        generator=checkpoint / "generator",
        model=LEXICON_PRESETS["tiny"].model,
        text_rate=0.0,
    )
    task = LexiconTask(run)
    masks = []
    forward = type(task.model.generator).forward

    def noted(model, ids, states, mask):
        masks.append(mask)
        return forward(model, ids, states, mask)

    monkeypatch.setattr(type(task.model.generator), "forward", noted)
    batch = task.collate([task.dataset[(0, draw)] for draw in range(64)])
    task.model(batch, 0)
    counts = masks[0][:, :4].sum(1)
    assert set(counts.tolist()) == {1, 2, 3, 4} and not masks[0][:, 4:].any()
    assert (masks[0][:, :4] == (torch.arange(4) < counts[:, None])).all(), "a word in the middle is hidden"


def test_words_stand_before_the_text_which_is_cut_off_where_it_does_not_fit():
    words = torch.full((1, 2, 3), 7.0)
    texts = TokenStates(torch.arange(12.0).view(1, 4, 3), torch.tensor([[True, True, True, False]]))
    joined = with_words(words, texts)
    assert torch.equal(joined.states, torch.cat([words, texts.states[:, :2]], 1))
    assert joined.mask.tolist() == [[True, True, True, True]]
    alone = with_words(words, TokenStates(texts.states, texts.mask & False))
    assert alone.mask.tolist() == [[True, True, False, False]]
    with pytest.raises(ValueError, match="5 image words do not fit into the generator's 4 slots; take fewer"):
        with_words(torch.zeros(1, 5, 3), texts)


def test_an_image_draws_without_a_prompt_and_the_number_of_words_matters(pipeline: Pipeline):
    one, again, more = (
        pipeline.generate(None, images=PHOTO, image_words=count, temperature=0)[0] for count in (1, 1, 4)
    )
    assert torch.equal(one.ids, again.ids) and not torch.equal(one.ids, more.ids)
    assert one.recipe["image_words"] == 1 and one.recipe["prompt"] == ""
    unconditional = pipeline.generate(None, temperature=0)[0]
    assert not torch.equal(one.ids, unconditional.ids)


def test_guidance_leads_from_the_image_alone_to_image_and_prompt(pipeline: Pipeline):
    job = pipeline_job("a dog")
    words = pipeline.image_words(pipeline.encode(PHOTO), 2)
    led_to, away = pipeline.conditions([job], words)
    assert away is not None and away.mask.sum() == 2 and led_to.mask.sum() > 2
    assert torch.equal(led_to.states[:, :2], away.states[:, :2]) and torch.equal(away.states[0, :2], words)

    none, away = pipeline.conditions([pipeline_job("")], words)
    assert away is None and none.mask.sum() == 2
    _, away = pipeline.conditions([pipeline_job("a dog", "a cat")], words)
    assert away is not None and away.mask.sum() > 2


def pipeline_job(prompt: str, negative: str | None = None):
    from tavq.inputs import Job

    return Job(prompt, 0, negative)


def test_several_images_give_their_words_in_order(pipeline: Pipeline):
    other = PHOTO.with_name("coffee.jpg")
    both = pipeline.image_words(pipeline.encode([PHOTO, other]), 2)
    assert both.shape[0] == 4
    assert torch.equal(both[:2], pipeline.image_words(pipeline.encode(PHOTO), 2))
    assert torch.equal(both[2:], pipeline.image_words(pipeline.encode(other), 2))
    with pytest.raises(ValueError, match="image_words is 5, expected 1 to 4"):
        pipeline.image_words(pipeline.encode(PHOTO), 5)


def test_the_command_draws_from_images_and_refuses_to_repeat_what_its_recipe_does_not_hold(
    checkpoint: Path, tmp_path: Path, capsys
):
    flags = ["--checkpoint", str(checkpoint), "--out", str(tmp_path), "--device", "cpu"]
    generate(["in the snow", "--image", str(PHOTO), "--image-words", "2", *flags])
    recipe = json.loads((tmp_path / "result.jsonl").read_text())
    assert recipe["image_words"] == 2 and recipe["prompt"] == "in the snow"
    generate(["--image", str(PHOTO), *flags])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        generate(["--from-png", str(tmp_path / "000000.png"), *flags])
    assert left.value.code == 2
    assert "was generated from images, which its recipe does not hold; use --image" in capsys.readouterr().err


def test_a_checkpoint_without_a_lexicon_or_with_another_s_says_what_to_do(
    tiny_checkpoint: Path, checkpoint: Path, tmp_path: Path
):
    with pytest.raises(
        FileNotFoundError, match="has no lexicon, which images as prompts need; train one with"
    ):
        Pipeline(tiny_checkpoint).generate(None, images=PHOTO)
    mixed = tmp_path / "mixed"
    shutil.copytree(tiny_checkpoint, mixed)
    shutil.copytree(checkpoint / "lexicon", mixed / "lexicon")
    with pytest.raises(ValueError, match=r"the lexicon was trained for generator .*; train another with"):
        Pipeline(mixed).generate(None, images=PHOTO)


def test_a_lexicon_is_exported_in_half_precision(checkpoint: Path, tmp_path: Path, pipeline: Pipeline):
    export([str(checkpoint / "lexicon"), "--out", str(tmp_path)])
    assert load_file(tmp_path / "model.safetensors")["queries"].dtype == torch.float16
    ids = pipeline.encode(PHOTO).flatten(1)
    with torch.inference_mode():
        exact, rounded = pipeline.lexicon(ids), Lexicon.from_pretrained(tmp_path).eval()(ids)
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)
