"""The measures on scenes do not lie: truth scores 100 %, what knows nothing scores chance, lies score 0."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tavq.data.scenes import Look, draw, exchanged, long_text_of, make_scene, statements_of
from tavq.eval import run_scenes, scenes
from tavq.eval.results import read_results
from tavq.eval.scene_reader import (
    VALUES,
    ReadScene,
    SceneReader,
    cell_labels,
    open_reader,
    score_drawing,
    train_reader,
)
from tavq.metrics.objects import compare_objects
from tavq.metrics.pointing import cells_inside, pointing_score

SCENES = [make_scene("test", index) for index in range(40)]
IDS = torch.zeros(len(SCENES), 3, 8, 8, dtype=torch.int64)


ALIGNED = SimpleNamespace(aligned_levels={1: 1, 2: 2, 3: 3}, grid_size=(8, 8))


def unencoded(texts):
    """Let texts reach the measure as they are."""
    return texts


def test_cells_inside_are_those_whose_centre_is():
    inside = cells_inside([(0.0, 0.0, 0.5, 0.3), (0.9, 0.9, 0.95, 0.95)], (4, 4))
    expected = np.zeros((4, 4), dtype=bool)
    expected[0, :2] = True
    expected[3, 3] = True  # the box's own centre lies in this cell
    assert (inside == expected).all()
    assert cells_inside([(0, 0, 1, 1)], (3, 5)).all()
    tiny = cells_inside([(0.26, 0.51, 0.3, 0.55)], (4, 4))
    assert tiny.sum() == 1 and tiny[2, 1]


def test_a_peak_inside_scores_1_outside_0_and_a_uniform_map_chance():
    inside = cells_inside([(0.25, 0.25, 0.75, 0.75)], (8, 8))
    heat = np.zeros((8, 8))
    heat[3, 3] = 1
    assert pointing_score(heat, inside) == 1
    assert pointing_score(np.roll(heat, 4, axis=0), inside) == 0
    assert pointing_score(np.full((8, 8), 1 / 64), inside) == inside.mean() == 0.25
    with pytest.raises(ValueError, match="one grid"):
        pointing_score(heat[:4], inside)


def test_the_pointing_game_scores_perfect_and_uniform_maps(monkeypatch):
    for scene in SCENES:
        boxes = {query.text: query.boxes for query in scenes.queries_of(scene)}
        monkeypatch.setattr(
            scenes,
            "maps_of",
            lambda tokenizer, ids, texts, level, boxes=boxes: [
                cells_inside(boxes[text], (8, 8)).astype(float) for text in texts
            ],
        )
        perfect, chances = scenes.pointing_game(ALIGNED, [scene], IDS[:1], unencoded)
        assert all(rows == [1.0] for rows in perfect.values()) and len(perfect) == 7
        monkeypatch.setattr(
            scenes, "maps_of", lambda tokenizer, ids, texts, level: np.ones((len(texts), 8, 8))
        )
        uniform, _ = scenes.pointing_game(ALIGNED, [scene], IDS[:1], unencoded)
        for name, rows in uniform.items():
            assert rows.mean() == pytest.approx(chances[f"{name}, chance"])
            assert 0 < chances[f"{name}, chance"] < 0.6


def test_a_word_belongs_to_all_objects_that_it_names():
    for scene in SCENES:
        boxes = {query.text: query.boxes for query in scenes.queries_of(scene)}
        for thing in scene.things:
            same = tuple(other.box for other in scene.things if other.look.colour == thing.look.colour)
            assert boxes[thing.look.colour] == same
            assert boxes[thing.look.words] == (thing.box,)


@pytest.mark.parametrize(("knows", "expected"), [(1.0, 1.0), (0.0, 0.5), (-1.0, 0.0)])
def test_binding_of_one_who_knows_who_is_blind_and_who_lies(monkeypatch, knows, expected):

    def fit(tokenizer, ids, texts, level):
        text = long_text_of(SCENES[int(ids.flatten()[0])])
        return knows * torch.tensor([[float(said in text) for said in texts]])

    monkeypatch.setattr(scenes, "alignment_scores", fit)
    ids = torch.arange(len(SCENES))[:, None, None, None].expand(-1, 3, 2, 2)
    rows = scenes.alignment_binding(ALIGNED, SCENES, ids, unencoded)
    assert set(rows) == {
        "binding by phrases, attributes",
        "binding by sentences, attributes",
        "binding by sentences, relation",
    }
    assert all(values.mean() == expected for values in rows.values())


def test_captions_that_say_all_name_all_and_those_of_another_scene_do_not():
    texts = [long_text_of(scene) for scene in SCENES]
    rows = scenes.score_captions(texts, texts, SCENES)
    for part in scenes.GRANULARITIES:
        assert (
            rows[f"captions, {part}: right"].mean() == 1 and rows[f"captions, {part}: left out"].mean() == 0
        )
    other = scenes.score_captions(texts, [*texts[1:], texts[0]], SCENES)
    assert other["captions, all attributes: right"].mean() < 0.05
    silent = scenes.score_captions(texts, [""] * len(SCENES), SCENES)
    assert silent["captions, shape: right"].mean() == 0 and silent["captions, shape: left out"].mean() == 1


def test_objects_are_named_once_each():
    assert scenes.looks_in(
        "A large red plain star is beside a small red plain star. A large red plain star."
    ) == [
        Look("large", "red", "plain", "star"),
        Look("small", "red", "plain", "star"),
    ]
    counts = compare_objects(["star", "star", "ring"], ["star", "cross"])
    assert (counts.right, counts.invented, counts.left_out) == (1, 2, 1)
    assert counts.precision == pytest.approx(1 / 3) and counts.recall == 0.5


def perfectly_read(scene) -> ReadScene:
    labels = dict(zip(VALUES, cell_labels(scene), strict=True))
    labels["kind"] = np.where(labels["kind"] < 0, VALUES["kind"].index("nothing"), labels["kind"])
    return ReadScene(labels, np.ones_like(labels["kind"], dtype=float))


def test_a_perfect_reader_sees_what_is_there_and_not_what_is_not():
    looks = [[thing.look for thing in scene.things] for scene in SCENES]
    own = [score_drawing(perfectly_read(s), w, statements_of(s)) for s, w in zip(SCENES, looks, strict=True)]
    shapes, colours, both, relations = np.mean(own, axis=0)
    assert shapes == colours == both == 1 and relations > 0.9  # two objects may share colour and shape
    others = [*SCENES[1:], SCENES[0]]
    other = [score_drawing(perfectly_read(o), w, []) for o, w in zip(others, looks, strict=True)]
    assert np.mean(other, axis=0)[2] < 0.3
    empty = ReadScene({name: np.full((16, 16), len(v) - 1) for name, v in VALUES.items()}, np.ones((16, 16)))
    for scene, own_looks in zip(SCENES, looks, strict=True):
        assert score_drawing(empty, own_looks, statements_of(scene)) == [0, 0, 0, 0]
    twins = [(perfectly_read(scene), exchanged(scene, "relation")) for scene in SCENES]
    vertical = [(seen, pair) for seen, pair in twins if pair[0].relation in ("above", "below")]
    assert np.mean([seen.shows(pair[0]) for seen, pair in vertical]) > 0.9
    assert np.mean([seen.shows(pair[1]) for seen, pair in vertical]) < 0.15


@pytest.mark.slow
def test_the_reader_learns(tmp_path):
    reader = SceneReader()
    train_reader(reader, steps=60, num_scenes=60)
    scene = make_scene("train", 0)
    seen = reader.eval().read(draw(scene))
    truth = cell_labels(scene)
    known = truth[-1] >= 0
    assert (seen.labels["kind"][known] == truth[-1][known]).mean() > 0.7


@pytest.mark.slow
def test_a_checkpoint_is_measured_in_all_its_parts(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    out, reader = tmp_path / "scenes.json", tmp_path / "reader.safetensors"
    monkeypatch.setattr("tavq.eval.scene_reader.train_reader", lambda made: train_reader(made, 2, 4))
    flags = ["--checkpoint", str(tiny_checkpoint), "--limit", "4", "--out", str(out), "--reader", str(reader)]
    run_scenes.main(flags)
    assert "texts are longer than 32 tokens" in capsys.readouterr().err  # as many as the tiny generator reads
    results = read_results(out)
    # The tiny captioner knows no relation, so that a statement and its twin are alike to it.
    assert results.metrics["binding by captioner, relation"]["value"] == 0.5
    rows = results.per_image()
    assert {len(values) for values in rows.values()} == {4}
    assert "drawing, long, shuffled: relation" in rows and "drawing, short, shuffled: colour" in rows
    assert 0 <= results.protocol["floors"]["reconstructions: relation, drawn scenes"] <= 1
    assert {name.split(",")[0].split()[0] for name in results.metrics} == {
        "pointing", "binding", "captions", "CIDEr", "drawing", "reconstructions:",
    }  # fmt: skip
    assert open_reader(reader).training is False
