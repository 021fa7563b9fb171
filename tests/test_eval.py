"""The three evaluations on tiny weights: protocol recorded, training networks refused, runs resumed."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tavq.data.dataset import Example, ImageTextDataset
from tavq.data.images import UnreadableImageError, from_pixels, to_uint8
from tavq.data.layouts import open_dataset
from tavq.eval import (
    faithfulness,
    generator_curve,
    run_caption,
    run_t2i,
    run_tokenizer,
    t2i,
)
from tavq.eval.config import EvaluationRun
from tavq.eval.evaluation import open_evaluation, squashed_images, uint8_to_pil
from tavq.eval.faithfulness import cycle_cider, photo_hits
from tavq.eval.judge import JudgeDistance, judge_features
from tavq.eval.results import read_results, with_intervals
from tavq.generator.config import SamplingConfig
from tavq.metrics import spectral
from tavq.pipeline import CHECKPOINT, Generated, Pipeline
from tavq.tokenizer.model import TAVQTokenizer

LIMIT = ("--data", "shapes", "--limit", "12")


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny")


@pytest.mark.slow
def test_tokenizer_evaluation_measures_reconstruction_and_codebook(checkpoint, network, tmp_path, capsys):
    out = tmp_path / "tokenizer.json"
    flags = ["--checkpoint", str(checkpoint), *LIMIT, "--features", str(network), "--out", str(out)]
    run_tokenizer.main(flags)
    results = read_results(out)
    assert {"rFD-moments", "PSNR", "SSIM", "usage", "perplexity"} <= set(results.metrics)
    assert (
        results.metrics["PSNR"]["low"] <= results.metrics["PSNR"]["value"] <= results.metrics["PSNR"]["high"]
    )
    assert all(entry["n"] == 12 for entry in results.metrics.values())
    assert (
        results.protocol["split"] == "test" and "FD-moments of photos at 64 px" in results.protocol["floors"]
    )
    run_tokenizer.main([*flags, "--compare", str(out)])
    assert "PSNR" in capsys.readouterr().out
    assert read_results(out).metrics == results.metrics


@pytest.mark.slow
def test_spectra_are_taken_at_the_size_that_is_decoded(checkpoint, tmp_path, monkeypatch):
    """The tiny tokenizer reads 32 px and decodes 64: octaves reach to 24 cycles an image, not to 12."""
    monkeypatch.setattr(spectral, "MIN_FLAT_IMAGES", 1)
    out = tmp_path / "tokenizer.json"
    run_tokenizer.main(["--checkpoint", str(checkpoint), *LIMIT, "--no-frechet", "--out", str(out)])
    results = read_results(out)
    octaves = {name.removeprefix("power ") for name in results.metrics if name.startswith("power ")}
    assert octaves == {"1-3", "3-6", "6-12", "12-24"}
    assert {"weave 2 px", "weave 4 px", "weave 8 px"} <= set(results.metrics)

    tokenizer = TAVQTokenizer.from_pretrained(checkpoint / "tokenizer")
    dataset = open_dataset("shapes", "test").take(12)
    small, _ = squashed_images(dataset, 32)
    large, _ = squashed_images(dataset, 64)
    decoded = [to_uint8(tokenizer.decode(tokenizer.encode(from_pixels(image[None])))) for image in small]
    sums = spectral.octave_statistics(torch.cat(decoded), large)["power 12-24"].sum(axis=0)
    assert results.metrics["power 12-24"]["value"] == pytest.approx(sums[0] / sums[1])


def test_a_network_that_shaped_training_never_measures(checkpoint, network, tmp_path, capsys):
    from tavq.base.files import file_hash

    path = checkpoint / "tokenizer" / "config.json"
    config = json.loads(path.read_text())
    taught = file_hash(network)
    records = ({"distilled_from": taught}, {"decoder_perceptual": f"another {taught}"})
    for script, provenance in zip((run_tokenizer, run_t2i), records, strict=True):
        path.write_text(json.dumps(config | {"provenance": provenance}))
        with pytest.raises(SystemExit) as stopped:
            script.main(
                [
                    *("--checkpoint", str(checkpoint), *LIMIT),
                    *("--features", str(network), "--out", str(tmp_path / "x.json")),
                ]
            )
        assert stopped.value.code == 2 and "shaped training" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_the_judges_features_are_its_last_trunk_block_averaged(judge):
    pipeline = Pipeline.from_pretrained(judge)
    encoder = pipeline.tokenizer.encoder
    images, _ = squashed_images(open_dataset("shapes", "test").take(3), 32)
    outputs = []
    handle = encoder.trunk[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    encoder(from_pixels(images))
    handle.remove()
    assert torch.allclose(judge_features(pipeline, images), outputs[0].mean(dim=1), atol=1e-5)


def test_the_judges_distance_is_0_for_the_photos_and_grows_with_noise(judge):
    dataset = open_dataset("shapes", "test").take(12)
    distance = JudgeDistance(Pipeline.from_pretrained(judge), dataset)
    images, _ = squashed_images(dataset, 32)
    noise = torch.randint(256, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert distance(images) == pytest.approx(0, abs=1e-6)
    assert distance(noise) > 2 * distance(images // 8 * 8) > 0

    larger, _ = squashed_images(dataset, 64)
    few = open_dataset("shapes", "train").take(5)
    assert list(distance.floors(larger, few)) == ["FD-judge of photos at 64 px"], "fewer photos, no floor"


def test_a_judge_measures_reconstructions(checkpoint, judge, network, tmp_path, capsys):
    taught = {"taught_by": ["0123456789abcdef"]}
    for folder in (checkpoint, judge):
        path = folder / "tokenizer" / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"provenance": config["provenance"] | taught}))
    plain, out = tmp_path / "plain.json", tmp_path / "judged.json"
    flags = ["--checkpoint", str(checkpoint), *LIMIT, "--no-frechet", "--no-retrieval"]
    run_tokenizer.main([*flags, "--out", str(plain)])
    capsys.readouterr()
    run_tokenizer.main([*flags, "--judge", str(judge), "--out", str(out), "--compare", str(plain)])
    shown = capsys.readouterr().out
    results = read_results(out)
    assert results.metrics["rFD-judge"]["value"] > 0
    floors = results.protocol["floors"]
    assert set(floors) == {"FD-judge of photos at 64 px", "FD-judge of photos of another split"}
    assert list(results.protocol["judge"]) == ["tokenizer"]
    assert results.protocol["judge_shares_networks"] == ["0123456789abcdef"]
    line = next(line for line in shown.splitlines() if line.startswith("rFD-judge ") and "absent" in line)
    assert line.split()[1] == "absent"

    with pytest.raises(SystemExit):
        run_tokenizer.main([*flags, "--judge", str(checkpoint), "--out", str(tmp_path / "x.json")])
    assert "shares its codebook" in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_a_generated_image_is_measured_where_it_is_flat_itself():
    """A photo that cannot be read has no flat patch; the grid of every image counts."""
    rng = torch.Generator().manual_seed(0)
    noise = (128 + 4 * torch.randn(24, 1, 64, 64, generator=rng)).round().expand(-1, 3, -1, -1)
    grid = 3 * torch.cos(torch.pi / 2 * torch.arange(64))

    def photo(index):
        if index == 5:
            raise UnreadableImageError("damaged")
        return Image.fromarray(noise[index].to(torch.uint8).permute(1, 2, 0).numpy())

    examples = [Example(f"{i}", functools.partial(photo, i), ("a dog",), None, "test") for i in range(24)]
    dataset = ImageTextDataset("made up", examples)
    with pytest.warns(UserWarning):
        statistics = t2i.weave_of_generated((noise + grid).to(torch.uint8), dataset)
    rows = statistics["weave 4 px"]
    assert rows[5, 1] == 9 and rows[5, 3] == 0 and (rows[:5, 3] == 9).all()
    assert with_intervals(statistics)["weave 4 px"]["low"] > 2


def with_another_decoder(checkpoint):
    tokenizer = TAVQTokenizer.from_pretrained(checkpoint / "tokenizer")
    torch.nn.init.zeros_(tokenizer.decoder.to_rgb[-1].bias)
    tokenizer.save_pretrained(checkpoint / "tokenizer")


def test_scores_of_pictures_keep_the_order_of_the_data_set():
    captions = {"b": "a red dog runs", "a": "two men in the snow", "c": "a boat on blue water"}
    photo = functools.partial(Image.new, "RGB", (8, 8))
    examples = [Example(name, photo, (text, text), None, "test") for name, text in captions.items()]
    dataset = ImageTextDataset("made up", examples)
    scores = cycle_cider(["a red dog runs", "", ""], dataset)
    assert scores[0] > 1 and not scores[1:].any()


def test_the_judges_floor_gives_every_image_another_prompt(monkeypatch):
    """With a judge that never errs, all scores are right, and none where prompts are shuffled."""
    captions = ["a red dog runs", "two men in the snow", "boats on blue water"]  # no word in common
    photo = functools.partial(Image.new, "RGB", (8, 8))
    examples = [Example(f"{i}", photo, (text, text), None, "test") for i, text in enumerate(captions)]
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 8, 8)

    def captions_of(judge, images, work):
        return [captions[int(image.max())] for image in images]

    def hits_of(judge, images, prompts):
        right = [captions[int(image.max())] == prompt for image, prompt in zip(images, prompts, strict=True)]
        return np.array(right, dtype=float)[:, None]

    monkeypatch.setattr(faithfulness, "cycle_captions", captions_of)
    monkeypatch.setattr(faithfulness, "prompt_hits", hits_of)
    scores, shuffled = faithfulness.judge_images(None, images, ImageTextDataset("made up", examples))
    assert scores["cycle_CIDEr"].min() > 9 and shuffled["cycle_CIDEr"] == 0
    assert scores["prompt_R@10"].tolist() == [[1], [1], [1]] and shuffled["prompt_R@10"] == 0


def test_an_image_is_found_by_its_photo_s_codes_and_not_by_those_of_another(judge):
    pipeline = Pipeline.from_pretrained(judge)
    photos = torch.randint(256, (24, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    size = pipeline.tokenizer.image_size_px
    images = torch.nn.functional.interpolate(photos, size=(size, size))
    pil_images = uint8_to_pil(images)
    broken = Path("/nowhere.png")
    examples = [
        Example(
            f"{i}", broken if i == 5 else functools.partial(pil_images.__getitem__, i), ("a",), None, "test"
        )
        for i in range(24)
    ]
    with pytest.warns(UserWarning, match="1 of 24"):
        scores, floors = photo_hits(pipeline, images, ImageTextDataset("made up", examples))
    hits = scores["photo_R@10"][:, 0]
    assert hits[5] == 0 and hits.sum() == 23
    assert floors["photo_R@10"] < 0.8


def test_the_generator_is_measured_with_words_of_the_photos(tiny_checkpoint, tmp_path, monkeypatch):
    asked = []

    def generate_each(prompt, seed, settings, **given):
        asked.append((prompt, given["image_words"], given["images"]))
        texts = prompt or [""]
        recipe = {
            "settings": dataclasses.asdict(settings),
            "checkpoints": parts,
            "image_words": 2,
            "version": "0",
        }
        for text, number in zip(texts, seed, strict=True):
            image = Image.new("RGB", (8, 8), (number, 0, 0))
            yield Generated(image, torch.zeros(4, 4), recipe | {"prompt": text, "seed": number})

    pipeline = Pipeline.from_pretrained(tiny_checkpoint)
    parts = {part: pipeline.hashes[part] for part in ("tokenizer", "generator")}
    monkeypatch.setattr(pipeline, "generate_each", generate_each)
    dataset = open_dataset("shapes", "test").take(3)
    for _ in range(2):  # the second call finds everything done
        images = t2i.generate_images(
            pipeline, dataset, 0, tmp_path, SamplingConfig(), image_words=2, text=False
        )
    assert [(prompt, words) for prompt, words, _ in asked] == [(None, 2)] * 3
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert asked[1][2].tobytes() == dataset.load_image(1).tobytes()


def test_what_drew_the_pictures_never_judges_them(checkpoint, network, tmp_path, capsys):
    likewise = shutil.copytree(checkpoint, tmp_path / "likewise")
    with_another_decoder(likewise)
    flags = ["--checkpoint", str(checkpoint), *LIMIT, "--features", str(network), "--judge", str(likewise)]
    with pytest.raises(SystemExit) as stopped:
        run_t2i.main([*flags, "--out", str(tmp_path / "x.json")])
    assert stopped.value.code == 2 and "shares its codebook" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_t2i_evaluation_goes_on_where_it_stopped(checkpoint, judge, network, tmp_path, monkeypatch):
    out = tmp_path / "t2i.json"
    flags = ["--checkpoint", str(checkpoint), *LIMIT, "--features", str(network), "--out", str(out)]
    flags += ["--seeds", "2", "--judge", str(judge), "--neighbours", "2"]
    monkeypatch.setattr(t2i, "PROMPTS_AT_ONCE", 4)
    drawn = t2i.Pipeline.generate_each
    prompts_drawn = []

    def killed(self, prompts, *rest, **more):
        if len(prompts_drawn) == 8:
            raise KeyboardInterrupt
        prompts_drawn.extend(prompts)
        return drawn(self, prompts, *rest, **more)

    monkeypatch.setattr(t2i.Pipeline, "generate_each", killed)
    with pytest.raises(SystemExit):
        run_t2i.main(flags)
    assert not out.exists() and len(prompts_drawn) == 8

    def counted(self, prompts, *rest, **more):
        prompts_drawn.extend(prompts)
        return drawn(self, prompts, *rest, **more)

    monkeypatch.setattr(t2i.Pipeline, "generate_each", counted)
    run_t2i.main(flags)
    assert len(prompts_drawn) == 24, "two seeds of 12 pictures, none drawn twice"
    with_another_decoder(checkpoint)
    run_t2i.main(flags)
    assert len(prompts_drawn) == 48, "another decoder draws other pictures"
    results = read_results(out)
    assert {"FD-moments", "KID", "precision", "recall", "cycle_CIDEr", "FD-judge"} <= set(results.metrics)
    assert {"FD-moments of noise", "FD-moments of a constant grey image"} <= set(results.protocol["floors"])
    assert {"cycle_CIDEr, prompts shuffled", "FD-moments of the tokenizer's reconstructions"} <= set(
        results.protocol["floors"]
    )
    assert "FD-judge of photos of another split" in results.protocol["floors"]
    assert {results.metrics[name]["over"] for name in ("FD-moments", "FD-judge")} == {"generation seeds"}
    assert (tmp_path / "t2i.neighbours.png").exists()


@pytest.mark.slow
def test_the_curve_of_a_generator_is_drawn_from_the_weights_of_its_evaluations(
    checkpoint, network, tmp_path, capsys
):
    run, out = tmp_path / "run", tmp_path / "curve.png"
    flags = [str(run), "--checkpoint", str(checkpoint), "--features", str(network), "--out", str(out), *LIMIT]
    with pytest.raises(SystemExit) as stopped:
        generator_curve.main(flags)
    assert stopped.value.code == 2 and "train it with --training.keep-evaluated" in capsys.readouterr().err
    log = [{"step": step, "val/loss": 5.0 - step / 100, "val/loss_null_text": 5.0} for step in (10, 20)]
    for line in log:
        kept = run / "training" / "evaluated" / f"step-{line['step']:06d}"
        shutil.copytree(checkpoint / "generator", kept)
    (run / "training" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    generator_curve.main(flags)
    values = json.loads(out.with_suffix(".json").read_text())
    assert values["val/loss"] == [[10, 4.9], [20, 4.8]] and values["n"] == 12
    assert values["FD-moments"]["10"] == values["FD-moments"]["20"] > 0
    with Image.open(out) as picture:
        assert picture.width > picture.height > 100


def test_caption_evaluation_writes_coco_results_and_metrics(checkpoint, tmp_path):
    out = tmp_path / "caption.json"
    run_caption.main(
        ["--checkpoint", str(checkpoint), *LIMIT, "--backend", "python", "--out", str(out), "--beam", "2"]
    )
    results = read_results(out)
    shares = {"ends in a function word", "distinct captions"}
    assert {"CIDEr", "BLEU-4", "ROUGE-L"} | shares <= set(results.metrics)
    rows = json.loads((tmp_path / "caption" / "captions.json").read_text())
    assert len(rows) == 12 and set(rows[0]) == {"image_id", "caption"}
    assert results.protocol["decoding"]["beam"] == 2
    own, strangers = results.protocol["floors"].values()
    assert own > 2 * strangers


def test_a_part_that_is_missing_is_named(checkpoint, capsys):
    shutil.rmtree(checkpoint / "captioner")
    with pytest.raises(SystemExit) as stopped:
        run_caption.main(["--checkpoint", str(checkpoint), *LIMIT])
    assert stopped.value.code == 2 and "captioner/config.json" in capsys.readouterr().err


def test_results_never_go_into_the_installed_package(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(Path(CHECKPOINT).parent.parent))
    with pytest.raises(ValueError, match=r"results cannot lie beside the weights of .*; leave out"):
        open_evaluation(EvaluationRun(data="shapes", publish=True), ())
    open_evaluation(EvaluationRun(data="shapes"), ())
