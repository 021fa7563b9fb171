"""python benchmarks/screenshots.py --address http://127.0.0.1:7860/: picture every tab of the demo.

Chromium goes through the tabs of a demo that runs: light, dark, and on a phone. Look at the pictures then.
"""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tavq.base.arguments import parse, run_main

ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "app" / "gallery" / "00.png"
MAX_BYTES = 80_000
QUALITIES = (88, 80, 72, 64, 56, 48, 40, 30)
TIMEOUT_MS = 120_000
SETTLE_MS = 1500  # for what still moves or loads when its text is there
DESKTOP = {"width": 1280, "height": 1000}
PHONE = {"width": 390, "height": 844}
VARIANTS: dict[str, dict[str, Any]] = {
    "light": {"viewport": DESKTOP, "color_scheme": "light"},
    "dark": {"viewport": DESKTOP, "color_scheme": "dark"},
    "phone": {"viewport": PHONE, "color_scheme": "light", "device_scale_factor": 2, "has_touch": True},
}


@dataclasses.dataclass(frozen=True)
class ScreenshotsRun:
    """Picture every tab of a running demo: light, dark, and on a phone.

    Example: python benchmarks/screenshots.py --address http://127.0.0.1:7860/
    """

    address: str = "http://127.0.0.1:7860/"
    """Address of the demo."""
    out: Path = ROOT / "docs" / "images" / "demo"
    """Directory for the pictures, TAB-VARIANT.webp."""
    chromium: str = shutil.which("chromium") or "chromium"
    """Program of the browser."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(ScreenshotsRun, argv, prog="python benchmarks/screenshots.py")
    from playwright.sync_api import sync_playwright

    run.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=run.chromium, args=["--no-sandbox", "--disable-gpu"])
        for variant, options in VARIANTS.items():
            context = browser.new_context(**options)
            page = context.new_page()
            page.set_default_timeout(TIMEOUT_MS)
            page.goto(run.address)
            for name, (title, act) in TABS.items():
                open_tab(page, title)
                act(page)
                if options["viewport"] is DESKTOP:
                    page.evaluate("window.scrollTo(0, 0)")  # a phone has scrolled to the results
                page.wait_for_timeout(SETTLE_MS)
                print(save(page.screenshot(), run.out / f"{name}-{variant}.webp"), flush=True)
            context.close()
        browser.close()


def save(screenshot: bytes, path: Path) -> Path:
    """Write a PNG as WebP of at most `MAX_BYTES`, as well as that allows."""
    image = Image.open(io.BytesIO(screenshot)).convert("RGB")
    for quality in QUALITIES:
        image.save(path, quality=quality, method=6)
        if path.stat().st_size <= MAX_BYTES:
            break
    return path


def open_tab(page: Any, title: str) -> None:
    page.evaluate("window.scrollTo(0, 0)")
    tab = page.get_by_role("tab", name=title, exact=True)
    page.get_by_role("tab").first.wait_for()
    if not tab.is_visible():  # on a phone
        page.locator(".overflow-menu > button").click()
        tab = page.locator(".overflow-dropdown button", has_text=title)
    tab.click()


def panel(page: Any) -> Any:
    return page.locator("[role=tabpanel]:visible")


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def upload(page: Any, path: Path) -> None:
    panel(page).locator("input[type=file]").first.set_input_files(path)
    panel(page).locator("[data-testid=image] img").first.wait_for()


def generate(page: Any) -> None:
    page.get_by_label("Prompt", exact=True).fill("a brown dog runs through the snow")
    page.get_by_label("Seed", exact=True).locator("visible=true").fill("4")
    press(page, "Generate")
    page.get_by_text("4 of 4 images").wait_for()
    page.wait_for_url(re.compile("seed=4"))  # its recipe is shown, too


def describe(page: Any) -> None:
    upload(page, PHOTO)
    press(page, "Describe")
    panel(page).get_by_text(re.compile(r"^\w+ \d+ %$")).first.wait_for()


def complete(page: Any) -> None:
    panel(page).locator("canvas").first.wait_for()  # an upload before it is lost
    panel(page).locator("input[type=file]").first.set_input_files(PHOTO)
    page.wait_for_timeout(2 * SETTLE_MS)  # the editor draws the photo on its canvas
    panel(page).get_by_label("bottom half").click()
    panel(page).get_by_label("Prompt for the whole image").fill("a dog swims in the water")
    panel(page).get_by_label("Seed").fill("1")
    press(page, "Complete")
    panel(page).get_by_text("4 of 4 images").wait_for()


def tokens(page: Any) -> None:
    upload(page, PHOTO)
    press(page, "Read its tokens")
    page.get_by_text("Nearest words on level 1").wait_for()


def about(page: Any) -> None:
    panel(page).locator("img.figure").wait_for()


TABS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "generate": ("Text to image", generate),
    "describe": ("Image to text", describe),
    "complete": ("Complete", complete),
    "tokens": ("Tokens", tokens),
    "about": ("How it works", about),
}
"""Name of the picture -> the tab, and what is done there."""


if __name__ == "__main__":
    main()
