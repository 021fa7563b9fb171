"""What the page of the demo is made of, without a browser: settings, history, parts of photos, tokens."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tavq.app import history, settings
from tavq.app.completing import AROUND, MIDDLE, PAINTED, SOME, completions, task_of
from tavq.app.gallery import FOLDER, GREETING, IMAGES_PER_PROMPT, PROMPTS, drawn_tokens, greeting
from tavq.app.tab_about import FIGURE, measured
from tavq.generator.sampling import SamplingConfig
from tavq.pipeline import CHECKPOINT, Pipeline, read_recipe
from tavq.tokenizer.model import TAVQTokenizer

ROOT = Path(__file__).resolve().parent.parent
A1111 = """a dog on the beach, sunset
Negative prompt: blurry, text
Steps: 20, Sampler: "Euler, a", CFG scale: 7.5, Seed: 123, Size: 512x512"""


def png(path: Path, **texts: str) -> Path:
    fields = PngInfo()
    for name, text in texts.items():
        fields.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=fields)
    return path


def test_the_settings_of_a_generated_png_come_back():
    values, unknown = settings.of_png(FOLDER / "00.png")
    recipe = read_recipe(FOLDER / "00.png")
    assert (values["prompt"], values["seed"]) == GREETING[0] and values["best_of"] == 1
    assert values["guidance_scale"] == recipe["settings"]["guidance_scale"]
    assert unknown == settings.unlike_here(recipe)


def test_a_setting_that_the_page_lacks_is_named_where_it_differs():
    own = dataclasses.asdict(SamplingConfig())
    assert settings.unlike_here({"settings": own}) == []
    other = {"settings": own | {"guidance_schedule": "cosine", "top_k": 5}}
    assert settings.unlike_here(other) == ["guidance_schedule cosine"]


def test_the_parameters_of_other_programs_are_read_and_what_has_no_place_is_named(tmp_path):
    values, unknown = settings.of_png(png(tmp_path / "other.png", parameters=A1111))
    assert values == {
        "prompt": "a dog on the beach, sunset",
        "negative_prompt": "blurry, text",
        "seed": "123",
        "guidance_scale": "7.5",
    }
    assert unknown == ["Steps", "Sampler", "Size"]
    taken, notes = settings.checked(values, 1024)
    assert (taken["seed"], taken["guidance_scale"], notes) == (123, 7.5, [])


def test_parameters_that_are_only_a_prompt_are_one():
    assert settings.of_parameters("a dog: brown, big")[0]["prompt"] == "a dog: brown, big"


@pytest.mark.parametrize(
    ("texts", "reason"),
    [({}, "carries no settings"), ({"tavq": "{"}, "damaged"), ({"tavq": "[1]"}, "damaged")],
)
def test_a_png_without_settings_says_so(tmp_path, texts, reason):
    with pytest.raises(ValueError, match=reason):
        settings.of_png(png(tmp_path / "any.png", **texts))


def test_a_file_that_is_no_png_says_so(tmp_path):
    (tmp_path / "any.png").write_bytes(b"GIF89a" + bytes(50))
    with pytest.raises(ValueError, match="not a PNG"):
        settings.of_png(tmp_path / "any.png")


def test_values_outside_the_limits_are_moved_and_named():
    odd = {"seed": "-5", "top_k": 99999, "top_p": "nan", "temperature": [], "best_of": 2.4}
    odd["prompt"] = "a" * 2000
    taken, notes = settings.checked(odd, num_codes=512)
    assert taken["seed"] == 0 and taken["top_k"] == 512 and taken["best_of"] == 2
    assert len(taken["prompt"]) == settings.MAX_PROMPT_LETTERS
    assert taken.keys().isdisjoint({"temperature", "top_p"}) and len(notes) == 5


def test_a_link_carries_what_it_was_made_of():
    values = {"prompt": "a dog & a cat?", "seed": 7, "top_p": 0.9}
    query = settings.to_query(values)
    assert query == "?prompt=a+dog+%26+a+cat%3F&seed=7&top_p=0.9"


def test_the_history_holds_each_image_once_newest_first_and_not_without_end():
    files = [str(path) for path in sorted(FOLDER.glob("*.png"))]
    entries = history.remember(history.remember([], files[:2]), [files[0]])
    assert [(entry["prompt"], entry["seed"]) for entry in entries] == [GREETING[0], GREETING[1]]
    shown = history.thumbnails(entries)
    assert shown[0][0].size == (96, 96) and shown[0][1].endswith("seed 4")
    many = [{**entries[0], "seed": seed} for seed in range(100)]
    assert len(history.remember(many, files)) == history.MAX_ENTRIES


def test_the_thumbnails_of_a_full_history_fit_into_the_storage_of_a_browser():
    entry = history.entry_of(FOLDER / "00.png")
    assert len(str(entry)) * history.MAX_ENTRIES < 1_000_000  # browsers keep 5 MB of an address


@pytest.fixture
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_a_painted_part_is_the_union_of_the_strokes(photo):
    first = Image.new("RGBA", photo.size)
    first.paste((255, 0, 0, 255), (0, 0, 10, 10))
    second = Image.new("RGBA", photo.size)
    second.paste((255, 0, 0, 90), (50, 30, 60, 40))
    mask = task_of(PAINTED, photo, [first, None, second], 60).mask
    assert mask is not None and mask.sum() == 200 and mask[:10, :10].all() and mask[30:, 50:].all()
    with pytest.raises(ValueError, match="nothing is painted"):
        task_of(PAINTED, photo, [Image.new("RGBA", photo.size)], 60)
    with pytest.raises(ValueError, match="no photo"):
        task_of(MIDDLE, None, [], 60)


def test_outpainting_keeps_a_smaller_photo_in_the_middle(photo):
    task = task_of(AROUND, photo, [], 50)
    assert task.photo.size == photo.size and task.mask is not None
    assert not task.mask[10:30, 15:45].any() and task.mask.sum() == 40 * 60 - 20 * 30
    inside = np.asarray(task.photo.crop((15, 10, 45, 30)))
    assert np.array_equal(inside, np.asarray(photo.resize((30, 20))))


def test_completions_keep_the_shape_and_the_pixels_of_the_photo(tiny_pipeline: Pipeline, photo):
    task = task_of("left half", photo, [], 60)
    (done,) = completions(tiny_pipeline, task, "a dog", [3], SamplingConfig(), 30)
    result = np.asarray(done.image)
    assert np.array_equal(result[:, 30:], np.asarray(photo)[:, 30:])
    assert not np.array_equal(result[:, :30], np.asarray(photo)[:, :30])
    (varied,) = completions(tiny_pipeline, task_of(SOME, photo, [], 60), "a dog", [3], SamplingConfig(), 30)
    assert varied.image.size == photo.size


def test_mixed_tokens_are_those_of_both_and_a_larger_share_holds_a_smaller_one():
    from tavq.app.codes import mixed

    first, second = torch.zeros(4, 6, dtype=torch.int64), torch.ones(4, 6, dtype=torch.int64)
    assert torch.equal(mixed(first, second, 0), first) and torch.equal(mixed(first, second, 1), second)
    third, half = mixed(first, second, 1 / 3), mixed(first, second, 0.5)
    assert third.sum() == 8 and half.sum() == 12 and (half >= third).all()


def test_a_code_is_found_elsewhere_in_the_image():
    from tavq.app.codes import positions_line, where_else

    ids = torch.tensor([[5, 9, 5], [9, 9, 5]])
    assert where_else(ids, 2) == [(0, 0), (1, 2)]
    assert positions_line(where_else(ids, 2)) == "row 1 column 1, row 2 column 3"


def test_words_and_patches_of_a_code_are_those_of_the_weights(tiny_pipeline: Pipeline):
    from tavq.app.codes import Codes
    from tavq.app.token_views import code_card, token_buttons

    codes = Codes(tiny_pipeline)
    words = tiny_pipeline.captioner.config.words
    assert codes.levels == (1, 2, 3) and set(codes.words(5, 1)) <= set(words)
    assert codes.patches(5) == []  # the generated images belong to the shipped codebook
    ids = tiny_pipeline.encode([Image.open(FOLDER / "00.png")])[0]
    card = code_card(codes, ids, 1)
    assert f"code {int(ids.flatten()[1])}" in card and codes.words(int(ids.flatten()[1]), 2)[0] in card
    assert token_buttons(Image.new("RGB", (8, 8)), ids, 1).count("<button") == ids.numel()


def test_the_greeting_belongs_to_the_shipped_weights_alone(tiny_pipeline: Pipeline):
    assert greeting(tiny_pipeline) == [] and drawn_tokens(tiny_pipeline.tokenizer.codebook_hash) is None
    shipped = TAVQTokenizer.from_pretrained(Path(CHECKPOINT) / "tokenizer")
    ids = drawn_tokens(shipped.codebook_hash)
    assert ids is not None, "the weights are new: python app/gallery.py draws the images again"
    assert ids.shape == (len(PROMPTS) * IMAGES_PER_PROMPT, *shipped.grid_size)


@pytest.mark.slow
def test_the_greeting_is_what_the_shipped_weights_draw():
    pipeline = Pipeline.from_pretrained()
    shown = greeting(pipeline)
    assert len(shown) == len(GREETING), "the weights are new: python app/gallery.py draws the images again"
    recipe = shown[0].recipe
    drawn = pipeline.generate(recipe["prompt"], recipe["seed"], SamplingConfig(**recipe["settings"]))[0]
    assert np.array_equal(np.asarray(drawn.image), np.asarray(Image.open(shown[0].path)))


def test_numbers_of_the_weights_are_read_from_their_results(tmp_path):
    rows = measured(Path(CHECKPOINT) / "results")
    assert ("Captions" in rows[0][0], rows[0][3]) == (True, "1,000") and " to " in rows[0][2]
    assert measured(tmp_path) == []


def test_the_figure_is_that_of_the_documentation():
    assert FIGURE.read_bytes() == (ROOT / "docs" / "images" / "architecture.svg").read_bytes()
