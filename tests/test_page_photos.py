"""The tabs that a demo has where there is more to show: images from photos, and search among photos."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tavq.base.files import file_hash
from tavq.commands.index import main as index_photos
from tavq.generator.config import LEXICON_PRESETS
from tavq.generator.lexicon import Lexicon, LexiconConfig
from tavq.pipeline import CHECKPOINT, Pipeline, read_recipe

from .browser import AXE, DESKTOP, MARKS, PHONE, PHOTO, browser, open_page, open_tab, panel
from .demo_server import ROOT, demo_server

__all__ = ["browser", "open_page"]  # fixtures
pytestmark = MARKS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped weights with a lexicon that was never trained: its words are noise, but they are words."""
    folder = tmp_path_factory.mktemp("photos") / "checkpoint"
    folder.mkdir()
    for part in ("tokenizer", "generator", "captioner"):
        (folder / part).symlink_to(Path(CHECKPOINT).resolve() / part)
    pipeline = Pipeline(folder)
    config = LexiconConfig(
        **vars(LEXICON_PRESETS["tiny"].model),
        num_codes=pipeline.tokenizer.num_codes,
        num_tokens=pipeline.generator.config.grid_size[0] ** 2,
        text_dim=pipeline.generator.config.text_dim,
        codebook_hash=pipeline.tokenizer.codebook_hash,
        generator_hash=file_hash(folder / "generator" / "model.safetensors"),
    )
    torch.manual_seed(0)
    Lexicon(config).save_pretrained(folder / "lexicon")
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    photos = folder / "photos"
    shutil.copytree(ROOT / "app" / "examples", photos)
    index_photos([str(photos), "--out", str(folder / "index")])
    (photos / "cat.jpg").unlink()  # deleted since
    return folder / "index"


@pytest.fixture(scope="module")
def address(checkpoint: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with demo_server(checkpoint, tmp_path_factory.mktemp("demo"), "--index", str(index)) as server:
        yield server.address


def test_images_are_generated_from_one_photo_from_two_and_from_a_photo_with_words(open_page, tmp_path):
    page = open_page()
    open_tab(page, "From photos")
    tab = panel(page)
    tab.get_by_role("button", name="Generate like this").click()
    tab.get_by_text("no photo; upload one").wait_for()

    tab.locator("input[type=file]").first.set_input_files(str(PHOTO))
    tab.locator("input[type=number]").nth(1).fill("1")
    tab.get_by_label("Seed", exact=True).fill("7")
    tab.get_by_role("button", name="Generate like this").click()
    tab.get_by_text("1 of 1 images").wait_for()
    with page.expect_download() as alone:
        tab.get_by_text("All PNG files").click()
        tab.locator("a[download]").first.click()
    recipe = read_recipe(Path(alone.value.path()))
    assert recipe["seed"] == 7 and recipe["image_words"] == 4 and not recipe["prompt"]

    tab.get_by_label("Prompt (may be empty)").fill("in the snow")
    tab.get_by_text("Mix with a second photo").click()
    tab.locator("input[type=file]").nth(1).set_input_files(str(ROOT / "app" / "examples" / "cat.jpg"))
    tab.locator("input[type=number]").nth(1).fill("2")
    tab.get_by_role("button", name="Generate like this").click()
    tab.get_by_text("2 of 2 images").wait_for()


def test_photos_are_found_by_words_and_by_a_photo_and_a_deleted_one_is_told(open_page):
    page = open_page()
    open_tab(page, "Search")
    tab = panel(page)
    tab.get_by_role("button", name="Search", exact=True).click()
    tab.get_by_text("nothing to look for").wait_for()

    photos = len(list((ROOT / "app" / "examples").glob("*.jpg")))
    tab.get_by_label("What the photos show").fill("a cup of coffee")
    tab.get_by_role("button", name="Search", exact=True).click()
    tab.get_by_text(f"{photos - 1} photos, best first. 1 more cannot be read any more.").wait_for()
    assert tab.locator("button.thumbnail-item, .grid-wrap img").count() >= photos - 1

    tab.get_by_label("What the photos show").fill("")
    tab.locator("input[type=file]").first.set_input_files(str(PHOTO))
    tab.locator("input[type=number]").first.fill("1")
    tab.get_by_role("button", name="Search", exact=True).click()
    tab.get_by_text("1 photos, best first.").wait_for()
    tab.get_by_text(PHOTO.name).first.wait_for()


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "dark"), (PHONE, "light")], ids=["dark", "phone"])
@pytest.mark.parametrize("name", ["From photos", "Search"])
def test_axe_finds_nothing_serious_and_the_tab_fits(open_page, size, scheme, name):
    script = pytest.importorskip("axe_playwright_python.base", reason="pip install -e '.[dev]'").AXE_SCRIPT
    page = open_page("", size, color_scheme=scheme)
    page.add_script_tag(content=script)
    open_tab(page, name)
    page.wait_for_timeout(500)
    assert page.evaluate(AXE) == []
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]


def test_an_index_that_cannot_be_searched_is_refused_before_the_page_is_up(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "app" / "demo.py"), "--index", str(tmp_path), "--port", "7999"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 2 and "tavq index PHOTOS" in done.stderr.splitlines()[-1]
