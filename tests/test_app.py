"""The demo as it is started by its command: every endpoint, and three clicks in a real browser."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tavq.app.views import marked_words, token_grid, unit_overlays
from tavq.captioner.decoding import Caption, Word
from tavq.data.images import load_image
from tavq.generator.sampling import SamplingConfig
from tavq.pipeline import Pipeline, read_recipe

ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "app" / "examples" / "cat.jpg"
CHROMIUM = shutil.which("chromium")
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM_FLAGS += ["--disable-background-networking", "--disable-component-update"]
SAMPLING = {"guidance_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

pytestmark = pytest.mark.slow  # a server and a browser


@pytest.fixture(scope="module")
def address(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`python app/demo.py` on a free port; stopped by Ctrl-C, after which its own folder is gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "app" / "demo.py"), "--checkpoint", str(tiny_checkpoint)]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=temporary,
        env=os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        # a job in the background of a shell ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert server.stdout.readline() == f"TA-VQ demo on http://127.0.0.1:{port}/\n"
        assert len(list(temporary.glob("tavq-demo-*"))) == 1
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 0 and not list(temporary.iterdir())


@pytest.fixture(scope="module")
def client(address: str, tmp_path_factory: pytest.TempPathFactory):
    from gradio_client import Client

    folder = tmp_path_factory.mktemp("downloads")
    client = Client(address, verbose=False, download_files=str(folder))
    yield client
    client.close()


def generate(client, prompt: str = "a dog runs on the grass", **changes):
    """Submit a job to /generate: one image, seed 7, no live preview."""
    settings = {"num_images": 1, "seed": 7, "best_of": 1, "live": False, **SAMPLING, **changes}
    return client.submit(prompt, **settings, api_name="/generate")


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def sent(path: Path):
    from gradio_client import handle_file

    return handle_file(str(path))


def error_of(job) -> str:
    with pytest.raises(Exception) as caught:  # gradio_client raises its AppError
        job.result()
    return str(caught.value)


def test_every_endpoint_has_its_name_and_no_other_is_public(client):
    names = set(client.view_api(return_format="dict")["named_endpoints"])
    assert names == {"/generate", "/caption", "/heatmaps", "/reconstruct", "/complete"}


def test_images_are_those_of_the_pipeline_and_carry_their_recipe(client, tiny_pipeline: Pipeline):
    gallery, files, seed, recipe = generate(client, num_images=2).result()
    recipes = [read_recipe(Path(file)) for file in files]
    expected = tiny_pipeline.generate(["a dog runs on the grass"] * 2, [7, 8], settings_of(recipes[0]))
    assert seed == 7 and "Seed: 8" in recipe
    for item, file, found, own in zip(gallery, files, recipes, expected, strict=True):
        assert found == own.recipe and item["caption"] == f"seed {found['seed']}"
        assert np.array_equal(pixels(file), np.asarray(own.image))
        assert Path(item["image"]).read_bytes() == Path(file).read_bytes()  # what the gallery downloads


def settings_of(recipe: dict):
    from tavq.generator.sampling import SamplingConfig

    return SamplingConfig(**recipe["settings"])


def test_the_live_preview_grows_row_by_row_and_ends_in_the_same_image(client, tiny_pipeline: Pipeline):
    job = generate(client, live=True)
    job.result()
    steps, rows = job.outputs(), tiny_pipeline.tokenizer.grid_size[0]
    assert len(steps) == rows
    assert [len(files) for _, files, *_ in steps] == [0] * (rows - 1) + [1]
    first, last = pixels(steps[0][0][0]["image"]), pixels(steps[-1][1][0])
    half = len(first) // 2
    assert np.unique(first[half:]).size == 1 < np.unique(last[half:]).size  # what is not sampled yet is grey
    assert np.array_equal(last, pixels(generate(client).result()[1][0]))


def test_a_random_seed_is_shown_and_generates_the_same_image_again(client):
    _, files, seed, _ = generate(client, seed=-1).result()
    again = generate(client, seed=seed).result()
    assert seed >= 0 and again[2] == seed and np.array_equal(pixels(files[0]), pixels(again[1][0]))


def test_captions_words_and_patches_are_those_of_the_pipeline(client, tiny_pipeline: Pipeline):
    best, table, words, patches = client.predict(
        sent(PHOTO), beam=3, n_best=2, alignment=4, unsure_below=0.5, api_name="/caption"
    )
    from tavq.captioner.decoding import DecodingConfig

    own = tiny_pipeline.caption([load_image(PHOTO)], DecodingConfig(beam=3, n_best=2, alignment=4))[0]
    assert best == own[0].text
    assert [row[:2] for row in table["data"]] == [[1, own[0].text], [2, own[1].text]]
    assert [row[2] for row in table["data"]] == pytest.approx([c.score for c in own], abs=1e-3)
    assert [word["class_or_confidence"] for word in words] == [
        "unsure" if word.probability < 0.5 else "sure" for word in own[0].words
    ]
    assert [item["caption"] for item in patches] == [word.text for word in own[0].words]


def test_the_maps_of_a_text_are_those_of_the_pipeline(client, tiny_pipeline: Pipeline):
    items = client.predict(sent(PHOTO), "a red cat", api_name="/heatmaps")
    own = tiny_pipeline.heatmaps(load_image(PHOTO), "a red cat")
    assert [item["caption"] for item in items] == [found.unit for found in own]
    shown = unit_overlays(load_image(PHOTO), own)
    for item, (overlay, _) in zip(items, shown, strict=True):
        assert np.array_equal(pixels(item["image"]), np.asarray(overlay))


def test_reconstruction_and_ids_are_those_of_the_pipeline(client, tiny_pipeline: Pipeline):
    seen, rebuilt, tokens, ids = client.predict(sent(PHOTO), api_name="/reconstruct")
    own = tiny_pipeline.reconstruct([load_image(PHOTO)])[0]
    size = tiny_pipeline.tokenizer.image_size_px
    assert ids == own.ids.tolist()
    assert np.array_equal(pixels(rebuilt), np.asarray(own.image))
    assert pixels(seen).shape == (size, size, 3)
    assert np.array_equal(pixels(tokens), np.asarray(token_grid(own.ids.numpy())))


@pytest.mark.parametrize("keep", ["top half", "left half", "a box"])
def test_completion_keeps_its_part_of_the_photo(client, tiny_pipeline: Pipeline, keep: str):
    box = {"box_left": 0, "box_top": 0, "box_width": 50, "box_height": 50}
    gallery, files, seed = client.predict(
        sent(PHOTO), "a cat", keep=keep, **box, num_images=2, seed=3, **SAMPLING, api_name="/complete"
    )
    half = tiny_pipeline.tokenizer.decode_size_px // 2
    kept = {"top half": np.s_[:half], "left half": np.s_[:, :half], "a box": np.s_[:half, :half]}[keep]
    photo = np.asarray(load_image(PHOTO).resize((2 * half, 2 * half), Image.Resampling.BICUBIC))
    assert seed == 3 and [item["caption"] for item in gallery] == ["seed 3", "seed 4"]
    first, second = map(pixels, files)
    assert np.array_equal(first[kept], photo[kept]) and np.array_equal(second[kept], photo[kept])
    assert not np.array_equal(first, second) and not np.array_equal(first, photo)


def test_variations_are_those_of_the_pipeline(client, tiny_pipeline: Pipeline):
    some = {"keep": "some of its tokens", "share": 50, "num_images": 1, "seed": 3}
    _, files, _ = client.predict(sent(PHOTO), "a cat", **some, **SAMPLING, api_name="/complete")
    settings = SamplingConfig(**SAMPLING)
    own = tiny_pipeline.vary(load_image(PHOTO), 0.5, "a cat", [3], settings)[0]
    assert np.array_equal(pixels(files[0]), np.asarray(own.image))


def test_mistakes_are_one_line_that_says_what_to_do(client, tmp_path: Path):
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(PHOTO.read_bytes()[:3000])
    cases = {
        "the prompt is empty; describe": generate(client, " "),
        "the seed is -2, expected 0 or more": generate(client, seed=-2),
        "no photo; upload one": client.submit(None, api_name="/reconstruct"),
        "replace the file": client.submit(sent(truncated), api_name="/reconstruct"),
        "n_best is 5 and beam 2; widen": client.submit(
            sent(PHOTO), beam=2, n_best=5, alignment=0, unsure_below=0, api_name="/caption"
        ),
    }
    for expected, job in cases.items():
        message = error_of(job)
        assert expected in message and "\n" not in message and str(tmp_path) not in message


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
