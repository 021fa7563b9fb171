"""The demo's endpoints for programs: names, types, results, and the reasons of refusals."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tavq.captioner.decoding import DecodingConfig
from tavq.data.images import load_image
from tavq.generator.sampling import SamplingConfig
from tavq.pipeline import Pipeline, read_recipe

from .demo_server import PHOTO, ROOT, DemoServer, demo_server

API_PAGE = ROOT / "docs" / "api.md"

SAMPLING = {"guidance_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

pytestmark = pytest.mark.slow  # a server


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    with demo_server(tiny_checkpoint, tmp_path_factory.mktemp("demo")) as server:
        yield server
    assert server.process.returncode == 130  # ended by Ctrl-C


@pytest.fixture(scope="module")
def client(server: DemoServer, tmp_path_factory: pytest.TempPathFactory):
    from gradio_client import Client

    folder = tmp_path_factory.mktemp("downloads")
    client = Client(server.address, verbose=False, download_files=str(folder))
    yield client
    client.close()


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def photo(path: Path = PHOTO):
    from gradio_client import handle_file

    return handle_file(str(path))


def error_of(job) -> str:
    with pytest.raises(Exception) as caught:  # gradio_client raises its AppError
        job.result()
    return str(caught.value)


def test_names_of_endpoints_arguments_and_results_are_stable(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    found = {
        name: (
            " ".join(argument["parameter_name"] for argument in endpoint["parameters"]),
            " ".join(result["label"] for result in endpoint["returns"]),
        )
        for name, endpoint in endpoints.items()
    }
    sampling = "negative_prompt num_images seed guidance_scale temperature top_k top_p"
    assert found == {
        "/generate": (f"prompt {sampling} best_of", "images recipes"),
        "/draw": ("prompt seed", "image"),
        "/caption": ("image beam n_best alignment", "captions"),
        "/heatmaps": ("image text", "maps"),
        "/reconstruct": ("image", "image ids"),
        "/complete": (f"image prompt keep {sampling}", "images recipes"),
        "/vary": (f"image prompt share {sampling}", "images recipes"),
    }
    assert all(endpoint["description"] for endpoint in endpoints.values())


def test_images_are_those_of_the_pipeline_and_carry_their_recipe(client, tiny_pipeline: Pipeline):
    images, recipes = client.predict("a dog", num_images=2, seed=7, **SAMPLING, api_name="/generate")
    own = tiny_pipeline.generate("a dog", 7, SamplingConfig(**SAMPLING), num_images=2)
    for path, recipe, expected in zip(images, recipes, own, strict=True):
        assert recipe == expected.recipe == read_recipe(Path(path))
        assert np.array_equal(pixels(path), np.asarray(expected.image))


def test_a_negative_prompt_reaches_the_pipeline(client, tiny_pipeline: Pipeline):
    (image,), (recipe,) = client.predict("a dog", "a red cat", seed=7, **SAMPLING, api_name="/generate")
    settings = SamplingConfig(**SAMPLING)
    own = tiny_pipeline.generate("a dog", 7, settings, negative_prompt="a red cat")[0]
    assert recipe["negative_prompt"] == "a red cat" and np.array_equal(pixels(image), np.asarray(own.image))


def test_what_the_documentation_shows_runs(server: DemoServer, tmp_path: Path, monkeypatch, capsys):
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```", API_PAGE.read_text(), re.DOTALL | re.MULTILINE)
    for language, block in blocks:
        text = block.replace("http://127.0.0.1:7860/", server.address)
        if language == "python":
            exec(compile(text, "api.md", "exec"), {})
            *_, seed, words = capsys.readouterr().out.splitlines()
            assert seed.endswith(".png 7") and re.search(r"\[0\.\d+(, 0\.\d+)*\]$", words)
        else:
            run = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60, check=True)
            assert run.stdout.rstrip().rpartition("event: ")[2].startswith("complete\ndata: ["), run.stdout


def test_the_tables_of_the_documentation_name_all_arguments_and_results(client):
    rows = re.findall(r"^\| `/(\w+)` \| (.+) \| (.+) \|$", API_PAGE.read_text(), flags=re.MULTILINE)
    told = {f"/{name}": (named(arguments), named(results)) for name, arguments, results in rows}
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    for name, endpoint in endpoints.items():
        arguments = [argument["parameter_name"] for argument in endpoint["parameters"]]
        assert told.pop(name) == (arguments, [result["label"] for result in endpoint["returns"]])
    assert not told


def named(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_the_result_grows_image_by_image(client):
    job = client.submit("a dog", num_images=3, seed=7, api_name="/generate")
    job.result()
    assert [len(images) for images, _ in job.outputs()] == [1, 2, 3]


def test_the_best_of_several_candidates_is_that_of_the_pipeline(client, tiny_pipeline: Pipeline):
    (image,), (recipe,) = client.predict("a dog", seed=7, best_of=3, **SAMPLING, api_name="/generate")
    own = tiny_pipeline.generate("a dog", 7, SamplingConfig(**SAMPLING), best_of=3)[0]
    assert recipe["best_of"] == 3 and np.array_equal(pixels(image), np.asarray(own.image))


def test_a_random_seed_is_returned_and_draws_the_same_image_again(client):
    image = Path(client.predict("a dog", api_name="/draw"))
    seed = read_recipe(image)["seed"]
    again = client.predict("a dog", seed=seed, api_name="/draw")
    assert image.name.startswith(f"seed-{seed}-") and np.array_equal(pixels(image), pixels(again))


def test_captions_have_numbers_as_probabilities(client, tiny_pipeline: Pipeline):
    captions = client.predict(photo(), beam=3, n_best=2, alignment=4, api_name="/caption")
    settings = DecodingConfig(beam=3, n_best=2, alignment=4)
    own = tiny_pipeline.caption([load_image(PHOTO)], settings)[0]
    assert [caption["text"] for caption in captions] == [caption.text for caption in own]
    assert [caption["score"] for caption in captions] == pytest.approx([c.score for c in own], abs=1e-5)
    for caption, expected in zip(captions, own, strict=True):
        words = [(word["text"], pytest.approx(word["probability"], abs=1e-5)) for word in caption["words"]]
        assert words == [(word.text, word.probability) for word in expected.words]


def test_maps_are_those_of_the_pipeline_and_sum_to_one(client, tiny_pipeline: Pipeline):
    maps = client.predict(photo(), "a red cat", api_name="/heatmaps")
    own = tiny_pipeline.heatmaps(load_image(PHOTO), "a red cat")
    assert [found["text"] for found in maps] == [expected.unit for expected in own]
    assert {found["kind"] for found in maps} == {"word", "phrase", "sentence"}
    for found, expected in zip(maps, own, strict=True):
        assert np.allclose(found["map"], expected.map) and np.sum(found["map"]) == pytest.approx(1, abs=1e-3)


def test_reconstruction_and_ids_are_those_of_the_pipeline(client, tiny_pipeline: Pipeline):
    image, ids = client.predict(photo(), api_name="/reconstruct")
    own = tiny_pipeline.reconstruct([load_image(PHOTO)])[0]
    assert ids == own.ids.tolist() and np.array_equal(pixels(image), np.asarray(own.image))


@pytest.mark.parametrize("keep", ["top", "left", "box=0,0,{w},{h}"])
def test_completion_keeps_its_part_of_the_image(client, tiny_pipeline: Pipeline, keep: str):
    original = load_image(PHOTO)
    width, height = original.size
    part = keep.format(w=width // 2, h=height // 2)
    images, recipes = client.predict(
        photo(), "a cat", keep=part, num_images=2, seed=3, **SAMPLING, api_name="/complete"
    )
    assert [recipe["seed"] for recipe in recipes] == [3, 4]
    half = tiny_pipeline.tokenizer.decode_size_px // 2
    kept = {"top": np.s_[:half], "left": np.s_[:, :half]}.get(keep, np.s_[:half, :half])
    expected = np.asarray(original.resize((2 * half, 2 * half), Image.Resampling.BICUBIC))
    first, second = map(pixels, images)
    assert np.array_equal(first[kept], expected[kept]) and np.array_equal(second[kept], expected[kept])
    assert not np.array_equal(first, second)


def test_variations_are_those_of_the_pipeline(client, tiny_pipeline: Pipeline):
    (image,), _ = client.predict(photo(), "a cat", share=0.5, seed=3, **SAMPLING, api_name="/vary")
    own = tiny_pipeline.vary(load_image(PHOTO), 0.5, "a cat", [3], SamplingConfig(**SAMPLING))[0]
    assert np.array_equal(pixels(image), np.asarray(own.image))


def test_mistakes_are_one_line_with_the_field_what_was_got_and_what_is_allowed(client, tmp_path: Path):
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(PHOTO.read_bytes()[:3000])
    cases = [
        ("the prompt is empty; describe", "/generate", (" ",), {}),
        ("seed is -2, expected a whole number from -1 to 2,147,483,647", "/generate", ("a",), {"seed": -2}),
        ("num_images is the text 'two', expected a whole number from 1 to 16", "/generate", ("a",),
         {"num_images": "two"}),
        ("image is null, expected an uploaded file", "/reconstruct", (None,), {}),
        ("replace the file", "/reconstruct", (photo(truncated),), {}),
        ("n_best is 5 and beam 2; widen", "/caption", (photo(),), {"beam": 2, "n_best": 5}),
        ("keep is 'middle', expected top", "/complete", (photo(), "a"), {"keep": "middle"}),
    ]  # fmt: skip
    for expected, endpoint, values, named in cases:
        message = error_of(client.submit(*values, **named, api_name=endpoint))
        assert expected in message and "\n" not in message and str(tmp_path) not in message
