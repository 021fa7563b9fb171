"""More of the page of the demo in a real browser: looks, presets, tokens, the phone, figures."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tavq.app.completing import AROUND
from tavq.app.gallery import FOLDER
from tavq.pipeline import CHECKPOINT

from .browser import (
    AXE,
    DESKTOP,
    MARKS,
    PHONE,
    PHOTO,
    TABS,
    address,
    browser,
    decoded,
    generate,
    open_page,
    open_tab,
    panel,
    recipe_of,
)

__all__ = ["address", "browser", "open_page"]  # fixtures

pytestmark = MARKS

IMAGES_RENDERING = "image => getComputedStyle(image).imageRendering"


def fill_photo(page, path: Path) -> None:
    """Upload a photo in the open tab, and wait until it is there."""
    panel(page).locator("input[type=file]").first.set_input_files(path)
    panel(page).locator("[data-testid=image] img").first.wait_for()


def fill_editor(page, path: Path) -> None:
    """Open the tab of completion with a photo."""
    open_tab(page, "Complete")
    panel(page).locator("canvas").first.wait_for()  # an upload before it is lost
    panel(page).locator("input[type=file]").first.set_input_files(path)
    page.wait_for_timeout(3000)  # the editor draws the photo on its canvas


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def width_of(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth")


def test_images_are_smooth_unless_pixels_are_asked_for(open_page):
    page = open_page()
    generate(page, "a dog")
    image = panel(page).locator(".results img").first
    assert image.evaluate(IMAGES_RENDERING) == "auto"
    page.get_by_label("Show pixels instead of smoothing enlarged images").click()
    page.wait_for_function("document.body.classList.contains('pixelated')")
    assert image.evaluate(IMAGES_RENDERING) == "pixelated"


def test_shortcuts_are_shown_and_ctrl_enter_draws_from_any_field(open_page):
    page = open_page("?prompt=a+dog&seed=3")
    page.get_by_text("Filled in: prompt").wait_for()
    assert panel(page).locator(".shortcuts").inner_text() == "Enter or Ctrl+Enter runs this tab."
    page.locator("input[type=number]").first.fill("1")
    page.get_by_label("Seed", exact=True).locator("visible=true").press("Control+Enter")
    page.get_by_text("1 of 1 images").wait_for()


def test_parameters_of_another_program_s_png_are_restored_and_the_history_brings_settings_back(
    open_page, tmp_path
):
    foreign = PngInfo()
    foreign.add_text("parameters", "a white dog\nNegative prompt: a cat\nSteps: 20, CFG scale: 4.5, Seed: 12")
    Image.new("RGB", (8, 8)).save(tmp_path / "a1111.png", pnginfo=foreign)
    page = open_page()
    page.locator("#settings-png input[type=file]").set_input_files(tmp_path / "a1111.png")
    page.get_by_text("this page has no Steps").wait_for()
    panel(page).get_by_role("button", name="Settings").click()
    guidance = page.get_by_label("number input for Guidance scale").locator("visible=true")
    assert guidance.input_value() == "4.5"
    assert page.get_by_label("Negative prompt").locator("visible=true").input_value() == "a cat"

    page.locator("input[type=number]").first.fill("1")
    press(page, "Generate")
    page.get_by_text("1 of 1 images").wait_for()
    guidance.fill("2")
    page.get_by_role("button", name="History of this browser").click()
    page.get_by_role("button", name="Thumbnail 1 of 1", exact=True).nth(1).click()  # the first is the result
    page.wait_for_function("field => field.value === '4.5'", arg=guidance.element_handle())


def test_buttons_take_an_image_to_complete_and_to_tokens(open_page):
    page = open_page("?prompt=a+dog&seed=3")
    page.get_by_text("Filled in: prompt").wait_for()
    generate(page)
    recipe_of(page)
    press(page, "Complete")
    prompt = page.get_by_label("Prompt for the whole image")
    prompt.wait_for()
    page.wait_for_function("field => field.value === 'a dog'", arg=prompt.element_handle())
    assert page.get_by_role("tab", name="Complete", exact=True).get_attribute("aria-selected") == "true"
    open_tab(page, "Text to image")
    press(page, "Tokens")
    page.locator(".token-grid button").nth(143).wait_for()
    assert page.get_by_role("tab", name="Tokens", exact=True).get_attribute("aria-selected") == "true"


@pytest.mark.parametrize("part", ["left half", AROUND])
def test_presets_and_outpainting_generate_their_part_beside_the_photo(open_page, part):
    page = open_page()
    fill_editor(page, PHOTO)
    panel(page).get_by_label(part).click()
    panel(page).get_by_label("Prompt for the whole image").fill("a dog")
    panel(page).get_by_label("number input for Images").fill("1")
    press(page, "Complete")
    panel(page).get_by_text("1 of 1 images").wait_for()
    sources = panel(page).locator("[data-testid=image-slider], .slider-wrap").first.locator("img")
    assert sources.count() == 2  # photo and result, with a line to move between them

    panel(page).get_by_role("button", name="All PNG files").click()
    with page.expect_download() as download:
        panel(page).locator("a[download]").first.click()
    photo = np.asarray(Image.open(PHOTO).convert("RGB"), dtype=int)
    result = np.asarray(Image.open(download.value.path()), dtype=int)
    assert result.shape == photo.shape
    differs = np.abs(result - photo).max(axis=-1) > 8
    h, w = differs.shape
    if part == AROUND:
        small = Image.open(PHOTO).convert("RGB").resize((round(0.6 * w), round(0.6 * h)))
        left, top = (w - small.width) // 2, (h - small.height) // 2
        inside = result[top : top + small.height, left : left + small.width]
        assert np.abs(inside - np.asarray(small, dtype=int)).max() <= 8
    else:
        assert differs[:, : w // 2].mean() > 0.3 and not differs[:, w // 2 + 1 :].any()


def test_a_browser_without_webgl_is_told_that_completion_needs_it(open_page):
    page = open_page()
    told = page.get_by_text("This browser has no WebGL")
    open_tab(page, "Complete")
    panel(page).locator("canvas").first.wait_for()
    assert told.count() == 0
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page.reload()
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    open_tab(page, "Complete")
    told.wait_for()


def test_another_code_is_put_on_a_token_which_says_where_else_it_is(open_page):
    page = open_page()
    open_tab(page, "Tokens")
    fill_photo(page, FOLDER / "00.png")
    press(page, "Read its tokens")
    buttons = page.locator(".token-grid button")
    buttons.nth(143).wait_for()
    assert re.fullmatch(r"row 1, column 1: code \d+", buttons.first.get_attribute("title"))  # on hovering
    assert panel(page).locator("[data-testid=image-slider], .slider-wrap").first.locator("img").count() == 2
    before = decoded(page)
    code = page.get_by_label("Code of the chosen token").input_value()
    other = str((int(code) + 7) % 1024)

    page.get_by_label("Code of the chosen token").fill(other)
    press(page, "Put this code here")
    page.get_by_text(" 1 of 144 tokens differ").wait_for()
    assert decoded(page) != before
    page.get_by_text(f"column 7: code {other}").wait_for()  # the token in the middle was chosen
    press(page, "Put it wherever the old one is")
    buttons.first.click()
    same = page.locator(".token-grid button.same").count()
    page.get_by_text("In this image also at:").wait_for()
    line = page.locator("p", has_text="In this image also at:").inner_text()
    assert line.count("row") == min(same, 12) or (same == 0 and "nowhere else" in line)


def test_every_tab_is_as_wide_as_the_others(open_page):
    page = open_page()
    widths = set()
    for name in TABS:
        open_tab(page, name)
        page.wait_for_timeout(300)
        widths.add(round(panel(page).bounding_box()["width"]))
    assert len(widths) == 1


def test_the_last_tab_has_the_figure_and_the_numbers_of_the_weights(open_page):
    page = open_page()
    open_tab(page, "How it works")
    figure = panel(page).locator("img.figure")
    figure.wait_for()
    assert figure.evaluate("image => image.naturalWidth") > 100
    assert panel(page).locator("table").count() == 2
    text = panel(page).inner_text()
    assert "tokenizer" in text and "5.3 M" in text and "Captions: CIDEr" in text
    assert (Path(CHECKPOINT) / "results" / "caption.json").is_file() and "1,000" in text


@pytest.mark.parametrize(("size", "scheme"), [(PHONE, "light"), (DESKTOP, "dark")], ids=["phone", "dark"])
def test_results_of_each_tab_stay_inside_the_page_and_axe_finds_nothing_serious(open_page, size, scheme):
    script = pytest.importorskip("axe_playwright_python.base", reason="pip install -e '.[dev]'").AXE_SCRIPT
    page = open_page("", size, color_scheme=scheme)
    page.add_script_tag(content=script)

    open_tab(page, "Image to text")
    assert not page.get_by_label("number input for Beam").is_visible()  # folded away
    fill_photo(page, PHOTO)
    press(page, "Describe")
    panel(page).get_by_text(re.compile(r"^\w+ \d+ %$")).first.wait_for()
    images = panel(page).locator(".results").first.locator("img")
    for number in range(images.count()):
        box = images.nth(number).bounding_box()
        assert box["x"] + box["width"] <= size["width"]
    if size is PHONE:
        page.wait_for_timeout(1000)  # it scrolls
        assert 0 <= panel(page).get_by_label("Caption", exact=True).bounding_box()["y"] < PHONE["height"]
    text = panel(page).get_by_label("Where does a text lie on the photo?")
    page.wait_for_function("field => field.value", arg=text.element_handle())  # the caption
    press(page, "Show")
    panel(page).locator(".results").nth(1).locator("img").first.wait_for()
    assert width_of(page) == size["width"] and page.evaluate(AXE) == []

    page.evaluate("window.scrollTo(0, 0)")
    fill_editor(page, PHOTO)
    panel(page).get_by_label("the middle").click()
    panel(page).get_by_label("Prompt for the whole image").fill("a cup")
    panel(page).get_by_label("number input for Images").fill("1")
    press(page, "Complete")
    panel(page).get_by_text("1 of 1 images").wait_for()
    if size is PHONE:
        page.wait_for_timeout(1000)
        assert 0 <= panel(page).get_by_text("1 of 1 images").bounding_box()["y"] < PHONE["height"] / 2
    assert width_of(page) == size["width"] and page.evaluate(AXE) == []

    page.evaluate("window.scrollTo(0, 0)")
    open_tab(page, "Tokens")
    fill_photo(page, PHOTO)
    press(page, "Read its tokens")
    page.get_by_text("Nearest words on level 1").wait_for()
    if size is PHONE:
        box = page.locator(".token-grid").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
    assert width_of(page) == size["width"] and page.evaluate(AXE) == []
