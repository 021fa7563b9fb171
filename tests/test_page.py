"""The page of the demo in a real browser, with the shipped weights: desktop, dark and phone."""

import base64
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tavq.app.gallery import FOLDER, GREETING
from tavq.app.tab_tokens import COPY, SWAP
from tavq.pipeline import CHECKPOINT, read_recipe

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
from .demo_server import demo_server, free_port

__all__ = ["address", "browser", "open_page"]  # fixtures

pytestmark = MARKS


def test_the_page_greets_with_images_whose_prompt_and_seed_a_click_fills_in(open_page):
    page = open_page()
    assert page.get_by_text("Trained on 6,000 photos of people and dogs").is_visible()
    pictures = page.get_by_role("button", name=re.compile("Thumbnail"))
    pictures.first.wait_for()
    assert pictures.count() == len(GREETING)
    pictures.nth(1).click()
    page.get_by_text("Filled in: prompt").wait_for()
    assert page.get_by_label("Prompt", exact=True).input_value() == GREETING[1][0]
    assert page.get_by_label("Seed", exact=True).locator("visible=true").input_value() == str(GREETING[1][1])


def test_a_link_fills_in_and_enter_draws_what_is_kept_over_a_reload(open_page):
    page = open_page("?prompt=a+white+dog&seed=5&guidance_scale=3&top_k=99999&temperature=warm")
    status = page.get_by_text("Filled in: prompt")
    status.wait_for()
    assert "top k 99999 became 1024" in status.inner_text() and "temperature is 'warm'" in status.inner_text()
    page.locator("input[type=number]").first.fill("2")
    page.get_by_label("Prompt", exact=True).press("Enter")
    page.get_by_text("2 of 2 images").wait_for()
    assert "Seed: 5" in recipe_of(page) and "guidance_scale: 3" in recipe_of(page)

    panel(page).get_by_role("button", name="Thumbnail 2 of 2").click()
    page.wait_for_url(re.compile("seed=6"))  # the link of the selected image
    assert "Seed: 6" in recipe_of(page)
    page.get_by_role("button", name="Reuse seed").click()
    page.reload()
    page.get_by_text("Filled in: prompt").wait_for()
    assert page.get_by_label("Seed", exact=True).locator("visible=true").input_value() == "6"

    page.get_by_label("Prompt", exact=True).fill("something else")
    page.get_by_role("button", name="History of this browser").click()
    past = page.get_by_role("button", name=re.compile("Thumbnail . of 2"))
    past.nth(1).click()  # the older one
    page.wait_for_function("() => document.querySelector('.enter-runs textarea').value === 'a white dog'")
    assert page.get_by_label("Seed", exact=True).locator("visible=true").input_value() == "5"


def test_a_png_that_falls_anywhere_on_the_first_tab_restores_its_settings(open_page):
    page = open_page()
    file = base64.b64encode((FOLDER / "02.png").read_bytes()).decode()
    page.locator("h1").evaluate(
        """(target, file) => {
          const bytes = Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], "any.png", {type: "image/png"}));
          const options = {dataTransfer: transfer, bubbles: true, cancelable: true};
          target.dispatchEvent(new DragEvent("drop", options));
        }""",
        file,
    )
    page.get_by_text("Filled in: prompt").wait_for()
    recipe = read_recipe(FOLDER / "02.png")
    assert page.get_by_label("Prompt", exact=True).input_value() == recipe["prompt"]
    seed = page.get_by_label("Seed", exact=True).locator("visible=true")
    assert seed.input_value() == str(recipe["seed"])


def test_stop_leaves_complete_images_alone_and_an_error_covers_none(open_page):
    page = open_page()
    page.get_by_label("Prompt", exact=True).fill("a dog runs on the grass")
    page.locator("input[type=number]").first.fill("16")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_text("1 of 16 images").wait_for()
    page.get_by_role("button", name="Stop").first.click()
    page.get_by_text("Stopped after").wait_for()
    captions = panel(page).get_by_text(re.compile(r"^seed \d+$"))
    count = captions.count()
    assert 1 <= count < 16 and not page.get_by_text("generating ...").count()

    page.get_by_label("Prompt", exact=True).fill(" ")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_text("the prompt is empty").wait_for()
    assert captions.count() == count and captions.first.is_visible()
    box = captions.first.bounding_box()
    at_point = "([x, y]) => document.elementFromPoint(x, y).innerText"
    page.evaluate("window.scrollTo(0, 0)")
    assert page.evaluate(at_point, [box["x"] + 5, box["y"] + 5]).startswith("seed")


def test_buttons_take_an_image_to_the_other_tabs(open_page):
    page = open_page()
    generate(page, "a brown dog runs through the snow")
    recipe_of(page)
    page.get_by_role("button", name="Describe", exact=True).locator("visible=true").click()
    word = panel(page).get_by_text(re.compile(r"^\w+ \d+ %$")).nth(1)
    word.click()
    panel(page).locator(".preview img").first.wait_for()  # the word's patches, enlarged

    open_tab(page, "Text to image")
    page.get_by_role("button", name="Vary").click()
    page.get_by_text("4 of 4 images").locator("visible=true").wait_for()
    assert page.get_by_label("Prompt for the whole image").input_value().startswith("a brown dog")

    open_tab(page, "Text to image")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download", exact=True).locator("visible=true").click()
    assert read_recipe(download.value.path())["prompt"] == "a brown dog runs through the snow"


