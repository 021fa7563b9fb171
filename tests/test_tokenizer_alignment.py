"""Alignment: matched pairs become cheap, and the gradient reaches the codebook."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tavq.alignment.adapters import adapt
from tavq.alignment.aligner import TextAligner, differentiable_lookup, sample_texts
from tavq.alignment.config import AlignmentConfig
from tavq.alignment.late_interaction import late_interaction_costs, late_interaction_unit_cost
from tavq.alignment.transport import single_unit_cost
from tavq.alignment.unit_index import NegativeBank, SampledTexts, TextUnits, UnitIndex
from tavq.data.images import to_tensor
from tavq.data.layouts import open_dataset
from tavq.data.text_encoder import TextEncoder
from tavq.tokenizer.config import PRESETS, TokenizerRun
from tavq.tokenizer.fit_projections import codes_of_images, fit_projections
from tavq.tokenizer.model import TAVQTokenizer
from tavq.tokenizer.retrieval import alignment_scores, text_to_image_ranks
from tavq.tokenizer.train import TokenizerTrainer

CONFIG = AlignmentConfig(samples=8, bank_size=16)


def made_up(batch: int = 6, codes: int = 20, width: int = 5, text_dim: int = 12):
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(batch, width, 3, 3, generator=generator), dim=1) for _ in range(3)]
    codebook = F.normalize(torch.randn(codes, width, generator=generator), dim=1).requires_grad_()
    mask = torch.rand(batch, 4, generator=generator) > 0.3
    mask[:, 0] = True
    texts = [TextUnits(F.normalize(torch.randn(batch, 4, text_dim, generator=generator), dim=-1), mask)] * 3
    bank = NegativeBank(
        F.normalize(torch.randn(16, text_dim, generator=generator), dim=-1), torch.zeros(batch, 16).bool()
    )
    return features, codebook, SampledTexts(tuple(texts), (bank,) * 3)


def codebook_gradient(lookup: str, method: str = "ot") -> torch.Tensor | None:
    torch.manual_seed(0)
    features, codebook, texts = made_up()
    features = [level.requires_grad_() for level in features]
    aligner = TextAligner(20, 5, 12, dataclasses.replace(CONFIG, lookup=lookup), method=method)
    aligner(features, codebook, texts).loss.backward()
    assert all(level.grad.norm() > 0 for level in features), "the encoder is moved either way"
    return codebook.grad


def test_the_soft_look_up_has_ibqs_gradient():
    """one_hot - sg(softmax) + softmax, times the codebook: for codebook and latents alike."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(30, 6, generator=generator)  # of a loss that is linear in what comes out

    def inputs():
        generator.manual_seed(1)
        shapes = ((30, 5), (20, 5), (20, 1))
        return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    latents, codebook, embeddings = inputs()
    codes, found = differentiable_lookup(latents, codebook, embeddings, "soft", 0.1)
    (torch.cat([codes, found], 1) * weights).sum().backward()

    reference = inputs()
    distances = torch.cdist(reference[0], reference[1]).square()
    soft = torch.softmax(-distances / (0.1 * distances.mean().detach()), dim=1)
    one_hot = F.one_hot(distances.argmin(1), 20) - soft.detach() + soft
    # The softmax weighs a table that stands still: only the chosen row itself is moved as a value.
    hard = F.one_hot(distances.argmin(1), 20).float() @ torch.cat(reference[1:], 1)
    mixed = one_hot @ torch.cat(reference[1:], 1).detach()
    ((hard + mixed - mixed.detach()) * weights).sum().backward()
    for mine, expected in zip((latents, codebook, embeddings), reference, strict=True):
        assert torch.allclose(mine.grad, expected.grad, atol=1e-5)
        assert mine.grad.norm() > 0


