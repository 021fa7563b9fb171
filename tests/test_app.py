"""The demo as it is started by its command, and what its page shows."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tavq.app.views import marked_words
from tavq.captioner.decoding import Caption, Word
from tavq.pipeline import Pipeline

from .demo_server import demo_server

SAMPLING = {"guidance_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

pytestmark = pytest.mark.slow  # a server


@pytest.fixture(scope="module")
def address(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with demo_server(tiny_checkpoint, tmp_path_factory.mktemp("demo")) as server:
        yield server.address


@pytest.mark.filterwarnings("ignore:.*are longer than")
def test_a_prompt_longer_than_the_generator_reads_is_warned_of_on_the_page(
    tiny_pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from tavq.app import actions

    shown: list[str] = []
    monkeypatch.setattr(actions.gr, "Warning", shown.append)
    settings = {"num_images": 1, "seed": 0, "best_of": 1, "live": False, **SAMPLING}
    request = actions.gr.Request(session_hash="one")
    for _ in range(2):  # the second time too
        page = actions.Actions(tiny_pipeline, tmp_path, print)
        *_, last = page.generate("a dog " * 20 + "barks", request=request, **settings)
        assert len(last[1]) == 1 and "barks" in shown.pop() and not shown


def test_stop_ends_the_generation_of_its_own_tab_after_the_current_row(
    tiny_pipeline: Pipeline, tmp_path: Path
):
    from tavq.app.actions import Actions, gr

    told: list[str | None] = []
    actions = Actions(tiny_pipeline, tmp_path, told.append)
    own = gr.Request(session_hash="1")
    other = gr.Request()
    settings = {"num_images": 2, "seed": 0, "best_of": 1, "live": True, **SAMPLING}
    generation = actions.generate("a dog", request=own, **settings)
    gallery, files, *_ = next(generation)
    asyncio.run(actions.stop(own))
    assert len(gallery) == 1 and not files and told == ["1"]
    assert [(left, saved) for left, saved, *_ in generation] == [([], [])]  # the partial image disappears
    assert len([*actions.generate("a dog", request=other, **settings)][-1][1]) == 2
    actions.start(own)
    assert len([*actions.generate("a dog", request=own, **settings)][-1][1]) == 2


def test_a_taken_port_and_a_missing_checkpoint_are_one_line_with_exit_code_2(
    address, tiny_checkpoint, tmp_path, capsys
):
    from tavq.app.demo import main

    port = address.rstrip("/").rpartition(":")[2]
    for arguments, expected in (
        (["--checkpoint", str(tiny_checkpoint), "--port", port], f"port {port} is not free"),
        (["--checkpoint", str(tmp_path / "nothing")], "nothing"),
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        message = capsys.readouterr().err
        assert left.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
        assert expected in message


def test_words_are_marked_below_the_threshold():
    caption = Caption("a dog", -1.0, (Word("a", 0.9), Word("dog", 0.29)))
    assert marked_words(caption, 0.3) == [("a 90 %", "sure"), ("dog 29 %", "unsure")]
