"""tavq score faithfulness: by questions to a server, resumable, with a floor; by a captioner without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tavq.cli import main
from tavq.eval.results import read_results

from .chat_server import ChatServer

PROMPTS = ["a brown dog on the grass", "a red ball", "two men on a mountain"]
SEEN = {0: ("brown dog", "dog", "grass"), 1: ("red", "ball", "red ball"), 2: ()}


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    folder = tmp_path / "generated"
    folder.mkdir()
    with (folder / "result.jsonl").open("w") as results:
        for number, prompt in enumerate(PROMPTS):
            Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / f"{number}.png")
            results.write(json.dumps({"file": f"{number}.png", "prompt": prompt, "seed": 0}) + "\n")
        results.write(json.dumps({"file": "gone.png", "prompt": "a cat", "seed": 0}) + "\n")
    return folder


def answer(level: int, question: str) -> str:
    return "Yes, it does." if question.split('"')[1] in SEEN[level] else "No."


def score(generated: Path, *flags: object) -> None:
    out = generated.parent / "scores.json"
    arguments = ["score", "faithfulness", str(generated), "--out", str(out), "--device", "cpu"]
    main([*arguments, *map(str, flags)])


@pytest.mark.slow
def test_questions_are_asked_about_every_unit_and_about_the_next_prompt(generated, capsys):
    trouble = {1: [500], 2: ["no json"]}
    with ChatServer(answer, trouble) as server:
        flags = ("--model", "vqa", "--endpoint", server.url, "--requests", 2)
        with pytest.raises(SystemExit):
            score(generated, *flags)
        assert "1 of " in capsys.readouterr().err
        before = server.requests.total()
        score(generated, *flags)
        assert server.requests.total() == before + 1, "only what had no answer is asked again"

    result = read_results(generated.parent / "scores.json")
    shares = result.per_image()["faithfulness"][:, 0]
    rows = [json.loads(line) for line in (generated.parent / "scores.answers.jsonl").read_text().splitlines()]
    of_first = {row["unit"]: row["yes"] for row in rows if row["file"] == "0.png"}
    assert of_first["brown dog"] and of_first["grass"] and not of_first["red ball"]
    own = [unit for unit in of_first if unit not in ("red ball", "red", "ball")]
    assert shares[0] == pytest.approx(sum(of_first[unit] for unit in own) / len(own)) and shares[0] > 0.5
    assert list(shares[1:]) == [1, 0]
    assert result.metrics["faithfulness"]["value"] == pytest.approx(shares.mean())
    assert (
        result.protocol["floors"]["faithfulness"] == 0 and result.protocol["vision_language_model"] == "vqa"
    )


@pytest.mark.slow
def test_without_a_model_a_captioner_of_another_checkpoint_judges(generated, tiny_checkpoint, capsys):
    score(generated, "--judge", tiny_checkpoint)
    metrics = read_results(generated.parent / "scores.json").metrics
    assert set(metrics) == {"cycle_CIDEr", "prompt_R@10"} and metrics["prompt_R@10"]["value"] == 1
    assert "with the next image's prompt" in capsys.readouterr().out

    own = {"file": "0.png", "prompt": "a dog", "checkpoints": {"tokenizer": "x"}}
    from tavq.pipeline import Pipeline

    own["checkpoints"]["tokenizer"] = Pipeline.from_pretrained(tiny_checkpoint).hashes["tokenizer"]
    (generated / "result.jsonl").write_text(f"{json.dumps(own)}\n{json.dumps(own | {'file': '1.png'})}\n")
    with pytest.raises(SystemExit):
        score(generated, "--judge", tiny_checkpoint)
    assert "generated these images itself" in capsys.readouterr().err