def test_a_painted_part_is_generated_anew_and_a_3_to_2_photo_stays_so(open_page):
    page = open_page()
    open_tab(page, "Complete")
    panel(page).locator("canvas").first.wait_for()  # an upload before it is lost
    panel(page).locator("input[type=file]").first.set_input_files(PHOTO)
    page.wait_for_timeout(3000)  # the editor draws the photo on its canvas
    panel(page).get_by_label("Prompt for the whole image").fill("a red plate")
    panel(page).locator("input[type=number]").locator("visible=true").first.fill("1")
    page.get_by_role("button", name="Complete", exact=True).locator("visible=true").click()
    page.get_by_text("nothing is painted").wait_for()

    panel(page).get_by_role("button", name="Brush", exact=True).click()
    box = panel(page).locator("canvas").first.bounding_box()
    x = box["x"] + box["width"] / 2
    y = box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 40, y + 10, steps=5)
    page.mouse.up()
    page.get_by_role("button", name="Complete", exact=True).locator("visible=true").click()
    page.get_by_text("1 of 1 images").locator("visible=true").wait_for()
    panel(page).get_by_role("button", name="All PNG files").click()
    with page.expect_download() as download:
        panel(page).locator("a[download]").first.click()
    photo = np.asarray(Image.open(PHOTO).convert("RGB"), dtype=int)
    result = np.asarray(Image.open(download.value.path()), dtype=int)
    assert result.shape == photo.shape
    changed = (np.abs(result - photo).max(axis=-1) > 8).mean()
    assert 0.01 < changed < 0.5


def test_tokens_are_looked_at_changed_swapped_and_mixed(open_page):
    page = open_page()
    open_tab(page, "Tokens")
    panel(page).locator("input[type=file]").first.set_input_files(FOLDER / "00.png")
    panel(page).locator("[data-testid=image] img").first.wait_for()
    page.get_by_role("button", name="Read its tokens").click()
    buttons = page.locator(".token-grid button")
    buttons.nth(143).wait_for()
    assert buttons.count() == 144
    first = decoded(page)

    buttons.nth(5).click()
    page.get_by_text("Row 1, column 6: code").wait_for()
    for level in (1, 2, 3):
        assert page.get_by_text(f"Nearest words on level {level}").is_visible()
    assert page.locator(".patches img[alt^='patch with code']").count() >= 1

    codes = [re.search(r"\d+$", buttons.nth(n).get_attribute("title"))[0] for n in (5, 100)]
    assert codes[0] != codes[1]
    panel(page).get_by_label(SWAP).click()
    buttons.nth(100).click()
    page.get_by_text("2 of 144 tokens differ").wait_for()
    assert decoded(page) != first and buttons.nth(5).get_attribute("title").endswith(f" {codes[1]}")
    panel(page).get_by_text("Undo", exact=True).click()  # not that of the editor
    page.get_by_text(" 0 of 144 tokens differ").wait_for()
    assert decoded(page) == first
    panel(page).get_by_label(COPY).click()
    buttons.nth(5).click()
    page.get_by_text(" 1 of 144 tokens differ").wait_for()

    with page.expect_response(re.compile("/upload")):
        panel(page).locator("input[type=file]").nth(1).set_input_files(PHOTO)
    panel(page).locator("[data-testid=image] img").nth(1).wait_for()
    page.get_by_role("button", name="Mix", exact=True).click()
    page.get_by_text(re.compile(r" [67]\d of 144 tokens differ")).wait_for()


@pytest.mark.parametrize(
    ("size", "scheme"),
    [(DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light")],
    ids=["desktop", "dark", "phone"],
)
def test_axe_finds_nothing_serious_and_no_tab_scrolls_sideways(open_page, size, scheme):
    script = pytest.importorskip("axe_playwright_python.base", reason="pip install -e '.[dev]'").AXE_SCRIPT
    page = open_page("?prompt=a+dog&seed=1", size, color_scheme=scheme)
    page.get_by_text("Filled in").wait_for()
    generate(page)
    recipe_of(page)
    if size is PHONE:
        top = page.get_by_text("1 of 1 images").bounding_box()["y"]
        assert 0 <= top < PHONE["height"] / 2  # the tap has scrolled to the results
    page.add_script_tag(content=script)
    for name in TABS:
        if name != TABS[0]:
            page.evaluate("window.scrollTo(0, 0)")
            open_tab(page, name)
            page.wait_for_timeout(500)
        assert page.evaluate(AXE) == [], name
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"], name
        if size is PHONE and name == "Image to text":
            button = page.get_by_role("button", name="Describe", exact=True).locator("visible=true")
            assert button.bounding_box()["y"] < PHONE["height"] - 40


def test_the_history_survives_a_restart_of_the_server(browser, tmp_path):
    port = free_port()
    context = browser.new_context(viewport=DESKTOP)
    page = context.new_page()
    page.set_default_timeout(90_000)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with demo_server(Path(CHECKPOINT), tmp_path / "first", port=port) as server:
        page.goto(server.address)
        generate(page, "a dog in the water")
        recipe_of(page)
    with demo_server(Path(CHECKPOINT), tmp_path / "second", port=port) as server:
        page.goto(server.address)
        page.get_by_role("button", name="History of this browser").click()
        page.get_by_role("button", name="Thumbnail 1 of 1", exact=True).click()  # not "1 of 12", a greeting
        page.wait_for_function(
            "() => document.querySelector('.enter-runs textarea').value === 'a dog in the water'"
        )
    context.close()
