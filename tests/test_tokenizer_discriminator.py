"""The losses on decoded images: who gets a gradient, what augmentation does to both sides, what texture
is."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from tavq.data.image_folder import with_more_images
from tavq.data.layouts import open_dataset
from tavq.tokenizer.blocks import to_map
from tavq.tokenizer.config import PRESETS, RUN_PRESETS, ReconstructionLossConfig
from tavq.tokenizer.discriminator import CUTOUT, ProjectedDiscriminator, augment
from tavq.tokenizer.losses import PerceptualNetwork, ReconstructionLoss, pooled_l1, texture_distance
from tavq.tokenizer.model import TAVQTokenizer, Window
from tavq.tokenizer.run_config import DECODER_PRESETS
from tavq.tokenizer.train import TokenizerTask
from tavq.tokenizer.train_decoder import DecoderTask, with_decoder_shape
from tavq.tokenizer.training_images import TrainingImages

CONFIG = ReconstructionLossConfig(adversarial_start=0.0, first_map=0)


def noise_images(count: int = 4, size: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_adversarial_gradient_reaches_the_decoder_and_nothing_that_is_frozen(
    perceptual_network, tmp_path
):
    TAVQTokenizer(PRESETS["tiny"]).save_pretrained(tmp_path)
    losses = dataclasses.replace(CONFIG, l1=0.0, perceptual=0.0)
    run = dataclasses.replace(
        DECODER_PRESETS["tiny"], tokenizer=tmp_path, perceptual=str(perceptual_network), losses=losses
    )
    task = DecoderTask(run)
    batch = task.collate([task.dataset[(index, 0)] for index in range(2)])
    output = task.model(batch, 0, task.discriminator.discriminator)
    output.loss.backward()
    decoder = task.shipped.decoder
    assert decoder.proj_in.weight.grad.norm() > 0 and decoder.to_rgb[-1].weight.grad.norm() > 0
    trained = {id(p) for p in decoder.parameters()}
    others = [p for p in task.model.parameters() if id(p) not in trained]
    assert others and all(p.grad is None for p in others)
    assert all(p.grad is None for p in task.model.loss.network.network.parameters())
    assert all(p.grad is None for p in task.discriminator.parameters())

    task.discriminator(output.for_discriminator, 0).loss.backward()
    moved = [p for p in task.discriminator.parameters() if p.grad is not None and p.grad.norm() > 0]
    assert len(moved) == len(list(task.discriminator.parameters()))
    assert not any("projection" in name for name, _ in task.discriminator.named_parameters())


def test_the_discriminator_is_silent_before_its_start(perceptual_network):
    config = dataclasses.replace(CONFIG, adversarial_start=0.5)
    loss = ReconstructionLoss(config, str(perceptual_network), steps=10)
    images = noise_images()
    player = loss.make_discriminator(images)
    report: dict = {}
    early = loss(images.flip(0).requires_grad_(), images, report, 4, player.discriminator)
    assert early.adversarial == 0.0 and "adversarial" not in report
    late = loss(images.flip(0).requires_grad_(), images, report, 5, player.discriminator)
    assert late.adversarial.requires_grad and "adversarial" in report


@pytest.mark.slow
def test_it_learns_to_tell_decoded_images_from_originals(perceptual_network):
    torch.manual_seed(0)
    network = PerceptualNetwork(perceptual_network)
    sharp = noise_images(16)
    blurred = torch.nn.functional.avg_pool2d(sharp, 5, 1, 2)
    real, fake = network(sharp), network(blurred)
    discriminator = ProjectedDiscriminator(real)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    first = float(discriminator.hinge_loss(real, fake))
    for _ in range(40):
        optimizer.zero_grad()
        discriminator.hinge_loss(real, fake).backward()
        optimizer.step()
    assert float(discriminator.hinge_loss(real, fake)) < 0.3 * first
    assert float(discriminator.generator_loss(fake)) > float(discriminator.generator_loss(real))


def test_augmentation_is_alike_on_both_sides_and_differs_between_images():
    images = noise_images(8)
    torch.manual_seed(0)
    first, second = augment(images, images.clone(), 1.0)
    assert torch.equal(first, second)
    same = images[:1].expand(8, -1, -1, -1)
    varied, _ = augment(same, same, 1.0)
    assert all(not torch.equal(varied[0], other) for other in varied[1:])
    untouched, _ = augment(images, images, 0.0)
    assert torch.equal(untouched, images)
    greyed = (first == 0).all(dim=1).float().mean(dim=(1, 2))
    assert (greyed > 0).all() and (greyed <= 1.1 * CUTOUT**2).all()


def test_the_losses_see_augmented_images_alike_on_both_sides(perceptual_network):
    images = noise_images()
    seen = []
    for probability in (0.0, 1.0):
        torch.manual_seed(0)
        config = dataclasses.replace(CONFIG, augmentation=probability)
        loss = ReconstructionLoss(config, str(perceptual_network), steps=10)
        player = loss.make_discriminator(images)
        report: dict = {}
        result = loss(images.clone().requires_grad_(), images, report, 0, player.discriminator)
        assert float(report["perceptual"].detach()) == pytest.approx(0.0, abs=1e-6)
        real, fake = result.features
        assert torch.allclose(real[0], fake[0], atol=1e-6)
        seen.append(real[0])
    assert not torch.allclose(seen[0], seen[1])


def test_augmentation_lets_the_gradient_through():
    images = noise_images(2).requires_grad_()
    augment(images, images.detach(), 1.0)[0].square().sum().backward()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()


def test_pixels_are_compared_after_averaging():
    checker = torch.ones(1, 3, 8, 8)
    checker[..., ::2, ::2] = checker[..., 1::2, 1::2] = -1
    assert pooled_l1(checker, -checker, 4) == pytest.approx(0.0)
    assert pooled_l1(checker, -checker, 0) == pytest.approx(2.0)


def test_texture_asks_for_the_same_statistics_not_the_same_pixels():
    generator = torch.Generator().manual_seed(0)
    grass = torch.randn(2, 4, 64, 64, generator=generator)
    other_grass = torch.randn(2, 4, 64, 64, generator=generator)
    blurred = torch.nn.functional.avg_pool2d(grass, 5, 1, 2)
    assert texture_distance([grass], [grass]) == pytest.approx(0.0)
    assert texture_distance([other_grass], [grass]) < 0.1 * texture_distance([blurred], [grass])
    assert torch.nn.functional.mse_loss(other_grass, grass) > torch.nn.functional.mse_loss(blurred, grass)


def test_the_adversarial_share_is_a_share_of_the_gradient(perceptual_network):
    images = noise_images()
    for share in (0.25, 1.0):
        torch.manual_seed(0)
        config = dataclasses.replace(CONFIG, adversarial=share)
        loss = ReconstructionLoss(config, str(perceptual_network), steps=10)
        player = loss.make_discriminator(images)
        decoded = images.flip(0).clone().requires_grad_()
        result = loss(decoded, images, {}, 0, player.discriminator)
        norms = [
            torch.autograd.grad(part, decoded, retain_graph=True)[0].norm()
            for part in (result.adversarial, result.reconstruction)
        ]
        assert float(norms[0] / norms[1]) == pytest.approx(share, rel=1e-3)


def test_a_grown_decoder_keeps_ids_and_what_it_had_learnt():
    before = TAVQTokenizer(dataclasses.replace(PRESETS["tiny"], upsample_channels=(24, 16))).eval()
    after = with_decoder_shape(before, (24, 16, 16), decoder_blocks=2).eval()
    images = noise_images(2, 32)
    assert torch.equal(before.encode(images), after.encode(images))
    assert after.decode(after.encode(images)).shape == (2, 3, 64, 64)
    assert after.decode_size_px == 64 and after.image_size_px == 32
    assert torch.equal(before.decoder.attention[0].qkv.weight, after.decoder.attention[0].qkv.weight)
    assert torch.equal(before.decoder.upsample[1].conv.weight, after.decoder.upsample[1].conv.weight)
    with pytest.raises(ValueError, match="at least as many"):
        with_decoder_shape(after, (24, 16), decoder_blocks=1)


def test_a_decoder_gives_sizes_that_doubling_does_not_reach(monkeypatch):
    """8 cells and three stages give 64 px; resampled to 7 cells, 56."""
    before = TAVQTokenizer(PRESETS["tiny"]).eval()
    after = with_decoder_shape(before, (24, 16, 16), decoder_blocks=1, decode_size_px=56).eval()
    ids = before.encode(noise_images(2, 32))
    assert torch.equal(ids, after.encode(noise_images(2, 32)))
    whole = after.decode(ids)
    assert whole.shape == (2, 3, 56, 56) and after.decode_size_px == 56
    shrunk = torch.nn.functional.interpolate(before.decode(ids), 56, mode="bilinear", antialias=True)
    assert (whole - shrunk).abs().mean() < 0.5 * shrunk.std()  # its weights still serve

    # Far from its edges a window is a part of the image, but for the statistics that normalisation takes.
    window = Window(1, 2, 5)
    codes = to_map(after.codebook[ids.flatten(1)], after.grid_size)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.GroupNorm, "forward", lambda self, x: x)
        part, expected = after.decoder(codes, window), window.of_pixels(after.decode(ids), 8)
    assert part.shape == expected.shape == (2, 3, 40, 40)
    assert torch.allclose(part[..., 18:22, 18:22], expected[..., 18:22, 18:22], atol=1e-4)

    kept = with_decoder_shape(after, (24, 16, 16), decoder_blocks=1)
    assert kept.decode_size_px == 56
    copy = TAVQTokenizer(after.config)
    copy.load_state_dict(after.state_dict())
    assert torch.equal(copy.eval().decode(ids), whole)
    with pytest.raises(ValueError, match="expected a multiple of 8"):
        with_decoder_shape(before, (24, 16, 16), decoder_blocks=1, decode_size_px=60)


def test_noise_starts_without_effect_and_changes_texture_once_its_strength_is_learnt():
    before = TAVQTokenizer(PRESETS["tiny"]).eval()
    after = with_decoder_shape(before, (24, 16, 16), decoder_blocks=1, decoder_noise=True).eval()
    ids = before.encode(noise_images(3, 32))
    assert torch.equal(before.decode(ids), after.decode(ids))

    for stage in after.decoder.upsample:
        torch.nn.init.constant_(stage.noise.strength, 0.5)
    noisy = after.decode(ids)
    assert not torch.allclose(noisy, before.decode(ids), atol=0.01)
    assert torch.equal(after.decode(ids), noisy)
    assert torch.allclose(after.decode(ids[1:2]), noisy[1:2], atol=1e-5)  # alone as in company
    copy = TAVQTokenizer(after.config)
    copy.load_state_dict(after.state_dict())
    assert torch.equal(copy.eval().decode(ids), noisy)
    kept = with_decoder_shape(after, (24, 16, 16), decoder_blocks=1)
    assert torch.equal(kept.eval().decode(ids), noisy)


def test_noise_is_new_in_each_training_step_and_its_strength_learns():
    tokenizer = TAVQTokenizer(dataclasses.replace(PRESETS["tiny"], decoder_noise=True)).train()
    noise = tokenizer.decoder.upsample[0].noise
    torch.nn.init.constant_(noise.strength, 0.5)
    images = noise_images(2, 32)
    first = tokenizer(images).images
    assert not torch.allclose(tokenizer(images).images, first, atol=0.01)
    first.square().mean().backward()
    assert float(noise.strength.grad.norm()) > 0


def test_views_are_the_same_few_for_an_image_and_both_sizes_show_the_same_part():
    images = TrainingImages(open_dataset("shapes", "train").take(3), 32, 64, views=4)
    seen = {images[(0, draw)]["draw"] for draw in range(200)}
    assert len(seen) == 4
    assert seen & {images[(1, draw)]["draw"] for draw in range(200)} == {
        0,
        1,
    }  # the whole image and its mirror
    for draw in range(4):
        view = images[(1, draw)]
        small = torch.nn.functional.interpolate(view["target"][None], (32, 32), mode="area")[0]
        assert (small - view["image"]).abs().mean() < 0.06


@pytest.fixture
def uncaptioned(tmp_path: Path) -> Path:
    folder = tmp_path / "more"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "deep/b.jpg")):
        Image.new("RGB", (40, 40), (90 * number, 20, 60)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.slow
def test_more_images_are_decoded_and_distilled_but_only_captioned_ones_are_aligned(
    uncaptioned, perceptual_network
):
    captioned = len(open_dataset("shapes", "train"))
    run = dataclasses.replace(RUN_PRESETS["tiny"], images=(uncaptioned,), distill=perceptual_network)
    task = TokenizerTask(run)
    assert len(task.dataset) == captioned + 2 == len(task.maps)
    assert task.train_set.ids[-2:] == ("more/a.png", "more/deep/b.jpg")
    batch = task.collate([task.dataset[(index, 0)] for index in (0, 1, captioned, captioned + 1)])
    for units in batch["texts"].units:
        assert units.mask.any(dim=1).tolist() == [True, True, False, False]
    assert torch.isfinite(task.model(batch, 0).loss)


def test_folders_without_images_are_named(tmp_path):
    dataset = open_dataset("shapes", "val")
    with pytest.raises(FileNotFoundError, match="holds no image"):
        with_more_images(dataset, [tmp_path])
    with pytest.raises(FileNotFoundError, match="no folder"):
        with_more_images(dataset, [tmp_path / "absent"])
    assert with_more_images(dataset, []) is dataset


def test_lgvq_needs_a_caption_for_every_image(uncaptioned):
    with pytest.raises(ValueError, match="leave out --images"):
        dataclasses.replace(RUN_PRESETS["tiny"], align="lgvq", images=(uncaptioned,))
