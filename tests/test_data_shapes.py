"""The generated shapes: the same in every run, true to their captions, disjoint by split."""

import numpy as np
import pytest

from tavq.alignment.units import split_units
from tavq.data.layouts import open_dataset
from tavq.data.shapes import COLOURS, GROUNDS, Scene, Shape, describe, draw, make_scene, shapes_examples


def test_examples_are_a_function_of_split_and_index():
    first, again = open_dataset("shapes", "train"), open_dataset("shapes", "train")
    assert len(first) == 2000 and first.ids == again.ids
    assert first[7].captions == again[7].captions
    assert first.load_image(7).tobytes() == again.load_image(7).tobytes()


def test_splits_share_no_picture():
    pictures = {
        split: {draw(make_scene(split, index), 32).tobytes() for index in range(100)}
        for split in ("train", "val", "test")
    }
    assert all(len(drawn) == 100 for drawn in pictures.values())
    assert len(set.union(*pictures.values())) == 300
    assert len(open_dataset("shapes")) == 2400


@pytest.mark.parametrize("size_px", [32, 100])
def test_picture_shows_what_the_scene_says(size_px):
    for index in range(30):
        scene = make_scene("val", index)
        image = draw(scene, size_px)
        assert image.size == (size_px, size_px)
        assert image.getpixel((0, 0)) == GROUNDS[scene.ground]
        for shape in scene.shapes:
            assert image.getpixel((int(shape.x * size_px), int(shape.y * size_px))) == COLOURS[shape.colour]


def test_large_shape_covers_more_than_small():
    def covered(size, radius):
        scene = Scene("white", (Shape(size, "red", "circle", 0.5, 0.5, radius),))
        return (np.asarray(draw(scene, 64))[..., 1] < 128).mean()

    assert covered("large", 0.2) == pytest.approx(np.pi * 0.2**2, rel=0.05)
    assert covered("small", 0.11) < covered("large", 0.2) / 2


def test_captions_speak_at_three_granularities():
    left = Shape("large", "red", "circle", 0.25, 0.5, 0.2)
    right = Shape("small", "orange", "star", 0.75, 0.5, 0.1)
    assert describe(Scene("black", (left, right))) == (
        "A large red circle is left of a small orange star on a black background.",
        "Two shapes lie on a black background: a large red circle and a small orange star.",
        "A large red circle and a small orange star.",
        "A small orange star and a large red circle.",
        "large red circle, small orange star.",
    )


def test_units_of_a_caption_name_every_shape():
    for example in shapes_examples("test", count=50):
        index = int(example.id.split("-")[1])
        units = split_units(example.captions[2])
        for shape in make_scene("test", index).shapes:
            assert shape.words in units.phrases
            assert {shape.size, shape.colour, shape.kind} <= set(units.words)
