"""The Python interface: what callers may give, and what they get."""

import dataclasses
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tavq
from tavq.data.images import load_image, open_image, open_images
from tavq.generator.config import SamplingConfig
from tavq.generator.sampling import sample
from tavq.pipeline import Pipeline, read_recipe

ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "app" / "examples" / "cat.jpg"
SIDEWAYS = 6  # EXIF orientation of a photo taken with the camera turned by 90 degrees


@pytest.fixture(scope="module")
def listening(tiny_checkpoint: Path) -> Pipeline:
    """A pipeline whose generator heeds the text; that of a new one gives every code the same logit."""
    pipeline = Pipeline.from_pretrained(tiny_checkpoint)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in pipeline.generator.parameters():
            parameter.normal_(std=0.5)
    return pipeline


def pixels(result) -> np.ndarray:
    return np.asarray(result.image)


def test_the_version_is_that_of_the_package():
    assert tavq.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_a_prompt_a_seed_and_a_number_of_images(tiny_pipeline):
    images = tiny_pipeline.generate("a dog", seed=7, num_images=3)
    assert [image.seed for image in images] == [7, 8, 9] and {image.text for image in images} == {"a dog"}
    same = tiny_pipeline.generate("a dog", seed=7, num_images_per_prompt=3)
    listed = tiny_pipeline.generate(["a dog"] * 3, [7, 8, 9])
    each = tiny_pipeline.generate("a dog", seed=[7, 8, 9])
    for others in (same, listed, each):
        assert [other.recipe for other in others] == [image.recipe for image in images]
        assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(images, others, strict=True))


def test_several_prompts_share_the_first_seed_or_have_one_each(tiny_pipeline):
    shared = tiny_pipeline.generate(["a dog", "a cat"], seed=3, num_images=2)
    assert [(image.text, image.seed) for image in shared] == [
        ("a dog", 3),
        ("a dog", 4),
        ("a cat", 3),
        ("a cat", 4),
    ]
    assert [image.seed for image in tiny_pipeline.generate(["a dog", "a cat"], [5, 9])] == [5, 9]


def test_a_random_seed_is_in_the_recipe(tiny_pipeline):
    first = tiny_pipeline.generate("a dog", seed=-1)[0]
    second = tiny_pipeline.generate("a dog", seed=-1)[0]
    assert first.seed != second.seed and min(first.seed, second.seed) >= 0
    assert np.array_equal(pixels(first), pixels(tiny_pipeline.generate("a dog", seed=first.seed)[0]))


def test_settings_have_the_names_of_the_flags(tiny_pipeline):
    named = tiny_pipeline.generate("a dog", guidance_scale=2, top_k=9)[0]
    settings = SamplingConfig(guidance_scale=2, top_k=9)
    assert named.recipe == tiny_pipeline.generate("a dog", settings=settings)[0].recipe
    with pytest.raises(TypeError, match=r"no argument 'guidance'; .*guidance_scale, .*top_k"):
        tiny_pipeline.generate("a dog", guidance=2)
    with pytest.raises(TypeError, match=r"no argument 'beams'; .*beam, n_best"):
        tiny_pipeline.caption(PHOTO, beams=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": ["a dog", 3]}, "prompt is a int, expected a text"),
        ({"prompt": "a dog", "seed": -2}, "seed is -2, expected 0 or more"),
        ({"prompt": "a dog", "seed": 2**63}, "expected 0 or more"),
        ({"prompt": "a dog", "seed": 1.5}, "cannot be interpreted as an integer"),
        ({"prompt": ["a dog", "a cat"], "seed": [1]}, "got 2 prompts, 1 seeds"),
        ({"prompt": "a dog", "negative_prompt": ["a", "b"]}, "2 negative prompts"),
        ({"prompt": "a dog", "num_images": 0}, "num_images is 0"),
        ({"prompt": "a dog", "best_of": 0}, "best_of is 0"),
        ({"prompt": "a dog", "negative_prompt": "a cat", "guidance_scale": 1}, "needs guidance"),
    ],
)
def test_bad_arguments_are_named(tiny_pipeline, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny_pipeline.generate(**arguments)


def test_a_string_where_a_list_is_meant_never_becomes_letters(tiny_pipeline):
    assert len(tiny_pipeline.generate("abc")) == 1
    with pytest.raises(ValueError, match="expected a list"):
        tiny_pipeline.alignment_encoder.encode("abc")
    assert len(tiny_pipeline.caption(str(PHOTO))) == 1


def test_a_negative_prompt_takes_the_place_of_the_null_text(listening):
    plain, away = (listening.generate("a dog", negative_prompt=text)[0] for text in (None, "a red cat"))
    assert away.recipe == plain.recipe | {"negative_prompt": "a red cat"}
    assert not torch.equal(away.ids, plain.ids)

    # Away from the prompt itself nothing is left of guidance: cond and uncond are the same.
    itself = listening.generate("a dog", negative_prompt="a dog")[0]
    unguided = listening.generate("a dog", guidance_scale=1)[0]
    assert torch.equal(itself.ids, unguided.ids) and not torch.equal(itself.ids, plain.ids)

    blank = listening.generate("a dog", negative_prompt=" ")[0]
    assert blank.recipe == plain.recipe and torch.equal(blank.ids, plain.ids)


def test_each_prompt_has_its_own_negative_prompt_or_none(listening):
    both = listening.generate(["a dog"] * 2, negative_prompt=["", "a red cat"])
    alone = [listening.generate("a dog", negative_prompt=text)[0] for text in (None, "a red cat")]
    assert [image.recipe for image in both] == [image.recipe for image in alone]
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(both, alone, strict=True))


