"""Every trainer takes ten steps in bfloat16, under autocast on the CPU."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tavq.captioner.config import RUN_PRESETS as CAPTIONER_RUNS
from tavq.captioner.train import CaptionerTask
from tavq.commands import train_captioner, train_generator, train_lexicon
from tavq.data.layouts import open_dataset
from tavq.data.token_writer import write_tokens
from tavq.data.tokens import TokenMeta, TokenRecord
from tavq.generator.config import RUN_PRESETS as GENERATOR_RUNS
from tavq.generator.train import GeneratorTask
from tavq.tokenizer import train as tokenizer_train
from tavq.tokenizer import train_decoder
from tavq.tokenizer.config import PRESETS, LossConfig
from tavq.tokenizer.config import RUN_PRESETS as TOKENIZER_RUNS
from tavq.tokenizer.model import TAVQTokenizer
from tavq.tokenizer.run_config import DECODER_PRESETS
from tavq.training.loop import train
from tavq.training.run_folder import read_log

STEPS = 10


def train_in_bfloat16(task, run, out) -> list[dict[str, float]]:
    """Train `task` and return its log; its weights stay float32 and finite."""
    config = dataclasses.replace(
        run.training, precision="bf16", steps=STEPS, batch_size=4, evaluate_every=STEPS, log_every=1
    )
    # One precision a process is accelerate's rule, and another test may have chosen before.
    AcceleratorState._reset_state(reset_partial_state=True)
    train(task, config, out, run)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in task.shipped.parameters())
    return read_log(out / "training" / "log.jsonl")


@pytest.fixture
def few_shapes(monkeypatch):
    for module in (tokenizer_train, train_decoder):
        monkeypatch.setattr(module, "open_dataset", lambda path, split: open_dataset(path, split).take(12))


@pytest.fixture
def tokens_dir(tmp_path):
    rng = np.random.default_rng(0)
    records = [
        TokenRecord(f"{split}{n}", split, rng.integers(0, 8, (1, 2, 4)), (f"A dog by {n}.",))
        for split in ("train", "val")
        for n in range(8)
    ]
    write_tokens(tmp_path / "tokens", records, TokenMeta(8, (2, 4), "codebook", "tokenizer", "made up", 16))
    return tmp_path / "tokens"


@pytest.mark.slow
@pytest.mark.parametrize("align", ["ot", "lgvq"])
def test_the_tokenizer(few_shapes, perceptual_network, tmp_path, align):
    preset = TOKENIZER_RUNS["tiny"]
    run = dataclasses.replace(
        preset,
        training=dataclasses.replace(preset.training, steps=STEPS),
        align=align,
        perceptual=str(perceptual_network),
        distill=perceptual_network,
        losses=LossConfig(adversarial_start=0.3, texture=0.1, augmentation=0.5),
        fit_steps=0,
    )
    log = train_in_bfloat16(tokenizer_train.TokenizerTask(run), run, tmp_path / "run")
    assert any("discriminator/loss" in line for line in log) and math.isfinite(log[-2]["weight/distill"])


@pytest.mark.slow
def test_the_decoder(few_shapes, perceptual_network, tmp_path):
    TAVQTokenizer(PRESETS["tiny"]).save_pretrained(tmp_path / "tokenizer")
    run = dataclasses.replace(
        DECODER_PRESETS["tiny"],
        tokenizer=tmp_path / "tokenizer",
        perceptual=str(perceptual_network),
    )
    log = train_in_bfloat16(train_decoder.DecoderTask(run), run, tmp_path / "run")
    assert math.isfinite(log[-1]["val/perceptual"])


@pytest.mark.slow
def test_the_generator(tokens_dir, tmp_path):
    run = dataclasses.replace(GENERATOR_RUNS["tiny"], tokens=tokens_dir)
    log = train_in_bfloat16(GeneratorTask(run), run, tmp_path / "run")
    assert math.isfinite(log[-1]["val/loss"])


def test_the_captioner(tokens_dir, tmp_path):
    run = dataclasses.replace(CAPTIONER_RUNS["tiny"], tokens=tokens_dir)
    log = train_in_bfloat16(CaptionerTask(run), run, tmp_path / "run")
    assert math.isfinite(log[-1]["val/CIDEr"])


@pytest.mark.slow
def test_the_stages_that_go_on_from_a_model(tokens_dir, tmp_path):
    """Self-critical training, preferences, and the lexicon of a frozen generator, by their commands."""
    rng = np.random.default_rng(1)
    pairs = [
        {"id": f"train{n % 8}", "prompt": "A dog.", "codebook": "codebook"}
        | {name: rng.integers(0, 8, 8).tolist() for name in ("best", "worst")}
        for n in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    common = f"--tokens {tokens_dir} --training.precision bf16 --training.batch-size 4 --training.log-every 1"
    runs = {
        "captioner": (train_captioner, "--preset tiny --training.steps 1"),
        "rewarded": (train_captioner, "--preset tiny-self-critical --start {out}/captioner"),
        "generator": (train_generator, "--preset tiny --training.steps 1"),
        "tuned": (
            train_generator,
            "--preset tiny-preference --start {out}/generator --preferences {out}/pairs.jsonl",
        ),
        "lexicon": (train_lexicon, "--preset tiny --generator {out}/generator"),
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, (command, flags) in runs.items():
        steps = [] if "steps" in flags else ["--training.steps", str(STEPS), "--training.evaluate-every", "5"]
        flags = flags.format(out=tmp_path).split()
        command.main([*common.split(), *flags, *steps, "--out", str(tmp_path / name)])
    AcceleratorState._reset_state(reset_partial_state=True)

    for name in ("rewarded", "tuned", "lexicon"):
        log = read_log(tmp_path / name / "training" / "log.jsonl")
        norms = [line["grad_norm/model"] for line in log if "grad_norm/model" in line]
        assert len(norms) == STEPS and all(map(math.isfinite, norms)), name
        weights = load_file(tmp_path / name / "model.safetensors").values()
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights)