def test_every_position_is_sampled_sooner_or_later():
    features, codebook, texts = made_up()
    aligner = TextAligner(20, 5, 12, dataclasses.replace(CONFIG, samples=2))
    touched = torch.zeros(9)
    for seed in range(12):
        torch.manual_seed(seed)
        leaves = [level.clone().requires_grad_() for level in features]
        aligner(leaves, codebook, texts).loss.backward()
        moved = leaves[0].grad.flatten(2).abs().sum(1) > 0
        assert (moved.sum(1) <= 2).all()
        touched += moved.sum(0)
    assert (touched > 0).all()


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("pairing", [(1, 2, 3), (3, 2, 1)])
def test_each_kind_of_text_is_compared_with_the_codes_of_its_level_alone(kind, pairing):
    weights = tuple(float(number == kind) for number in range(3))
    config = dataclasses.replace(CONFIG, level_weights=weights, pairing=pairing)
    torch.manual_seed(0)
    aligner = TextAligner(20, 5, 12, config)
    features, codebook, texts = made_up()
    features = [level.requires_grad_() for level in features]

    def loss(changed: int | None) -> torch.Tensor:
        units, banks = list(texts.units), list(texts.banks)
        if changed is not None:
            units[changed] = dataclasses.replace(units[changed], vectors=units[changed].vectors.roll(1, 0))
            banks[changed] = dataclasses.replace(banks[changed], vectors=-banks[changed].vectors)
        torch.manual_seed(1)
        return aligner(features, codebook, SampledTexts(tuple(units), tuple(banks))).loss

    as_it_is = loss(None)
    assert [bool(loss(other) != as_it_is) for other in range(3)] == [other == kind for other in range(3)]
    as_it_is.backward()
    moved = [
        level for level, leaf in enumerate(features, 1) if leaf.grad is not None and leaf.grad.norm() > 0
    ]
    assert moved == [pairing[kind]]


@pytest.mark.slow
def test_words_phrases_and_sentences_are_sampled_in_this_order():
    dataset = open_dataset("shapes", "train").take(6)
    index = UnitIndex.build(dataset, TextEncoder())
    texts = sample_texts(index, range(6), torch.Generator().manual_seed(0), CONFIG)
    for level, units in enumerate(texts.units, 1):
        for row in range(6):
            own = {index.texts.index(unit) for unit in index.units(row, level)}
            vectors = F.normalize(index.vectors_of(torch.tensor(sorted(own))), dim=-1)
            for vector in units.vectors[row][units.mask[row]]:
                assert (vectors @ vector).max() > 0.999


def test_texts_move_to_a_device_whole():
    _, _, texts = made_up()
    moved = texts.to("meta")
    assert {u.vectors.device.type for u in moved.units} | {b.own.device.type for b in moved.banks} == {"meta"}


@pytest.mark.slow
def test_captions_alone_make_an_aligner():
    from .test_tokenizer_adapters import SIZE, ForeignVQModel

    captions = [["a red circle on the left"], ["a blue square", "a square that is blue"], ["a green line"]]
    adapter = adapt(ForeignVQModel(), SIZE)
    aligner = TextAligner.from_captions(captions, adapter, CONFIG)
    images = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    _, captured = adapter.reconstruct(images)
    texts = aligner.sample_texts([0, 1, 2], torch.Generator().manual_seed(0))
    assert texts.units[2].mask.sum(1).tolist() == [1, 2, 1]
    alignment = aligner(captured.features, adapter.codebook, texts)
    assert torch.isfinite(alignment.loss) and "align/sentences_cost" in alignment.report
    with pytest.raises(ValueError, match="from_captions"):
        TextAligner(20, 5, 12).sample_texts([0])


def test_the_gradient_reaches_the_codebook_and_not_with_plain_straight_through():
    assert all(codebook_gradient("soft", method).norm() > 0 for method in ("ot", "gaussian", "filip"))
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
    features, codebook, texts = made_up()
    with pytest.raises(ValueError, match="lookup='straight-through'"):
        TextAligner(20, 5, 12, CONFIG)(features, codebook.detach(), texts)


def test_own_units_in_the_bank_do_not_count_against_an_image():
    features, codebook, texts = made_up()
    aligner = TextAligner(20, 5, 12, dataclasses.replace(CONFIG, samples=9))
    vectors = torch.cat([texts.units[0].vectors[:, 0], texts.banks[0].vectors])
    duplicates = NegativeBank(vectors, torch.zeros(6, 22).bool())
    ignored = dataclasses.replace(duplicates, own=torch.cat([torch.ones(6, 6), torch.zeros(6, 16)], 1).bool())
    alone = aligner(features, codebook, texts).loss
    with_ignored, with_duplicates = (
        float(aligner(features, codebook, dataclasses.replace(texts, banks=(bank,) * 3)).loss)
        for bank in (ignored, duplicates)
    )
    assert with_ignored == pytest.approx(float(alone), rel=1e-5)
    assert with_duplicates > float(alone)


