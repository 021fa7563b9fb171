"""The demo as it is started by its command: every endpoint, and three clicks in a real browser."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tavq.app.views import marked_words, token_grid
from tavq.captioner.decoding import Caption, Word
from tavq.pipeline import Pipeline

from .demo_server import PHOTO, demo_server

CHROMIUM = shutil.which("chromium")
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM_FLAGS += ["--disable-background-networking", "--disable-component-update"]
SAMPLING = {"guidance_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

pytestmark = pytest.mark.slow  # a server and a browser


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
        page = actions.Actions(tiny_pipeline, tmp_path)
        *_, last = page.generate("a dog " * 20 + "barks", request=request, **settings)
        assert len(last[1]) == 1 and "barks" in shown.pop() and not shown


def test_stop_ends_the_generation_of_its_own_tab_after_the_current_row(
    tiny_pipeline: Pipeline, tmp_path: Path
):
    from tavq.app.actions import Actions, gr

    actions, own, other = Actions(tiny_pipeline, tmp_path), gr.Request(session_hash="1"), gr.Request()
    settings = {"num_images": 2, "seed": 0, "best_of": 1, "live": True, **SAMPLING}
    generation = actions.generate("a dog", request=own, **settings)
    gallery, files, *_ = next(generation)
    actions.stop(own)
    assert len(gallery) == 1 and not files and list(generation) == []
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


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_generates_captions_and_reconstructs(address: str):
    from playwright.sync_api import sync_playwright

    foreign: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        local = (address, "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(local) else foreign.append(r.url))
        page.goto(address)
        page.get_by_label("Prompt").fill("a dog runs on the grass")
        page.get_by_role("button", name="Generate", exact=True).click()
        panel = page.locator("[role=tabpanel]:visible")
        drawn = panel.get_by_text(re.compile(r"^seed \d+$"))
        drawn.nth(3).wait_for()
        assert f"seed {page.get_by_label('Seed used').first.input_value()}" == drawn.first.inner_text()
        assert all(image_is_loaded(image) for image in panel.locator(".pixels img").all())

        panel.locator("input[type=number]").first.fill("16")
        page.get_by_role("button", name="Generate", exact=True).click()
        drawn.nth(4).wait_for()
        page.get_by_role("button", name="Stop").click()
        page.wait_for_timeout(1500)
        count = drawn.count()
        page.wait_for_timeout(1500)
        assert 5 <= drawn.count() == count <= 16 and not panel.get_by_text("Error", exact=True).count()

        page.get_by_role("tab", name="Image to text").click()
        panel.locator("input[type=file]").first.set_input_files(PHOTO)
        panel.locator(f"img[src*='{PHOTO.stem}']").first.wait_for()
        page.get_by_role("button", name="Caption", exact=True).click()
        word = panel.get_by_text(re.compile(r"^\w+ \d+ %$")).nth(1)
        word.click()
        panel.locator(".preview img").first.wait_for()  # the word's patches, enlarged
        assert panel.locator("textarea").first.input_value().split()[1] == word.inner_text().split()[0]

        page.get_by_role("tab", name="Reconstruction").click()
        panel.locator("input[type=file]").first.set_input_files(PHOTO)
        panel.locator(f"img[src*='{PHOTO.stem}']").first.wait_for()
        page.get_by_role("button", name="Reconstruct", exact=True).click()
        results = panel.locator("[data-testid=image] img, .pixels img")
        results.nth(2).wait_for()
        assert all(image_is_loaded(image) for image in panel.locator(".pixels img").all())
        browser.close()
    assert not foreign  # the page works without any other network


def image_is_loaded(image) -> bool:
    return image.evaluate("image => image.decode().then(() => image.naturalWidth > 0)")


def test_the_token_grid_gives_equal_ids_equal_colours():
    sheet = np.asarray(token_grid(np.array([[5, 9], [9, 5]])))
    half = len(sheet) // 2
    corners = [sheet[y + 8, x + 8].tolist() for y in (0, half) for x in (0, half)]
    assert corners[0] == corners[3] != corners[1] == corners[2]


def test_words_are_marked_below_the_threshold():
    caption = Caption("a dog", -1.0, (Word("a", 0.9), Word("dog", 0.29)))
    assert marked_words(caption, 0.3) == [("a 90 %", "sure"), ("dog 29 %", "unsure")]
