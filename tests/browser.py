"""Chromium on the page of the demo: fixtures and steps that the tests of the page share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tavq.pipeline import CHECKPOINT

from .demo_server import ROOT, demo_server

PHOTO = ROOT / "app" / "examples" / "coffee.jpg"  # 3:2
CHROMIUM = shutil.which("chromium")
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM_FLAGS += ["--disable-background-networking", "--disable-component-update"]
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
TABS = ("Text to image", "Image to text", "Complete", "Tokens", "How it works")
AXE = """async () => (await axe.run()).violations
  .filter((found) => ["serious", "critical"].includes(found.impact))
  .map((found) => `${found.id}: ${found.nodes.map((node) => node.html).join(" ").slice(0, 300)}`)"""

MARKS = [
    pytest.mark.slow,  # a server and a browser
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
"""Of each file of tests of the page."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with demo_server(Path(CHECKPOINT), tmp_path_factory.mktemp("demo")) as server:
        yield server.address


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address: str):
    """Return a function that opens the page; afterwards, no request went to another server."""
    contexts = []
    foreign: list[str] = []

    def open_page(query: str = "", size=DESKTOP, **options):
        context = browser.new_context(viewport=size, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(90_000)
        local = (address, "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(local) else foreign.append(r.url))
        page.goto(address + query)
        page.get_by_role("button", name="Generate", exact=True).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not foreign


def panel(page):
    return page.locator("[role=tabpanel]:visible")


def open_tab(page, name: str) -> None:
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():  # on a phone
        page.locator(".overflow-menu > button").click()
        tab = page.locator(".overflow-dropdown button", has_text=name)
    tab.click()


def generate(page, prompt: str = "", count: int = 1) -> None:
    if prompt:
        page.get_by_label("Prompt", exact=True).fill(prompt)
    page.locator("input[type=number]").first.fill(str(count))
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_text(f"{count} of {count} images").wait_for()


def recipe_of(page) -> str:
    """The recipe that is shown, once there is one."""
    field = page.get_by_label("Recipe of the selected image", exact=True).locator("visible=true")
    for _ in range(100):
        if field.input_value():
            return field.input_value()
        page.wait_for_timeout(100)
    raise AssertionError("no recipe is shown")


def decoded(page) -> str:
    """The picture behind the token buttons."""
    return page.locator(".token-grid [role=group]").evaluate("grid => grid.style.backgroundImage")
