"""Semantic classes: clusters, a segmentation model, parts of images, purity of codes, training with them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from tavq.base.arguments import parse
from tavq.data.layouts import open_dataset
from tavq.tokenizer.config import PRESETS, RUN_PRESETS, QuantizerConfig, TokenizerRun
from tavq.tokenizer.model import TAVQTokenizer
from tavq.tokenizer.semantic_classes import SemanticClasses, cluster, code_meaning, open_classes
from tavq.tokenizer.train import TokenizerTask

SGC = ["--model.quantizer.name", "sgc", "--model.quantizer.num-classes", "8"]


def test_clusters_find_the_directions_that_are_there():
    directions = torch.eye(3).repeat_interleave(4, dim=1)[:, :, None]  # (3, 12, 1)
    maps = directions[None] + 0.01 * torch.randn(20, 3, 12, 1)
    classes = cluster(maps, 3)
    assert classes.shape == (20, 12, 1) and classes.dtype == torch.int16
    assert len(classes[:, :4].unique()) == len(classes[:, 4:8].unique()) == 1
    assert len({int(classes[0, row]) for row in (0, 4, 8)}) == 3
    assert torch.equal(cluster(maps, 3), classes), "the same clusters at each call"


def test_too_few_positions_are_refused():
    with pytest.raises(ValueError, match="cannot make 8 clusters"):
        cluster(torch.randn(1, 3, 2, 2), 8)


def test_a_part_of_an_image_has_the_classes_of_that_part():
    ids = torch.arange(16, dtype=torch.int16).view(1, 4, 4)
    classes = SemanticClasses(ids, "made up")
    assert torch.equal(classes.of_view(0, (0, 0, 1, 1), flipped=True), ids[0].flip(-1).long())
    upper_left = classes.of_view(0, (0, 0, 0.5, 0.5), flipped=False)
    assert torch.equal(upper_left, torch.tensor([[0, 0, 1, 1]] * 2 + [[4, 4, 5, 5]] * 2))


def test_pure_codes_have_one_class_each_and_even_classes_as_many_codes_each():
    classes = torch.randint(4, (4000,), generator=torch.Generator().manual_seed(1))
    pure = code_meaning(2 * classes + (torch.arange(4000) % 2), classes, 4)
    assert pure.purity == 1.0 and pure.evenness == pytest.approx(1.0)
    assert 0.2 < pure.chance < 0.35
    blind = code_meaning(torch.arange(4000) % 8, classes, 4)
    assert abs(blind.purity - blind.chance) < 0.02
    greedy = code_meaning(torch.where(classes == 0, torch.arange(4000) % 50, classes + 100), classes, 4)
    assert greedy.purity == 1.0 and greedy.evenness < 0.5, "one class owns nearly all codes"


def test_a_segmentation_model_gives_the_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path / "cache"))
    config = SegformerConfig(
        num_labels=5,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
    )
    torch.manual_seed(0)
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "model")
    dataset = open_dataset("shapes", "val").take(20)
    classes = open_classes(str(tmp_path / "model"), dataset, (4, 4), 5)
    assert classes.ids.shape == (20, 4, 4)
    assert 1 < len(classes.ids.unique()) <= 5
    with pytest.raises(ValueError, match="knows 5 classes"):
        open_classes(str(tmp_path / "model"), dataset, (4, 4), 4)


def test_fused_levels_reach_what_is_decoded():
    shape = dataclasses.replace(PRESETS["tiny"], fuse_levels=True)
    torch.manual_seed(0)
    fused = TAVQTokenizer(shape).eval()
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    before = fused.encoder(images)
    torch.nn.init.normal_(fused.encoder.fusion.weight)
    after = fused.encoder(images)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not torch.allclose(before[2], after[2])


@pytest.mark.slow
@pytest.mark.parametrize("align", ["none", "ot", "gaussian", "filip", "lgvq"])
def test_it_trains_with_every_alignment(align, tmp_path, monkeypatch, perceptual_network):
    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "tavq.tokenizer.train.open_dataset", lambda data, split: open_dataset(data, split).take(24)
    )
    arguments = ["--preset", "tiny", "--align", align, "--classes", str(perceptual_network), *SGC]
    arguments += ["--model.fuse-levels", "--lgvq.width", "16", "--lgvq.layers", "1"]
    task = TokenizerTask(parse(TokenizerRun, arguments, prog="test", presets=RUN_PRESETS))
    batch = task.collate([task.dataset[(index, 3)] for index in range(4)])
    assert batch["classes"].shape == (4, *task.shipped.grid_size)

    task.model.train()
    output = task.model(batch, 0)
    output.loss.backward()
    assert task.shipped.encoder.fusion.weight.grad.norm() > 0
    assert (task.shipped.quantizer.histogram.amax(dim=1) > 0.9).any(), "codes have learned classes"
    assert task.evaluate(task.shipped.eval(), 1)["usage"] > 0


def test_classes_and_the_quantiser_go_together():
    with pytest.raises(ValueError, match="give both or neither"):
        TokenizerRun(classes="maps.pt")
    sgc = dataclasses.replace(PRESETS["tiny"], quantizer=QuantizerConfig(name="sgc"))
    with pytest.raises(ValueError, match="give both or neither"):
        TokenizerRun(model=sgc)
