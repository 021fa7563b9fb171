"""What a training run of the tokenizer reads, and what it hands to the checkpoint."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from tavq.data.layouts import open_dataset
from tavq.tokenizer import distillation
from tavq.tokenizer.decoder import main as train_decoder
from tavq.tokenizer.distillation import teacher_maps
from tavq.tokenizer.losses import FrozenNetwork
from tavq.tokenizer.model import TAVQTokenizer
from tavq.tokenizer.train import RUN_PRESETS, TokenizerTask, main
from tavq.training.checkpoint import file_hash

TINY = RUN_PRESETS["tiny"]


class Maps(nn.Module):
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        pooled = nn.functional.avg_pool2d(images, 28)
        return [images, torch.cat([pooled, pooled * pooled], dim=1)]


class Vector(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(2).mean(-1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path_factory.getbasetemp() / "tokenizer-cache"))


@pytest.fixture(params=[Maps, Vector])
def teacher(request, tmp_path):
    path = tmp_path / "teacher.pt"
    torch.jit.script(request.param()).save(str(path))
    return path


@pytest.mark.parametrize("align", ["ot", "lgvq"])
def test_no_id_and_no_text_of_the_other_splits_is_trained_on(align):
    task = TokenizerTask(dataclasses.replace(TINY, align=align))
    held_out = [open_dataset("shapes", split) for split in ("val", "test")]
    seen = set(task.train_set.ids) | (set(task.texts.ids) if task.texts else set())
    assert len(task.dataset) == len(task.train_set)
    for dataset in held_out:
        assert len(dataset) and not seen & set(dataset.ids)


def test_the_teachers_maps_are_standardised_and_read_back(teacher, monkeypatch):
    dataset = open_dataset("shapes", "train").head(40)
    maps = teacher_maps(FrozenNetwork(teacher), dataset, (4, 4)).float()
    assert maps.shape[0] == 40 and maps.shape[2:] == (4, 4)
    assert maps.mean(dim=(0, 2, 3)).abs().max() < 0.01
    assert (maps.std(dim=(0, 2, 3)) - 1).abs().max() < 0.01
    monkeypatch.setattr(distillation, "_maps", None)  # a second call asks no network
    assert torch.equal(teacher_maps(FrozenNetwork(teacher), dataset, (4, 4)).float(), maps)
    with pytest.raises(TypeError):
        teacher_maps(FrozenNetwork(teacher), dataset.head(39), (4, 4))


def test_distillation_moves_the_encoder_and_is_recorded(teacher, tmp_path):
    task = TokenizerTask(dataclasses.replace(TINY, distill=teacher, align="none"))
    items = [task.dataset[(index, draw)] for index, draw in ((0, 2), (1, 3))]  # the second is mirrored
    batch = task.collate(items)
    assert torch.equal(batch["teacher"][0], task.maps[0])
    assert torch.equal(batch["teacher"][1], task.maps[1].flip(-1))
    latents = task.model.tokenizer.encoder(batch["image"])
    task.model.head(latents[-1], batch["teacher"]).backward()
    assert task.model.tokenizer.encoder.trunk[0].qkv.weight.grad.norm() > 0
    steps = ["--training.steps", "2", "--training.evaluate-every", "2"]
    flags = ["--preset", "tiny", "--distill", str(teacher), "--align", "none", *steps]
    main([*flags, "--out", str(tmp_path / "run")])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["provenance"]["distilled_from"] == file_hash(teacher)
    assert not any("head.layers" in name for name in task.model.tokenizer.state_dict())


def test_a_text_encoder_of_another_width_decides_the_width_of_the_way_to_text(tmp_path):
    from .test_data_text_encoder import tiny_directory

    encoder = tiny_directory(tmp_path / "bert", "bert")
    task = TokenizerTask(dataclasses.replace(TINY, text_encoder=encoder))
    assert task.model.tokenizer.config.text_dim == 16
    batch = task.collate([task.dataset[(index, index)] for index in range(4)])
    assert torch.isfinite(task.model(batch, 0).loss)


def test_training_the_decoder_further_leaves_the_ids_alone(teacher, tmp_path):
    before, after = TAVQTokenizer(TINY.model), tmp_path / "after"
    before.card = "---\nlicense: apache-2.0\n---\n# The first training\n"
    before.save_pretrained(tmp_path / "before")
    flags = ["--preset", "tiny", "--tokenizer", str(tmp_path / "before"), "--perceptual", str(teacher)]
    train_decoder([*flags, "--training.steps", "3", "--out", str(after)])
    after = TAVQTokenizer.from_pretrained(after)
    changed = {
        name
        for name, tensor in before.state_dict().items()
        if not torch.equal(tensor, after.state_dict()[name])
    }
    assert changed == {f"decoder.{name}" for name, _ in before.decoder.named_parameters()}
    assert after.config.provenance == {"decoder_perceptual": file_hash(teacher)}
    assert "# What it went on from: The first training" in after.card


def test_alignment_method_follows_align():
    method = dataclasses.replace(TINY.alignment, method="gaussian")
    with pytest.raises(ValueError, match="it follows --align"):
        dataclasses.replace(TINY, alignment=method)