def test_a_level_of_weight_zero_is_left_out_and_a_text_without_units_counts_nothing():
    features, codebook, texts = made_up()
    aligner = TextAligner(20, 5, 12, dataclasses.replace(CONFIG, level_weights=(0.0, 0.0, 1.0)))
    result = aligner(features, codebook, texts)
    assert {name.split("/")[1].split("_")[0] for name in result.report} == {"sentences"}
    first = texts.units[0]
    empty = TextUnits(first.vectors, first.mask & (torch.arange(6) < 4).unsqueeze(1))
    assert torch.isfinite(aligner(features, codebook, dataclasses.replace(texts, units=(empty,) * 3)).loss)


@pytest.mark.parametrize("method", ["ot", "gaussian", "filip"])
def test_places_without_a_unit_change_nothing(method):
    features, codebook, texts = made_up()
    aligner = TextAligner(20, 5, 12, dataclasses.replace(CONFIG, samples=9), method=method)
    empty, no = torch.zeros(6, 12, 12), torch.zeros(6, 12).bool()
    wide = tuple(TextUnits(torch.cat([t.vectors, empty], 1), torch.cat([t.mask, no], 1)) for t in texts.units)
    alone = float(aligner(features, codebook, texts).loss)
    padded = dataclasses.replace(texts, units=wide)
    assert float(aligner(features, codebook, padded).loss) == pytest.approx(alone, rel=1e-5)


def filip_by_hand(codes, units, mask):
    """The costs of late interaction, pair by pair, as the paper writes them."""
    of_codes, of_units = torch.zeros(len(codes), len(units)), torch.zeros(len(codes), len(units))
    for i, image in enumerate(codes):
        for j, text in enumerate(units):
            similarity = image @ text[mask[j]].T
            of_codes[i, j] = 1 - similarity.max(1).values.mean()
            of_units[i, j] = 1 - similarity.max(0).values.mean()
    return of_codes, of_units


def test_late_interaction_is_what_its_paper_says_in_both_directions():
    _, _, texts = made_up()
    units, mask = texts.units[0].vectors, texts.units[0].mask
    codes = F.normalize(torch.randn(6, 9, 12, generator=torch.Generator().manual_seed(3)), dim=-1)
    found = late_interaction_costs(codes, units, mask)
    expected = filip_by_hand(codes, units, mask)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    assert not torch.allclose(*found, atol=1e-2), "the directions differ"
    alone = late_interaction_unit_cost(codes, units[:, :1])[:, 0]
    one = torch.ones(6, 1, dtype=torch.bool)
    assert torch.allclose(alone, late_interaction_costs(codes, units[:, :1], one)[1].diagonal(), atol=1e-6)


def test_the_filip_loss_holds_both_directions_and_the_bank():
    """By hand: half the InfoNCE of each direction, the mean of both matched costs, and the bank's units."""
    _, _, texts = made_up()
    texts_, bank = texts.units[0], texts.banks[0]
    codes = F.normalize(torch.randn(6, 9, 12, generator=torch.Generator().manual_seed(3)), dim=-1)
    aligner = TextAligner(20, 5, 12, CONFIG, method="filip")
    loss, _ = aligner._level_loss(codes, texts_, bank, 0)

    of_codes, of_units = filip_by_hand(codes, texts_.vectors, texts_.mask)
    scale, labels = aligner.log_scale[0].exp(), torch.arange(6)
    expected = (of_codes.diagonal().mean() + of_units.diagonal().mean()) / 2
    expected += F.cross_entropy(-scale * of_codes, labels) / 2
    expected += F.cross_entropy(-scale * of_units.T, labels) / 2
    others = 1 - (codes @ bank.vectors.T).amax(1)
    for row in range(6):
        for unit in texts_.vectors[row][texts_.mask[row]]:
            own = 1 - (codes[row] @ unit).max()
            logits = -scale * torch.cat([own[None], others[row]])
            expected += F.cross_entropy(logits[None], torch.tensor([0])) / texts_.mask.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_codes_aligned_by_filip_are_searched_by_their_best_position():
    assert CONFIG.retrieval_temperature("ot") == CONFIG.retrieval_temperature("gaussian") == 0.55
    best = single_unit_cost(
        torch.tensor([[0.9], [0.2], [0.5]]), epsilon=CONFIG.retrieval_temperature("filip"), relaxation=0
    )
    assert float(best) == pytest.approx(0.2, abs=1e-3)


