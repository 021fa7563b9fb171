"""Preferences: pairs that a killed command completes, and a generator that learns to prefer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tavq.commands.preferences import main as preferences
from tavq.commands.train_generator import main as train_generator
from tavq.data.token_writer import write_tokens
from tavq.data.tokens import TokenMeta, TokenRecord
from tavq.generator.config import GeneratorRun
from tavq.generator.model import GeneratorModel
from tavq.generator.preference import HELD_OUT, PreferenceTask
from tavq.training.checkpoint import tensor_hash
from tavq.training.run_folder import read_log

CODEBOOK = torch.nn.functional.normalize(
    torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), dim=-1
)
CODEBOOK_HASH = tensor_hash(CODEBOOK)
NUM_IMAGES = 45

pytestmark = pytest.mark.slow  # a generator is trained


def test_the_pairs_are_resumed_and_the_best_scores_higher_than_the_worst(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from tavq.pipeline import Pipeline

    ranked: list[tuple[torch.Tensor, torch.Tensor]] = []
    rank = Pipeline.rank

    def noted(self, ids, prompt, by="sum"):
        scores = rank(self, ids, prompt, by)
        ranked.append((ids, scores))
        return scores

    monkeypatch.setattr(Pipeline, "rank", noted)
    flags = ["--data", "shapes", "--checkpoint", str(tiny_checkpoint), "--candidates", "3", "--device", "cpu"]
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    preferences([*flags, "--prompts", "4", "--out", str(whole)])
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 4
    for row, (ids, scores) in zip(rows, ranked, strict=True):
        assert row["best"] == ids[scores.argmax()].tolist() and row["worst"] == ids[scores.argmin()].tolist()
        assert row["best"] != row["worst"]

    lines = whole.read_text().splitlines(keepends=True)
    killed.write_text(lines[0] + lines[1][:20])  # killed while it wrote the second line
    preferences([*flags, "--prompts", "4", "--out", str(killed)])
    assert killed.read_text() == whole.read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token set, pairs whose better images use the low codes, a generator, and its tuned successor."""
    folder = tmp_path_factory.mktemp("preference")
    rng = np.random.default_rng(0)

    def grid(low: int, high: int) -> np.ndarray:
        return rng.integers(low, high, size=(1, 4, 4))

    records = [
        TokenRecord(f"{split}{n}", split, grid(0, 64), ("a dog",))
        for split in ("train", "val")
        for n in range(NUM_IMAGES)
    ]
    write_tokens(folder / "tokens", records, TokenMeta(64, (4, 4), CODEBOOK_HASH, "t", "made-up", 32))
    pairs = [
        {
            "id": f"train{n}", "prompt": "a dog", "codebook": CODEBOOK_HASH,
            "best": grid(0, 32).flatten().tolist(), "worst": grid(32, 64).flatten().tolist(),
        }
        for n in range(NUM_IMAGES)
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    tiny = ["--tokens", str(folder / "tokens")]
    train_generator([*tiny, "--preset", "tiny", "--training.steps", "2", "--out", str(folder / "before")])
    tuned = ["--preset", "tiny-preference", "--preferences", str(folder / "pairs.jsonl")]
    tuned += ["--start", str(folder / "before"), "--training.steps", "30", "--training.learning-rate", "5e-3"]
    train_generator([*tiny, *tuned, "--out", str(folder / "after")])
    return folder


def test_the_tuned_generator_prefers_the_better_image_of_pairs_that_it_never_saw(trained: Path):
    lines = [
        line for line in read_log(trained / "after" / "training" / "log.jsonl") if "val/preferred" in line
    ]
    assert lines[-1]["val/preferred"] == 1.0 and lines[-1]["val/margin"] > 1.0

    task = PreferenceTask(run_of(trained))
    numbers = {number for number, _ in (task.dataset[(index, 0)] for index in range(len(task.dataset)))}
    assert numbers.isdisjoint(task.held_out) and len(numbers) + len(task.held_out) == NUM_IMAGES
    assert task.held_out == [0, HELD_OUT, 2 * HELD_OUT]


def test_the_codes_of_the_better_images_have_become_likelier(trained: Path):
    texts = PreferenceTask(run_of(trained)).pairs.texts.rows([0])
    shares = []
    for name in ("before", "after"):
        model = GeneratorModel.from_pretrained(trained / name).eval()
        with torch.inference_mode():
            logits = model(torch.zeros(1, 16, dtype=torch.long), texts.states, texts.mask)
        shares.append(float(logits.softmax(-1)[..., :32].sum(-1).mean()))
    assert shares[1] > shares[0] + 0.03


def run_of(folder: Path, **changes: object) -> GeneratorRun:
    from tavq.generator.config import PRESETS

    return GeneratorRun(
        **{
            "tokens": folder / "tokens",
            "start": folder / "before",
            "model": PRESETS["tiny"],
            "stage": "preference",
            "preset": "tiny-preference",
            "preferences": folder / "pairs.jsonl",
            **changes,
        }
    )


def test_at_the_start_the_margin_is_zero_and_only_the_generator_learns(trained: Path):
    task = PreferenceTask(run_of(trained))
    task.model.train()
    batch = task.collate([task.dataset[(index, 0)] for index in range(4)])
    torch.testing.assert_close(
        task.preference.margins(task.shipped, batch), torch.zeros(4), atol=1e-4, rtol=0
    )
    output = task.model(batch, 0)
    assert float(output.report["preference"]) == pytest.approx(np.log(2), abs=1e-4)
    output.loss.backward()
    assert any(parameter.grad is not None for parameter in task.shipped.parameters())
    assert all(parameter.grad is None for parameter in task.model.reference.parameters())


def test_real_images_stay_in_the_loss_with_their_weight(trained: Path):
    losses = []
    for weight in (0.0, 1.0):
        task = PreferenceTask(run_of(trained, real_weight=weight, null_text_rate=0.0))
        batch = task.collate([task.dataset[(index, 0)] for index in range(4)])
        assert torch.equal(batch["real"][0], task.train_set.ids[1, 0].flatten().long()), "pair 1 is image 1"
        output = task.model(batch, 0)
        losses.append(float(output.loss))
    assert losses[1] - losses[0] == pytest.approx(float(output.report["nats_per_token"]), rel=1e-4)


TUNE = ("--preset", "tiny-preference")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (TUNE, "preferences need a generator to go on from; add --start DIR"),
        ((*TUNE, "--start", "BEFORE"), "no preferences to learn; make some with tavq"),
        (("--preset", "tiny", "--preferences", "PAIRS"), "--preferences needs --stage preference"),
        ((*TUNE, "--start", "BEFORE", "--preferences", "nowhere"), "no preferences nowhere; make"),
        ((*TUNE, "--start", "BEFORE", "--preferences", "FOREIGN"), "ids of codebook 0123, the"),
    ],
)
def test_what_is_missing_is_named(trained: Path, flags: tuple[str, ...], message: str, capsys):
    foreign = (trained / "pairs.jsonl").read_text().replace(CODEBOOK_HASH, "0123")
    (trained / "foreign.jsonl").write_text(foreign)
    places = {"BEFORE": "before", "PAIRS": "pairs.jsonl", "FOREIGN": "foreign.jsonl"}
    given = [str(trained / places[flag]) if flag in places else flag for flag in flags]
    with pytest.raises(SystemExit) as left:
        train_generator(["--tokens", str(trained / "tokens"), "--out", str(trained / "new"), *given])
    assert left.value.code == 2 and message in capsys.readouterr().err
