"""Jobs on the page of the demo, in a real browser: the queue, Stop, and errors beside finished images."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from gradio_client import Client

from tavq.app.jobs import SLOTS

from .browser import DESKTOP, MARKS, address, browser, generate, open_page, open_tab, panel
from .demo_server import PHOTO

__all__ = ["address", "browser", "open_page"]  # fixtures

pytestmark = MARKS


@pytest.fixture
def crowd(address: str) -> Iterator[Callable[[], None]]:
    """Other clients whose jobs fill every slot, and one more that waits; called, it takes them away."""
    clients = [Client(address, verbose=False) for _ in range(SLOTS + 1)]
    jobs = [client.submit("a dog", num_images=16, api_name="/generate") for client in clients]
    while waiting(address) == 0:
        time.sleep(0.1)

    def leave() -> None:
        for job in jobs:
            job.cancel()

    yield leave
    leave()


def waiting(address: str) -> int:
    return httpx.get(f"{address}healthz", timeout=60).json()["waiting"]


def finished(page):
    """The captions of the images that are complete."""
    return panel(page).get_by_text(re.compile(r"^seed \d+$"))


def test_a_job_that_waits_shows_its_place_and_its_time_and_stop_takes_it_out(open_page, address, request):
    page = open_page()
    generate(page, "a dog")  # from which the server knows how long an image takes
    leave = request.getfixturevalue("crowd")
    page.get_by_role("button", name="Generate", exact=True).click()
    place = page.get_by_text(re.compile(r"^queue: 2/2 \| \d+\.\d/\d+\.\ds$"))
    place.wait_for()
    waited, expected = map(float, re.findall(r"(\d+\.\d)[/s]", place.inner_text()))
    assert expected > waited and waiting(address) == 2

    page.get_by_role("button", name="Stop").first.click()
    page.get_by_text("Stopped before it began.").wait_for(timeout=10_000)
    assert waiting(address) == 1 and not place.is_visible()
    assert finished(page).count() == 1 and finished(page).is_visible()

    leave()
    page.get_by_role("button", name="Vary").click()  # Stop was for one job
    page.get_by_text("1 of 4 images").locator("visible=true").wait_for()


def test_stop_ends_completions_and_variations_too(open_page):
    page = open_page()
    open_tab(page, "Complete")
    panel(page).locator("canvas").first.wait_for()
    panel(page).locator("input[type=file]").first.set_input_files(PHOTO)
    page.wait_for_timeout(3000)  # the editor draws the photo on its canvas
    panel(page).get_by_label("the middle").click()
    panel(page).get_by_label("Prompt for the whole image").fill("a cat")
    panel(page).locator("input[type=number]").locator("visible=true").first.fill("16")
    page.get_by_role("button", name="Complete", exact=True).locator("visible=true").click()
    page.get_by_text(re.compile(r"^\d+ of 16 images$")).locator("visible=true").wait_for()
    panel(page).get_by_role("button", name="Stop").click()
    stopped = panel(page).get_by_text(re.compile(r"Stopped after \d+ of 16 images\."))
    stopped.wait_for()
    assert finished(page).count() == int(re.search(r"\d+", stopped.inner_text())[0])


@pytest.mark.parametrize(
    ("images", "best_of", "seed", "reason"),
    [(16, 5, 1, "samples 80 candidates"), (1, 1, "", "seed is empty, expected a number")],
)
def test_a_refusal_is_a_line_above_the_images_and_covers_nothing(open_page, images, best_of, seed, reason):
    page = open_page(f"?prompt=a+dog&seed=1&best_of={best_of}", DESKTOP)
    page.get_by_text("Filled in: prompt").wait_for()
    generate(page)
    page.get_by_label("Seed", exact=True).locator("visible=true").fill(str(seed))
    page.locator("input[type=number]").first.fill(str(images))
    page.get_by_role("button", name="Generate", exact=True).click()
    line = page.locator(".status .error", has_text=reason)
    line.wait_for()
    assert page.locator("[data-testid=toast-body]").count() == 0
    assert finished(page).count() == 1
    bottom = line.bounding_box()["y"] + line.bounding_box()["height"]
    assert bottom <= panel(page).locator(".results").first.bounding_box()["y"]
