"""Alignment: matched pairs become cheap, and the gradient reaches the codebook."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tavq.alignment.aligner import AlignmentConfig, TextAligner, TextBank, TextUnits, differentiable_lookup
from tavq.alignment.text_index import UnitIndex
from tavq.data.images import to_tensor
from tavq.data.layouts import open_dataset
from tavq.data.text_encoder import TextEncoder
from tavq.tokenizer.fit_projections import codes_of_photos, fit_projections
from tavq.tokenizer.heatmaps import aligned_levels_field
from tavq.tokenizer.model import PRESETS, TAVQTokenizer
from tavq.tokenizer.retrieval import alignment_scores, text_to_image_ranks

CONFIG = AlignmentConfig(samples=8, bank_size=16)


def made_up(batch: int = 6, codes: int = 20, width: int = 5, text_dim: int = 12):
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(batch, width, 3, 3, generator=generator), dim=1) for _ in range(3)]
    codebook = F.normalize(torch.randn(codes, width, generator=generator), dim=1).requires_grad_()
    mask = torch.rand(batch, 4, generator=generator) > 0.3
    mask[:, 0] = True
    texts = [TextUnits(F.normalize(torch.randn(batch, 4, text_dim, generator=generator), dim=-1), mask)] * 3
    bank = TextBank(
        F.normalize(torch.randn(16, text_dim, generator=generator), dim=-1), torch.zeros(batch, 16).bool()
    )
    return features, codebook, texts, [bank] * 3


def codebook_gradient(lookup: str) -> torch.Tensor | None:
    torch.manual_seed(0)
    features, codebook, texts, banks = made_up()
    features = [level.requires_grad_() for level in features]
    aligner = TextAligner(dataclasses.replace(CONFIG, lookup=lookup), 20, 5, 12)
    aligner(features, codebook, texts, banks).loss.backward()
    assert all(level.grad.norm() > 0 for level in features), "the encoder is moved either way"
    return codebook.grad


def test_the_gradient_reaches_the_codebook_and_not_with_plain_straight_through():
    assert codebook_gradient("soft").norm() > 0
    assert codebook_gradient("straight-through") is None


def test_the_look_up_gives_codes_in_value_whatever_the_gradient():
    latents, codebook = torch.randn(30, 5), torch.randn(20, 5)
    expected = codebook[torch.cdist(latents, codebook).argmin(dim=1)]
    marks = torch.arange(20.0)[:, None]
    for mode in ("soft", "straight-through"):
        codes, found = differentiable_lookup(latents, codebook, marks, mode, 0.1)
        assert torch.allclose(codes, expected, atol=1e-5)
        assert torch.allclose(codebook[found[:, 0].round().long()], expected)


def test_a_codebook_without_gradient_is_refused_with_the_way_out():
    features, codebook, texts, _ = made_up()
    with pytest.raises(ValueError, match="lookup='straight-through'"):
        TextAligner(CONFIG, 20, 5, 12)(features, codebook.detach(), texts)


def test_own_units_in_the_bank_do_not_count_against_an_image():
    features, codebook, texts, banks = made_up()
    aligner = TextAligner(dataclasses.replace(CONFIG, samples=9), 20, 5, 12)
    duplicates = TextBank(torch.cat([texts[0].vectors[:, 0], banks[0].vectors]), torch.zeros(6, 22).bool())
    ignored = dataclasses.replace(duplicates, own=torch.cat([torch.ones(6, 6), torch.zeros(6, 16)], 1).bool())
    alone = aligner(features, codebook, texts, banks).loss
    assert float(aligner(features, codebook, texts, [ignored] * 3).loss) == pytest.approx(
        float(alone), rel=1e-5
    )
    assert float(aligner(features, codebook, texts, [duplicates] * 3).loss) > float(alone)


def test_a_level_of_weight_zero_is_left_out_and_a_text_without_units_counts_nothing():
    features, codebook, texts, banks = made_up()
    aligner = TextAligner(dataclasses.replace(CONFIG, level_weights=(0.0, 0.0, 1.0)), 20, 5, 12)
    result = aligner(features, codebook, texts, banks)
    assert {name.split("/")[1].split("_")[0] for name in result.report} == {"sentences"}
    empty = TextUnits(texts[0].vectors, texts[0].mask & (torch.arange(6) < 4).unsqueeze(1))
    assert torch.isfinite(aligner(features, codebook, [empty] * 3, banks).loss)


@pytest.mark.parametrize("method", ["ot", "gaussian"])
def test_places_without_a_unit_change_nothing(method):
    features, codebook, texts, banks = made_up()
    aligner = TextAligner(dataclasses.replace(CONFIG, method=method, samples=9), 20, 5, 12)
    empty, no = torch.zeros(6, 12, 12), torch.zeros(6, 12).bool()
    wide = [TextUnits(torch.cat([t.vectors, empty], 1), torch.cat([t.mask, no], 1)) for t in texts]
    alone = float(aligner(features, codebook, texts, banks).loss)
    assert float(aligner(features, codebook, wide, banks).loss) == pytest.approx(alone, rel=1e-5)


def test_pairing_says_which_level_each_kind_of_unit_moves():
    features, codebook, texts, banks = made_up()
    features = [level.requires_grad_() for level in features]
    config = dataclasses.replace(CONFIG, pairing=(3, 2, 1), level_weights=(1.0, 0.0, 0.0))
    aligner = TextAligner(config, 20, 5, 12)
    result = aligner(features, codebook, texts, banks)
    result.loss.backward()
    assert {name.split("/")[1].split("_")[0] for name in result.report} == {"words"}
    assert features[2].grad.norm() > 0 and features[0].grad is None and features[1].grad is None
    assert aligned_levels_field(config) == "3 - -"


def test_alignment_and_ids_are_the_same_under_mixed_precision(tiny_tokenizer):
    features, codebook, texts, banks = made_up()
    aligner = TextAligner(dataclasses.replace(CONFIG, samples=9), 20, 5, 12)
    alone = float(aligner(features, codebook, texts, banks).loss)
    latents = F.normalize(torch.randn(500, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(aligner(features, codebook, texts, banks).loss) == pytest.approx(alone, rel=1e-5)
        ids = tiny_tokenizer._ids(latents.T.reshape(1, 16, 25, 20).expand(1, -1, -1, -1)[..., :4, :4])
    assert torch.equal(ids, tiny_tokenizer._ids(latents.T.reshape(1, 16, 25, 20)[..., :4, :4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0, expected above 0"),
        ({"lookup_temperature": 0.0}, "lookup_temperature is 0.0"),
        ({"samples": 0}, "samples is 0"),
        ({"relaxation": -1.0}, "relaxation is -1.0, expected 0 or more"),
        ({"level_weights": (0.0, 0.0, 0.0)}, "level_weights"),
        ({"pairing": (1, 2, 4)}, "expected levels from 1 to 3"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.fixture(scope="module")
def shapes_batch():
    """32 shapes images at 32 px, with their units."""
    dataset = open_dataset("shapes", "train").head(32)
    images = torch.stack([to_tensor(dataset.load_image(i), 32) for i in range(32)])
    return images, UnitIndex.build(dataset, TextEncoder())


@pytest.mark.parametrize("method", ["ot", "gaussian"])
def test_matched_pairs_cost_less_than_shuffled_ones_after_training_on_shapes(method, shapes_batch):
    images, index = shapes_batch
    torch.manual_seed(0)
    tokenizer = TAVQTokenizer(PRESETS["tiny"])
    config = AlignmentConfig(method=method, samples=8, bank_size=0)
    aligner = TextAligner(config, 64, 16, 384, projections=tokenizer.projections)
    parameters = {*tokenizer.parameters(), *aligner.parameters()}  # the projections are shared
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    generator = torch.Generator().manual_seed(0)

    def run(rows, text_rows):
        latents = [F.normalize(level, dim=1) for level in tokenizer.encoder(images[rows])]
        texts = [TextUnits(*index.batch(text_rows, level, generator, 8)) for level in (1, 2, 3)]
        return aligner(latents, tokenizer.quantizer.codebook, texts)

    for _ in range(200):
        rows = torch.randperm(32, generator=generator)[:8]
        optimizer.zero_grad()
        run(rows, rows).loss.backward()
        optimizer.step()
    with torch.no_grad():
        rows = torch.arange(32)
        matched, shuffled = run(rows, rows), run(rows, rows.roll(1))
    for level in ("words", "phrases", "sentences"):
        assert matched.report[f"align/{level}_cost"] < 0.99 * shuffled.report[f"align/{level}_cost"]


def test_the_way_to_text_is_fitted_to_codes_that_stay():
    dataset, encoder = open_dataset("shapes", "train").head(40), TextEncoder()
    torch.manual_seed(0)
    tokenizer = TAVQTokenizer(PRESETS["tiny"]).eval()
    captions = encoder.encode([example.captions[0] for example in dataset.examples])
    codes, _ = codes_of_photos(tokenizer, dataset)

    def mean_rank() -> float:
        scores = alignment_scores(tokenizer, codes[:, 0, -1].long(), captions)
        return float(text_to_image_ranks(scores, torch.arange(40)).float().mean())

    before = mean_rank()
    with torch.inference_mode():  # as in an evaluation
        texts = UnitIndex.build(dataset, encoder)
        fit_projections(tokenizer, dataset, texts, {1: 1, 2: 2, 3: 3}, steps=60)
    assert mean_rank() < 0.5 * before
    assert torch.equal(codes_of_photos(tokenizer, dataset)[0], codes)
