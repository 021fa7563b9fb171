"""What a training run of the tokenizer reads, and what it hands to the checkpoint."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tavq.base.files import file_hash
from tavq.commands.train_decoder import main as train_decoder
from tavq.commands.train_tokenizer import main
from tavq.data.dataset import Example, ImageTextDataset
from tavq.data.layouts import open_dataset
from tavq.tokenizer import distillation
from tavq.tokenizer import train as tokenizer_train
from tavq.tokenizer import train_decoder as train_decoder_module
from tavq.tokenizer.config import RUN_PRESETS
from tavq.tokenizer.distillation import BatchTeacher, map_of_view, teacher_maps
from tavq.tokenizer.losses import FrozenNetwork
from tavq.tokenizer.model import TAVQTokenizer, TokenizerConfig
from tavq.tokenizer.provenance import TokenizerProvenance, migrate_provenance
from tavq.tokenizer.run_config import DECODER_PRESETS
from tavq.tokenizer.train import HEAD_RATE, TokenizerTask
from tavq.tokenizer.training_images import WHOLE, TrainingImages
from tavq.training.card import earlier_runs, model_card
from tavq.training.stream import Draws

from .conftest import save_network

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


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """The first 200 images of each split; to encode the texts of all would take most of these tests' time."""

    def open_few(path, split):
        return open_dataset(path, split).take(200)

    for module in (tokenizer_train, train_decoder_module):
        monkeypatch.setattr(module, "open_dataset", open_few)


@pytest.fixture(params=[Maps, Vector])
def teacher(request, tmp_path):
    return save_network(request.param(), tmp_path / "teacher.pt")


@pytest.mark.slow
@pytest.mark.parametrize("align", ["ot", "lgvq"])
def test_no_id_and_no_text_of_the_other_splits_is_trained_on(align):
    task = TokenizerTask(dataclasses.replace(TINY, align=align))
    held_out = [open_dataset("shapes", split) for split in ("val", "test")]
    seen = set(task.train_set.ids) | (set(task.texts.ids) if task.texts else set())
    assert len(task.dataset) == len(task.train_set)
    for dataset in held_out:
        assert len(dataset) and not seen & set(dataset.ids)


def test_the_teachers_maps_are_standardised_and_read_back(teacher, monkeypatch):
    dataset = open_dataset("shapes", "train").take(40)
    maps = torch.from_numpy(teacher_maps(FrozenNetwork(teacher), dataset, (4, 4))[:]).float()
    assert maps.shape[0] == 40 and maps.shape[2:] == (4, 4)
    assert maps.mean(dim=(0, 2, 3)).abs().max() < 0.01
    assert (maps.std(dim=(0, 2, 3)) - 1).abs().max() < 0.01
    monkeypatch.setattr(distillation, "_maps", None)  # a second call asks no network
    again = teacher_maps(FrozenNetwork(teacher), dataset, (4, 4))
    assert torch.equal(torch.from_numpy(again[:]).float(), maps)
    with pytest.raises(TypeError):
        teacher_maps(FrozenNetwork(teacher), dataset.take(39), (4, 4))


@pytest.mark.slow
def test_maps_that_are_computed_in_each_batch_equal_those_on_disk(teacher, monkeypatch):
    run = dataclasses.replace(TINY, distill=teacher, align="none", data="shapes:40")
    kept, live = (TokenizerTask(dataclasses.replace(run, cache=cache)) for cache in ("disk", "none"))
    assert live.maps is None and live.teacher.dim == kept.maps.shape[1]
    items = [kept.dataset[(index, draw)] for index, draw in ((0, 0), (1, 1), (2, 2), (39, 7))]
    assert any(item["box"] != WHOLE for item in items) and any(item["flipped"] for item in items)
    expected, batch = kept.collate(items)["teacher"], live.collate(items)
    views = live.teacher.maps_of_views(batch["teacher"], batch["boxes"], batch["flipped"])
    torch.testing.assert_close(views, expected, atol=4e-3, rtol=2e-3)

    heard = [float(task.model(task.collate(items), 0).report["distill"].detach()) for task in (kept, live)]
    assert heard[1] == pytest.approx(heard[0], abs=1e-3)

    # Of the images of a batch that two processes share, each sees its own.
    own = live.collate(items[2:], Draws([(0, 0), (1, 1), (2, 2), (39, 7)], slice(2, 4)))
    views = live.teacher.maps_of_views(own["teacher"], own["boxes"], own["flipped"])
    torch.testing.assert_close(views, expected[2:], atol=4e-3, rtol=2e-3)

    # Of more images, a sample is measured: the same one in each run.
    monkeypatch.setattr(distillation, "MEASURED_IMAGES", 24)
    network = FrozenNetwork(teacher)
    sampled, again = (BatchTeacher.measured(network, kept.train_set, (4, 4)) for _ in range(2))
    assert torch.equal(sampled.shift, again.shift) and not torch.equal(sampled.shift, live.teacher.shift)
    # The teacher is asked for 24 of 40 images: its mean is near that of all.
    assert ((sampled.shift - live.teacher.shift) / live.teacher.scale).abs().max() < 0.5