def test_drafts_do_not_change_an_image_with_a_negative_prompt(listening):
    model, texts = listening.generator, listening.text_states(["a dog", "a cat"])
    negative = listening.text_states(["a red cat", "water"])
    plain = sample(model, texts, [1, 2], SamplingConfig(draft_tokens=1), negative=negative)
    drafted = sample(model, texts, [1, 2], SamplingConfig(draft_tokens=5, micro_batch=2), negative=negative)
    assert torch.equal(plain, drafted)


def test_a_stream_and_a_completion_take_a_negative_prompt(listening):
    whole = listening.generate("a dog", negative_prompt="a cat", seed=4)[0]
    *_, last = listening.stream("a dog", 4, negative_prompt="a cat")
    assert torch.equal(last.ids, whole.ids) and last.recipe == whole.recipe
    mask = torch.ones(8, 8, dtype=torch.bool)
    away = listening.complete(PHOTO, mask, "a dog", seed=4, negative_prompt="a cat")[0]
    assert torch.equal(away.ids, whole.ids), "all of the image is masked"


def test_images_come_as_paths_pil_images_and_arrays(tiny_pipeline):
    image = load_image(PHOTO)
    bytes_HWC = np.asarray(image)
    kinds = [PHOTO, str(PHOTO), image, bytes_HWC, bytes_HWC / 255]
    ids = tiny_pipeline.encode(kinds)
    assert (ids == ids[0]).all() and torch.equal(tiny_pipeline.encode(PHOTO), ids[:1])
    assert len(open_images(np.stack([bytes_HWC, bytes_HWC]))) == 2
    captions = tiny_pipeline.caption(kinds)
    assert len({caption.text for caption in captions}) == 1
    assert np.array_equal(np.asarray(captions[3].image), bytes_HWC)
    assert np.array_equal(
        pixels(tiny_pipeline.reconstruct(PHOTO)[0]), pixels(tiny_pipeline.reconstruct([image])[0])
    )
    assert tiny_pipeline.heatmaps(bytes_HWC, "a cat")[0].unit == "cat"


def test_an_opened_photo_is_turned_upright(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = SIDEWAYS
    image.save(tmp_path / "sideways.jpg", exif=exif)
    assert open_image(Image.open(tmp_path / "sideways.jpg")).size == (20, 40)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 20, 20), np.uint8), "array of shape"),
        (np.full((20, 20, 3), 1.5), "outside"),
        (np.full((20, 20, 3), np.nan), "outside"),
        (np.zeros((20, 20, 3), np.int64), "array of int64"),
        (np.zeros((4, 4), np.uint8), "at least 8 px"),
        (3, "got a int as an image"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array, message):
    with pytest.raises((ValueError, TypeError), match=message):
        open_image(array)


def test_a_recipe_of_an_earlier_version_means_what_it_meant(tiny_pipeline, tmp_path):
    generated = tiny_pipeline.generate("a dog")[0]
    settings = {"guidance": 4.5, "temperature": 1.0, "top_k": 100, "top_p": 1.0}
    dataclasses.replace(generated, recipe=generated.recipe | {"settings": settings}).save(
        tmp_path / "dog.png"
    )
    sampling = SamplingConfig(**read_recipe(tmp_path / "dog.png")["settings"])
    assert [sampling.guidance_scale_at(position, 16) for position in (0, 15)] == [4.5, 4.5]


def test_results_are_saved(tiny_pipeline, tmp_path):
    generated = tiny_pipeline.generate("a dog", negative_prompt="a cat")[0]
    generated.save(str(tmp_path / "dog.png"))
    assert read_recipe(tmp_path / "dog.png") == generated.recipe
    assert Image.open(tmp_path / "dog.png").text["parameters"].splitlines()[:2] == [
        "a dog",
        "Negative prompt: a cat",
    ]
    tiny_pipeline.reconstruct(PHOTO)[0].save(tmp_path / "cat.png")
    captions = tiny_pipeline.caption(PHOTO, n_best=2)[0]
    captions.save(tmp_path / "cat.txt")
    captions.save(tmp_path / "cat.json")
    assert (tmp_path / "cat.txt").read_text().splitlines() == [caption.text for caption in captions]
    best = json.loads((tmp_path / "cat.json").read_text())[0]
    assert (best["text"], best["score"]) == (captions.text, captions.score)
    assert [word["probability"] for word in best["words"]] == [w.probability for w in captions[0].words]
    with pytest.raises(ValueError, match=r"end the name in .txt or .json"):
        captions.save(tmp_path / "cat.doc")


def test_a_mask_is_bools_or_an_image_that_is_white_where_it_is_drawn_anew(tiny_pipeline):
    bools = np.zeros((30, 30), dtype=bool)
    bools[:, 15:] = True
    kinds = [torch.from_numpy(bools), bools, Image.fromarray(bools), (bools * 255).astype(np.uint8)]
    results = [tiny_pipeline.complete(PHOTO, mask, "a cat", seed=2)[0] for mask in kinds]
    assert all(np.array_equal(pixels(result), pixels(results[0])) for result in results)


def test_completions_and_variations_have_seeds_that_count_up(tiny_pipeline):
    mask = torch.ones(8, 8, dtype=torch.bool)
    assert [i.seed for i in tiny_pipeline.complete(PHOTO, mask, "a", seed=3, num_images=2)] == [3, 4]
    assert [i.seed for i in tiny_pipeline.vary(PHOTO, 0.5, "a", seed=[9, 2])] == [9, 2]


def test_images_come_one_by_one(tiny_pipeline):
    images = tiny_pipeline.generate_each(["a dog", "a cat"], 5, num_images=2, best_of=2, micro_batch=3)
    assert (next(images).seed, next(images).seed) == (5, 6)
    assert [image.text for image in images] == ["a cat", "a cat"]
