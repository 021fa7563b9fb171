"""Word-to-patch maps: the plan's marginals, known words at known places, the command that draws them."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from tavq.commands.heatmap import main
from tavq.data.text_encoder import TextEncoder
from tavq.pipeline import Pipeline
from tavq.tokenizer.config import PRESETS
from tavq.tokenizer.heatmaps import check_aligned, heat_overlay, text_plan, unit_maps
from tavq.tokenizer.model import TAVQTokenizer, TokenizerConfig
from tavq.tokenizer.provenance import TokenizerProvenance

WORDS = ("black", "dog", "jump", "log")
TEXT = "a black dog jumps over a log"


class KnownTokenizer(TAVQTokenizer):
    """Code k lies in text space at axis k, and every level of an image has the ids that are given."""

    def __init__(self, ids: torch.Tensor, provenance: TokenizerProvenance):
        super().__init__(TokenizerConfig.of(PRESETS["tiny"], provenance=provenance))
        self.ids = ids

    def encode_levels(self, images):
        return self.ids.expand(len(images), 3, *self.grid_size)

    def project(self, ids, level=3):
        return torch.eye(self.num_codes)[ids]


@pytest.fixture
def known() -> TAVQTokenizer:
    """Codes 0 to 3 mean the words of TEXT; each fills a quarter, word k the k-th in reading order."""
    ids = torch.arange(4).view(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return KnownTokenizer(ids, TokenizerProvenance(align="ot", aligned_levels=(1, 0, 0)))


def by_word(texts) -> torch.Tensor:
    return torch.eye(64)[[WORDS.index(text) for text in texts]]


@pytest.fixture(scope="module")
def aligned_folder(tmp_path_factory):
    """A checkpoint that says it is aligned (random weights)."""
    torch.manual_seed(0)
    encoder = TextEncoder()
    provenance = TokenizerProvenance(
        align="ot", aligned_levels=(1, 2, 3), text_encoder="minilm", text_encoder_hash=encoder.hash
    )
    folder = tmp_path_factory.mktemp("aligned")
    config = TokenizerConfig.of(PRESETS["tiny"], provenance=provenance)
    TAVQTokenizer(config).save_pretrained(folder / "tokenizer")
    Image.linear_gradient("L").resize((60, 40)).save(folder / "photo.png")
    return folder


def test_the_plan_places_every_unit_whole_and_leaves_positions_free(tiny_tokenizer):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (2, 16), generator=generator)
    vectors = torch.nn.functional.normalize(torch.randn(2, 5, 384, generator=generator), dim=-1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    plan, cost = text_plan(tiny_tokenizer, ids, vectors, mask, 1)
    assert torch.allclose(plan.sum(1), mask / mask.sum(1, keepdim=True), atol=1e-6)
    assert (plan.sum((1, 2)) - 1).abs().max() < 1e-5 and (plan >= 0).all()
    assert (plan.sum(2) - 1 / 16).abs().max() > 1e-3  # semi-relaxed: positions need not be filled
    assert torch.allclose(cost[0, 3, 1], 1 - tiny_tokenizer.project(ids[0, 3], 1) @ vectors[0, 1], atol=1e-6)


def test_known_words_are_found_at_their_places(known):
    maps = unit_maps(known, Image.new("RGB", (32, 32)), TEXT, by_word)
    assert [found.unit for found in maps] == list(WORDS) and {found.kind for found in maps} == {1}
    for number, found in enumerate(maps):
        inside = known.ids.numpy() == number
        assert found.map.shape == (4, 4) and found.map.sum() == pytest.approx(1, abs=1e-5)
        assert found.map[inside].sum() > 0.99
        assert found.peak == pytest.approx(4, rel=0.02)  # a quarter of the tokens holds all


def test_an_unnamed_patch_stays_empty(known):
    known.ids = torch.where(known.ids == 3, 60, known.ids)  # the log is not there, something unnamed is
    black, dog, *_ = unit_maps(known, Image.new("RGB", (32, 32)), "a black dog", by_word)
    unnamed = known.ids.numpy() == 60
    assert black.map[unnamed].sum() < 0.15 and dog.map[unnamed].sum() < 0.15


def test_levels_carry_words_phrases_and_sentences(aligned_folder):
    pipeline = Pipeline.from_pretrained(aligned_folder)
    maps = pipeline.heatmaps(Image.open(aligned_folder / "photo.png"), TEXT)
    assert [(found.kind, found.unit) for found in maps] == [
        (1, "black"), (1, "dog"), (1, "jump"), (1, "log"), (2, "black dog jumps"), (2, "log"), (3, TEXT),
    ]  # fmt: skip
    assert all(found.map.sum() == pytest.approx(1, abs=1e-4) for found in maps)


def test_a_plain_tokenizer_an_untrained_level_and_an_empty_text_are_told(known, aligned_folder):
    picture = Image.new("RGB", (32, 32))
    plain = KnownTokenizer(known.ids, TokenizerProvenance())
    with pytest.raises(ValueError, match=r"trained with --align none.*use one"):
        unit_maps(plain, picture, TEXT, by_word)
    assert known.aligned_levels == {1: 1} and plain.aligned_levels == {}
    check_aligned(known)
    with pytest.raises(ValueError, match="Z_3 of this tokenizer is not aligned with text"):
        check_aligned(known, 3)
    with pytest.raises(ValueError, match="empty text"):
        unit_maps(known, picture, "  ", by_word)
    with pytest.raises(ValueError, match="holds no word"):
        unit_maps(known, picture, "the of", by_word)


def test_colour_lies_where_the_mass_is_and_an_even_map_has_none():
    photo = Image.new("RGB", (80, 40), (90, 90, 90))
    corner = np.zeros((4, 4), np.float32)
    corner[0, 0] = 1
    lit = np.asarray(heat_overlay(photo, corner)).astype(int)
    redness = lit[..., 0] - lit[..., 2]
    assert lit.shape == (40, 80, 3) and redness[2, 2] > 100 and redness[30, 60] == 0
    even = np.asarray(heat_overlay(photo, np.full((4, 4), 1 / 16, np.float32)))
    assert (even == 90).all()


@pytest.mark.slow
def test_the_command_writes_a_picture_a_unit(aligned_folder, tmp_path, capsys):
    photo = str(aligned_folder / "photo.png")
    main([photo, TEXT, "--out", str(tmp_path), "--checkpoint", str(aligned_folder), "--device", "cpu"])
    names = sorted(os.listdir(tmp_path / "photo"))
    assert len(names) == 8 and names[1] == "02-word-dog.png" and names[-1] == "overview.png"
    assert Image.open(tmp_path / "photo" / names[0]).size == (60, 40)
    assert str(tmp_path / "photo" / "overview.png") in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_takes_the_first_photos_of_a_data_set(aligned_folder, tmp_path):
    flags = ["--out", str(tmp_path), "--checkpoint", str(aligned_folder), "--device", "cpu"]
    main(["--data", "shapes", "--count", "2", *flags])
    assert sorted(os.listdir(tmp_path)) == ["test-00000", "test-00001"]


@pytest.mark.parametrize("arguments", [[], ["photo.png"], ["photo.png", "a dog", "--data", "shapes"]])
def test_the_command_asks_for_an_image_and_a_text(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "name an image and a text" in capsys.readouterr().err