@pytest.mark.slow
def test_distillation_moves_the_encoder_and_is_recorded(teacher, tmp_path):
    task = TokenizerTask(dataclasses.replace(TINY, distill=teacher, align="none"))
    items = [
        task.dataset[(index, draw)] for index, draw in ((0, 0), (1, 1), (2, 2))
    ]  # whole, mirrored, cropped
    batch = task.collate(items)
    maps = torch.from_numpy(task.maps[:3])
    assert torch.equal(batch["teacher"][0], maps[0])
    assert torch.equal(batch["teacher"][1], maps[1].flip(-1))
    assert items[2]["box"] != WHOLE
    assert torch.equal(batch["teacher"][2], map_of_view(maps[2], items[2]["box"], flipped=False))
    latents = task.model.tokenizer.encoder(batch["image"])
    task.model.head(latents[-1], batch["teacher"]).backward()
    assert task.model.tokenizer.encoder.trunk[0].qkv.weight.grad.norm() > 0
    steps = ["--training.steps", "2", "--training.evaluate-every", "2"]
    flags = ["--preset", "tiny", "--distill", str(teacher), "--align", "none", *steps]
    main([*flags, "--out", str(tmp_path / "run")])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["provenance"]["taught_by"] == [file_hash(teacher)]
    assert not any("head.layers" in name for name in task.model.tokenizer.state_dict())


def test_a_crop_is_that_part_of_the_photo_and_of_its_teachers_map():
    """A photo whose red grows to the right and whose green grows downwards tells where its crop lies."""
    ramp = np.linspace(0, 255, 200).astype(np.uint8)
    photo = np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], np.uint8(0)), axis=-1)
    dataset = ImageTextDataset(
        "ramps", (Example("a", lambda: Image.fromarray(photo), ("a ramp",), None, "train"),)
    )
    images, size = TrainingImages(dataset, 32), 32
    centres = (torch.arange(size) + 0.5) / size
    place = torch.stack([centres.expand(size, size), centres[:, None].expand(size, size)])
    boxes = set()
    for draw in range(40):
        view = images[(0, draw)]
        left, top, right, bottom = view["box"]
        assert 0 <= left < right <= 1 and right - left > 0.77 and bottom - top > 0.77
        assert (view["box"] == WHOLE) == (draw % 4 < 2)
        boxes.add(view["box"])
        across, down = left + (right - left) * centres, top + (bottom - top) * centres
        across = across.flip(0) if view["flipped"] else across
        seen = (view["image"] + 1) / 2
        assert (seen[0] - across[None]).abs().max() < 0.03
        assert (seen[1] - down[:, None]).abs().max() < 0.03
        told = map_of_view(place.half(), view["box"], flipped=view["flipped"]).float()
        assert (told[0] - across[None]).abs().max() < 0.02  # the map's outer half cells repeat its border
        assert (told[1] - down[:, None]).abs().max() < 0.02
    assert len(boxes) > 15