def test_pairing_says_which_level_each_kind_of_unit_moves():
    features, codebook, texts = made_up()
    features = [level.requires_grad_() for level in features]
    config = dataclasses.replace(CONFIG, pairing=(3, 2, 1), level_weights=(1.0, 0.0, 0.0))
    aligner = TextAligner(20, 5, 12, config)
    result = aligner(features, codebook, texts)
    result.loss.backward()
    assert {name.split("/")[1].split("_")[0] for name in result.report} == {"words"}
    assert features[2].grad.norm() > 0 and features[0].grad is None and features[1].grad is None
    assert config.aligned_levels == (3, 0, 0)


def test_alignment_and_ids_are_the_same_under_mixed_precision(tiny_tokenizer):
    features, codebook, texts = made_up()
    aligner = TextAligner(20, 5, 12, dataclasses.replace(CONFIG, samples=9))
    alone = float(aligner(features, codebook, texts).loss)
    latents = F.normalize(torch.randn(500, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(aligner(features, codebook, texts).loss) == pytest.approx(alone, rel=1e-5)
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
    dataset = open_dataset("shapes", "train").take(32)
    images = torch.stack([to_tensor(dataset.load_image(i), 32) for i in range(32)])
    return images, UnitIndex.build(dataset, TextEncoder())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ot", "gaussian", "filip"])
def test_matched_pairs_cost_less_than_shuffled_ones_after_training_on_shapes(method, shapes_batch):
    images, index = shapes_batch
    torch.manual_seed(0)
    tokenizer = TAVQTokenizer(PRESETS["tiny"])
    config = AlignmentConfig(samples=8, max_units=8, bank_size=0)
    aligner = TextAligner(64, 16, 384, config, method=method, projections=tokenizer.projections)
    parameters = {*tokenizer.parameters(), *aligner.parameters()}  # the projections are shared
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    generator = torch.Generator().manual_seed(0)

    def run(rows, text_rows):
        latents = [F.normalize(level, dim=1) for level in tokenizer.encoder(images[rows])]
        texts = sample_texts(index, text_rows, generator, config)
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


@pytest.mark.slow
def test_the_way_to_text_is_fitted_to_codes_that_stay():
    dataset, encoder = open_dataset("shapes", "train").take(40), TextEncoder()
    torch.manual_seed(0)
    tokenizer = TAVQTokenizer(PRESETS["tiny"]).eval()
    captions = encoder.encode([example.captions[0] for example in dataset.examples])
    codes, _ = codes_of_images(tokenizer, dataset)

    def mean_rank() -> float:
        scores = alignment_scores(tokenizer, codes[:, 0, -1].long(), captions)
        return float(text_to_image_ranks(scores, torch.arange(40)).float().mean())

    before = mean_rank()
    with torch.inference_mode():  # as in an evaluation
        texts = UnitIndex.build(dataset, encoder)
        fit_projections(tokenizer, dataset, texts, {1: 1, 2: 2, 3: 3}, steps=60)
    assert mean_rank() < 0.5 * before
    assert torch.equal(codes_of_images(tokenizer, dataset)[0], codes)


@pytest.mark.slow
def test_without_long_text_its_units_are_unknown():
    dataset, encoder = open_dataset("scenes:3", "train"), TextEncoder()
    whole = UnitIndex.build(dataset, encoder)
    short = UnitIndex.build(dataset, encoder, long_text=False)
    for row, example in enumerate(dataset.examples):
        assert short.units(row, 3) == example.captions
        assert set(whole.units(row, 3)) > set(short.units(row, 3))
        assert short.count(1)[row] < whole.count(1)[row]


@pytest.mark.slow
@pytest.mark.parametrize("learned", [True, False])
def test_codes_learn_a_vector_of_their_own_or_none(learned):
    config = dataclasses.replace(CONFIG, per_code_embedding=learned)
    tokenizer = TAVQTokenizer(PRESETS["tiny"])
    trainer = TokenizerTrainer(TokenizerRun(model=PRESETS["tiny"], alignment=config), tokenizer)
    assert trainer.tokenizer.projections.per_code_embedding.requires_grad == learned
    dataset = open_dataset("shapes", "train").take(10)
    texts = UnitIndex.build(dataset, TextEncoder())
    fit_projections(tokenizer, dataset, texts, {3: 3}, steps=3, per_code_embedding=learned)
    assert bool(tokenizer.projections.per_code_embedding.any()) == learned
