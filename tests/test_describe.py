"""tavq describe: long text by a local model and by a server that errs and stalls; resuming; the filter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tavq.cli import main
from tavq.data.description_filter import fault_of, whole_sentences
from tavq.data.layouts import open_dataset

from .chat_server import ChatServer

ROOT = Path(__file__).resolve().parent.parent


def plain(level: int, prompt: str) -> str:
    return f"A plain picture of level {level}. It holds nothing els"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for level in range(12):
        Image.new("RGB", (16, 16), (20 * level, 0, 0)).save(folder / f"{level:02d}.png")
        (folder / f"{level:02d}.txt").write_text(f"level {level}\n")
    return folder


def describe(photos: Path, *flags: object) -> None:
    main(["describe", "--data", str(photos), "--model", "any", "--device", "cpu", *map(str, flags)])


def rows(file: Path) -> dict[str, dict]:
    """id -> row; fails when an image occurs twice."""
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


@pytest.mark.slow
def test_a_server_that_errs_and_stalls_describes_every_image_once(photos, capsys):
    trouble = {1: [500], 2: [429, 503], 3: ["stall"], 4: ["no json"], 5: ["hang up"]}
    with ChatServer(plain, trouble, delay_s=0.05) as server:
        flags = ("--endpoint", server.url, "--requests", 4, "--timeout-s", 4)
        describe(photos, *flags)
        out = photos / "long_text.jsonl"
        failed = 12 - len(rows(out))  # an answer that is no JSON is asked for again by the next call alone
        assert failed == 1 and "04 (the server's answer is no" in capsys.readouterr().out
        assert {level: server.requests[level] for level in range(6)} == {0: 1, 1: 2, 2: 3, 3: 2, 4: 1, 5: 2}
        assert 1 < server.most_at_once <= 5  # a stalled request may still be open beside its repetition

        describe(photos, *flags, "--json")
        assert server.requests.total() == 12 + 5 + 1
        counts = json.loads(capsys.readouterr().out)
        assert (counts["written"], counts["dropped"], counts["unanswered"]) == (1, {}, [])
    described = rows(out)
    assert {id_: row["text"] for id_, row in described.items()} == {
        f"{level:02d}": f"A plain picture of level {level}." for level in range(12)
    }
    assert open_dataset(photos)[3].text == "A plain picture of level 3."


@pytest.mark.slow
def test_a_killed_run_loses_and_doubles_no_description(photos):
    out = photos / "long_text.jsonl"
    rejected = photos / "long_text.rejected.jsonl"
    with ChatServer(lambda level, _: "No." if level == 2 else plain(level, ""), delay_s=0.2) as server:
        flags = ["--endpoint", server.url, "--requests", "2", "--model", "any", "--data", str(photos)]
        command = [sys.executable, "-m", "tavq", "describe", *flags]
        with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
            while not (out.exists() and out.read_text().count("\n") >= 3):
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        assert 3 <= len(rows(out)) < 11
        complete = out.read_bytes()
        out.write_bytes(complete + b'{"id": "11", "text": "half a l\xc3')  # as a full disk leaves it
        main(["describe", *flags])
    assert out.read_bytes().startswith(complete)
    assert sorted([*rows(out), *rows(rejected)]) == [f"{level:02d}" for level in range(12)]
    assert rows(rejected)["02"]["reason"] == "empty"


@pytest.mark.slow
def test_a_server_that_is_down_or_knows_no_such_model_is_named_in_one_line(photos, capsys):
    for trouble in ({level: [404] * 9 for level in range(12)}, {level: [500] * 9 for level in range(12)}):
        with ChatServer(plain, trouble) as server, pytest.raises(SystemExit) as left:
            describe(photos, "--endpoint", server.url, "--retries", 0)
        said = capsys.readouterr().err
        assert left.value.code == 2 and said.count("\n") == 1 and "gives no answers" in said
        # A wrong name ends the run at the first answer, an overloaded server at the tenth error in a row.
        assert server.requests.total() <= (8 if 404 in trouble[0] else 12)


def test_the_prompt_comes_from_a_file_and_holds_captions_and_tags(photos, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("Say {all}: {captions} {tags}")
    (tmp_path / "tags.jsonl").write_text('{"id": "03", "tags": ["wall", "paint"]}\n')
    seen: dict[int, str] = {}

    def remember(level: int, prompt: str) -> str:
        seen[level] = prompt
        return plain(level, prompt)

    with ChatServer(remember) as server:
        flags = ["--endpoint", server.url, "--prompt", tmp_path / "prompt.txt", "--fuse"]
        describe(photos, *flags, "--tags", tmp_path / "tags.jsonl", "--limit", 4)
        assert seen[3] == "Say {all}: - level 3 It is known to show: wall, paint.\n"
        assert seen[2] == "Say {all}: - level 2 " and sorted(seen) == [0, 1, 2, 3]
        (tmp_path / "prompt.txt").write_text("Say all")
        with pytest.raises(SystemExit):
            describe(photos, *flags)
    assert "has no {captions}" in capsys.readouterr().err


def test_a_sample_is_a_page_and_leaves_the_descriptions_alone(photos, capsys):
    with ChatServer(
        lambda level, _: "I'm sorry, I cannot see the image at all." if level else "Red <b>."
    ) as s:
        describe(photos, "--endpoint", s.url, "--sample", 3)
    assert s.requests == {0: 1, 4: 1, 8: 1}
    page = (photos / "long_text.sample.html").read_text()
    assert page.count("data:image/jpeg") == 3 and page.count("would be dropped: refusal") == 2
    assert "Red &lt;b&gt;." in page and "human: level 8" in page
    assert not (photos / "long_text.jsonl").exists()


@pytest.mark.slow
def test_a_local_model_describes_and_the_filter_reports(
    photos, tiny_vision_language, tiny_checkpoint, capsys
):
    local = ("--model", tiny_vision_language, "--max-tokens", 12, "--out", photos / "a.jsonl")
    describe(photos, *local)
    said = capsys.readouterr().out
    kept, dropped = rows(photos / "a.jsonl"), rows(photos / "a.rejected.jsonl")
    assert sorted([*kept, *dropped]) == [f"{level:02d}" for level in range(12)]
    assert len({row["text"] for row in [*kept.values(), *dropped.values()]}) > 1, "it looks at the image"
    assert f"{len(kept)} descriptions written" in said and (not dropped or f"{len(dropped)} dropped" in said)


@pytest.mark.slow
def test_what_other_images_show_rather_than_this_one_is_dropped(photos, tiny_checkpoint):
    tokenizer = ("--tokenizer", tiny_checkpoint / "tokenizer")
    with ChatServer(lambda level, _: f"A brown dog runs on the grass, level {level}.") as server:
        flags = ("--endpoint", server.url, *tokenizer)
        describe(photos, *flags, "--out", photos / "all.jsonl", "--min-grounding", 0.01)
        describe(photos, *flags, "--out", photos / "some.jsonl", "--min-grounding", 0.5)
    grounding = {id_: row["grounding"] for id_, row in rows(photos / "all.jsonl").items()}
    grounding |= {id_: row["grounding"] for id_, row in rows(photos / "all.rejected.jsonl").items()}
    kept, dropped = rows(photos / "some.jsonl"), rows(photos / "some.rejected.jsonl")
    assert set(kept) == {id_ for id_, share in grounding.items() if share >= 0.5} and kept and dropped
    assert all(row["reason"] == "not in the image" and row["worst"] for row in dropped.values())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("A red bus waits at a stop beside two people.", None),
        ("", "empty"),
        ("Red bus.", "empty"),
        ("I\N{RIGHT SINGLE QUOTATION MARK}m sorry, but I cannot describe this picture.", "refusal"),
        ("As an AI I see a bus and a stop here.", "refusal"),
        ("Please upload the image that you mean, then ask again.", "refusal"),
        ("The man cannot see the bus behind the tall tree.", None),
        ("a bus and a bus and a bus and a bus and a bus", "repetition"),
        ("A man in red. A man in red. A man in red.", "repetition"),
    ],
)
def test_refusals_and_loops_are_found(text, fault):
    assert fault_of(text) == fault


def test_a_sentence_that_the_limit_of_tokens_cut_off_goes():
    assert whole_sentences("A dog runs.  It is\nbrown. Behind it a tre") == "A dog runs. It is brown."
    assert whole_sentences("a dog without a full stop") == "a dog without a full stop"