@pytest.mark.slow
def test_a_step_without_decoding_teaches_the_encoder_alone(teacher):
    losses = dataclasses.replace(TINY.losses, decode_every=4)
    task = TokenizerTask(dataclasses.replace(TINY, distill=teacher, losses=losses))
    batch = task.collate([task.dataset[(index, index)] for index in range(4)])
    decoder = task.model.tokenizer.decoder.proj_in.weight
    trunk = task.model.tokenizer.encoder.trunk[0].qkv.weight
    for step, decodes in ((0, True), (1, False), (3, False), (4, True)):
        output = task.model(batch, step)
        output.loss.backward()
        assert ("l1" in output.report) == (decoder.grad is not None) == decodes
        assert trunk.grad.norm() > 0
        task.model.zero_grad(set_to_none=True)


@pytest.mark.slow
def test_training_goes_on_from_a_tokenizer_and_remembers_its_teachers(teacher, tmp_path):
    before = TAVQTokenizer(
        TokenizerConfig.of(TINY.model, provenance=TokenizerProvenance(taught_by=("abc", "def")))
    )
    before.card = "---\nlicense: apache-2.0\n---\n# The first training\n"
    before.save_pretrained(tmp_path / "before")
    run = dataclasses.replace(
        RUN_PRESETS["flickr8k"], start=tmp_path / "before", data="shapes", distill=teacher
    )
    task = TokenizerTask(run)
    assert all(
        torch.equal(a, b) for a, b in zip(before.parameters(), task.model.tokenizer.parameters(), strict=True)
    )
    provenance = task.model.tokenizer.config.provenance
    assert set(provenance.taught_by) == {"abc", "def", file_hash(teacher)}
    assert task.earlier_card == before.card


@pytest.mark.slow
def test_a_text_encoder_of_another_width_decides_the_width_of_the_way_to_text(tmp_path):
    from .test_data_text_encoder import tiny_directory

    encoder = tiny_directory(tmp_path / "bert", "bert")
    task = TokenizerTask(dataclasses.replace(TINY, text_encoder=encoder))
    assert task.model.tokenizer.config.text_dim == 16
    batch = task.collate([task.dataset[(index, index)] for index in range(4)])
    assert torch.isfinite(task.model(batch, 0).loss)


def test_a_discriminator_is_refused_where_the_network_gives_no_maps(tmp_path, capsys):
    network = save_network(Vector(), tmp_path / "vector.pt")
    TAVQTokenizer(TINY.model).save_pretrained(tmp_path / "before")
    with pytest.raises(SystemExit):
        train_decoder(
            ["--preset", "tiny", "--tokenizer", str(tmp_path / "before"), "--perceptual", str(network)]
        )
    assert "this network gives vectors" in capsys.readouterr().err


@pytest.mark.slow
def test_training_the_decoder_further_leaves_the_ids_alone(perceptual_network, tmp_path):
    shuffling = dataclasses.replace(TINY.model, upsample_channels=())  # as weights of before 0.2 end
    before, after = TAVQTokenizer(shuffling), tmp_path / "after"
    before.card = model_card("tokenizer", {"data": "the first photos"}, [], 0, 0.0)
    before.save_pretrained(tmp_path / "before")
    flags = [
        "--preset",
        "tiny",
        "--tokenizer",
        str(tmp_path / "before"),
        "--perceptual",
        str(perceptual_network),
    ]
    train_decoder([*flags, "--training.steps", "3", "--out", str(after)])
    after = TAVQTokenizer.from_pretrained(after)
    changed = {
        name
        for name, tensor in before.state_dict().items()
        if name not in after.state_dict() or not torch.equal(tensor, after.state_dict()[name])
    }
    assert changed == {f"decoder.{name}" for name, _ in before.decoder.named_parameters()}
    assert (before.decode_size_px, after.decode_size_px) == (32, 64)
    assert after.config.provenance.taught_by == (file_hash(perceptual_network),)
    assert [run["data"] for run in earlier_runs(after.card)] == ["the first photos", "shapes"]


