"""The generated scenes: the same in every run, true to their texts, with boxes and false twins that fit."""

import dataclasses

import numpy as np
import pytest

from tavq.alignment.units import split_units
from tavq.data.layouts import open_dataset
from tavq.data.scenes import (
    EXCHANGES,
    GROUNDS,
    LOOKS,
    RELATIONS,
    Look,
    Scene,
    Statement,
    Thing,
    caption_of,
    draw,
    exchanged,
    is_true,
    long_text_of,
    make_scene,
    statements_of,
)

RED, BLUE = Look("large", "red", "plain", "circle"), Look("small", "blue", "striped", "star")
SCENES = [make_scene("test", index) for index in range(150)]


def test_an_example_is_a_function_of_split_and_index():
    few, more = open_dataset("scenes:3", "train"), open_dataset("scenes:5", "train")
    assert (len(few), len(more)) == (3, 5) and few.ids == more.ids[:3]
    assert few[2].captions == more[2].captions and few[2].long_text == more[2].long_text
    assert few.load_image(2).tobytes() == more.load_image(2).tobytes()
    assert few.load_image(2).size == (96, 96)
    splits = [
        {draw(make_scene(split, i), 32).tobytes() for i in range(50)} for split in ("train", "val", "test")
    ]
    assert len(set.union(*splits)) == 150


@pytest.mark.parametrize("name", ["scenes:0", "scenes:many", "shapes:-1"])
def test_a_number_of_images_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="no number of training images"):
        open_dataset(name, "train")


def test_texts_say_one_object_and_all_of_them():
    left, right = Thing(RED, 0.25, 0.2), Thing(BLUE, 0.3, 0.8)
    scene = Scene("grey", (left, right))
    assert caption_of(scene, right) == "A small blue striped star on a grey background."
    assert long_text_of(scene) == (
        "A large red plain circle is above a small blue striped star. The background is grey."
    )


def test_every_word_of_an_object_becomes_a_unit():
    for scene in SCENES[:50]:
        units = split_units(long_text_of(scene))
        for thing in scene.things:
            assert set(thing.look) <= set(units.words)
            assert thing.look.words in units.phrases


def test_the_picture_changes_inside_the_boxes_alone():
    for scene in SCENES[:30]:
        shown = np.asarray(draw(scene, 192), dtype=int)
        empty = np.asarray(draw(dataclasses.replace(scene, things=()), 192), dtype=int)
        differs = np.abs(shown - empty).max(axis=-1) > 40
        inside = np.zeros_like(differs)
        for thing in scene.things:
            left, top, right, bottom = (round(192 * share) for share in thing.box)
            box = (slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1))
            inside[box] = True
            if thing.layer >= 0:  # its edges are in sight, so the box is tight
                rows, columns = np.nonzero(differs[box])
                assert np.ptp(rows) >= bottom - top - 4 and np.ptp(columns) >= right - left - 4
        assert differs.any() and not (differs & ~inside).any()


def test_an_object_in_front_hides_the_other():
    back, front = Thing(RED, 0.5, 0.5), Thing(BLUE, 0.55, 0.5, layer=1)
    at_front = draw(Scene("white", (back, front))).getpixel((53, 48))
    at_back = draw(Scene("white", (dataclasses.replace(back, layer=2), front))).getpixel((53, 48))
    assert at_front[2] > at_front[0] and at_back[0] > at_back[2]


def test_long_texts_are_true_and_their_twins_are_false():
    for scene in SCENES:
        assert all(is_true(statement, scene) for statement in statements_of(scene))
        for what in EXCHANGES:
            own, twin = exchanged(scene, what)
            assert own in statements_of(scene) and not is_true(twin, scene)
            words = sorted(own.one + own.other), sorted(twin.one + twin.other)
            if what == "attributes":
                assert not {twin.one, twin.other} & {thing.look for thing in scene.things}
            assert words[0] == words[1] and (own.relation == twin.relation) == (what == "attributes")


def test_a_twin_that_another_pair_makes_true_is_not_taken():
    swapped = RED._replace(colour="blue"), BLUE._replace(colour="red")
    pair = (Thing(RED, 0.2, 0.2), Thing(BLUE, 0.25, 0.8))
    others = (Thing(swapped[0], 0.8, 0.2), Thing(swapped[1], 0.8, 0.8))
    lie = Statement(swapped[0], "above", swapped[1])
    assert exchanged(Scene("white", pair), "attributes")[1] == lie
    assert is_true(lie, Scene("white", pair + others))
    assert exchanged(Scene("white", pair + others), "attributes")[1] != lie


def test_a_blind_model_cannot_tell_twins():
    """Neither direction of a relation is more frequent, and every word occurs."""
    said = [statement.relation for scene in SCENES for statement in statements_of(scene)]
    assert set(said) == set(RELATIONS)
    assert 0.35 < said.count("above") / (said.count("above") + said.count("below")) < 0.65
    assert {scene.ground for scene in SCENES} == set(GROUNDS)
    assert {len(scene.things) for scene in SCENES} == {2, 3, 4, 5, 6}
    assert {word for scene in SCENES for thing in scene.things for word in thing.look} == {
        word for look in LOOKS for word in look
    }