def test_a_share_of_the_tokens_in_a_share_of_the_batches_is_a_generator_s(tmp_path):
    TAVQTokenizer(TINY.model).save_pretrained(tmp_path)
    run = dataclasses.replace(DECODER_PRESETS["tiny"], tokenizer=tmp_path, generated_tokens=0.25)
    trainer = train_decoder_module.DecoderTask(run, lambda ids: ids + 1000).model
    torch.manual_seed(0)
    ids = torch.arange(64).expand(8, -1)
    batches = [trainer.with_mistakes(ids) for _ in range(200)]
    touched = [batch for batch in batches if not torch.equal(batch, ids)]
    assert 0.4 < len(touched) / len(batches) < 0.6
    replaced = torch.stack(touched) != ids
    assert float(replaced.float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(torch.stack(touched)[replaced], (ids + 1000).expand(len(touched), -1, -1)[replaced])
    assert torch.equal(train_decoder_module.DecoderTask(run).model.with_mistakes(ids), ids)


@pytest.mark.slow
def test_the_decoder_learns_from_a_generator_s_mistakes_and_refuses_a_foreign_one(
    tiny_checkpoint, perceptual_network, tmp_path, capsys
):
    flags = ["--preset", "tiny", "--perceptual", str(perceptual_network), "--training.steps", "2"]
    flags += ["--generator", str(tiny_checkpoint / "generator"), "--generated-batches", "1"]
    train_decoder([*flags, "--tokenizer", str(tiny_checkpoint / "tokenizer"), "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "model.safetensors").is_file()
    TAVQTokenizer(TINY.model).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        train_decoder([*flags, "--tokenizer", str(tmp_path / "other"), "--out", str(tmp_path / "no")])
    assert "the generator learned ids of" in capsys.readouterr().err


@pytest.mark.slow
def test_alignment_and_distillation_are_part_of_the_loss(teacher):
    """Projections learn from alignment alone, the distillation head from distillation alone."""
    task = TokenizerTask(dataclasses.replace(TINY, distill=teacher))
    batch = task.collate([task.dataset[(index, index)] for index in range(6)])
    task.model(batch, 0).loss.backward()
    assert task.shipped.projections.per_code_embedding.grad.norm() > 0
    assert task.model.head.layers[0].weight.grad.norm() > 0


@pytest.mark.slow
def test_the_shares_of_alignment_and_distillation_are_obeyed(teacher):
    losses = dataclasses.replace(TINY.losses, align=0.5, distill=0.25)
    task = TokenizerTask(dataclasses.replace(TINY, distill=teacher, losses=losses))
    batch = task.collate([task.dataset[(index, index)] for index in range(6)])
    torch.manual_seed(0)
    report = task.model(batch, 0).report
    once = {name: float(report[f"weight/{name}"]) for name in ("align", "distill")}
    doubled = dataclasses.replace(losses, align=1.0, distill=0.5)
    task = TokenizerTask(dataclasses.replace(TINY, distill=teacher, losses=doubled))
    torch.manual_seed(0)
    report = task.model(batch, 0).report
    for name, weight in once.items():
        assert float(report[f"weight/{name}"]) == pytest.approx(2 * weight, rel=1e-3)


def test_provenance_of_older_checkpoints_is_understood():
    old = {
        "align": "ot",
        "aligned_levels": "1 - 3",
        "perceptual": "b a",
        "distilled_from": "a",
        "decoder_perceptual": "c",
    }
    migrated = migrate_provenance(old)
    assert migrated == {"align": "ot", "aligned_levels": [1, 0, 3], "taught_by": ["a", "b", "c"]}
    assert migrate_provenance(migrated) == migrated
    assert migrate_provenance({"align": "gaussian"})["aligned_levels"] == (1, 2, 3)
    assert "aligned_levels" not in migrate_provenance({"align": "lgvq"})
    probed = migrate_provenance({"align": "none", "probe": "ot"})
    assert probed == {"align": "none", "probed": True, "aligned_levels": (1, 2, 3)}


@pytest.mark.slow
def test_the_projections_learn_at_a_rate_of_their_own():
    task = TokenizerTask(TINY)
    groups = task.parameter_groups(TINY.training)
    fast = {p for group in groups if group.get("lr_scale") == HEAD_RATE for p in group["params"]}
    assert fast == set(task.shipped.projections.parameters()) and HEAD_RATE > 1
    everything = [p for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == sum(p.requires_grad for p in task.model.parameters())
