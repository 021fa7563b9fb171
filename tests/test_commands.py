"""The commands of `tavq`, called as a user types them, and what each says to bad input."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from tavq.captioner.config import DecodingConfig
from tavq.cli import main
from tavq.data.config import SPLITS
from tavq.data.images import load_image
from tavq.data.text_encoder import TokenStates
from tavq.data.tokens import open_tokens
from tavq.generator.config import SamplingConfig
from tavq.generator.model import GeneratorModel
from tavq.generator.sampling import sample
from tavq.pipeline import RankBy, read_recipe
from tavq.tokenizer.config import PRESETS
from tavq.tokenizer.model import TAVQTokenizer
from tavq.tokenizer.retrieval import alignment_scores

ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "app" / "examples" / "cat.jpg"
PROMPTS = ["a dog runs", "a red cat"]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> list[str]:
    return ["--checkpoint", str(tiny_checkpoint), "--device", "cpu"]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail: one line on stderr, exit code 2, nothing else said; returns the line."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert left.value.code == 2 and said.out == ""
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.err.endswith("\n")
        return said.err

    return run


def run(*arguments: str | Path) -> None:
    main([str(argument) for argument in arguments])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def squashed(path: Path, size: int) -> np.ndarray:
    return np.asarray(load_image(path).resize((size, size), Image.Resampling.BICUBIC))


@pytest.mark.slow
def test_generate_writes_four_pictures_with_seeds_7_to_10(tmp_path, checkpoint, tiny_pipeline, capsys):
    run("generate", PROMPTS[0], "--num-images", 4, "--seed", 7, "--out", tmp_path / "out", *checkpoint)
    files = [tmp_path / "out" / f"{number:06d}.png" for number in range(4)]
    assert sorted((tmp_path / "out").iterdir()) == [*files, tmp_path / "out" / "result.jsonl"]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    rows = [json.loads(line) for line in (tmp_path / "out" / "result.jsonl").read_text().splitlines()]
    own = tiny_pipeline.generate(PROMPTS[:1] * 4, [7, 8, 9, 10])
    for file, row, picture in zip(files, rows, own, strict=True):
        assert row == {"file": file.name, **picture.recipe} and read_recipe(file) == picture.recipe
        assert np.array_equal(pixels(file), np.asarray(picture.image))


@pytest.mark.slow
def test_generate_goes_on_numbering_and_draws_best_of(tmp_path, checkpoint, tiny_pipeline):
    for _ in range(2):
        ranked = ["--best-of", 3, "--rank-by", "likelihood"]
        run("generate", PROMPTS[0], "--seed", 3, *ranked, "--out", tmp_path, *checkpoint)
    first, second = pixels(tmp_path / "000000.png"), pixels(tmp_path / "000001.png")
    own = tiny_pipeline.generate(PROMPTS[:1], [3], best_of=3, rank_by="likelihood")[0]
    assert own.recipe["rank_by"] == "likelihood" and read_recipe(tmp_path / "000000.png") == own.recipe
    assert np.array_equal(first, second) and np.array_equal(first, np.asarray(own.image))
    assert len((tmp_path / "result.jsonl").read_text().splitlines()) == 2


def test_candidates_are_ranked_by_likelihood_alignment_or_their_sum(tiny_pipeline):
    ids = torch.randint(64, (5, 16), generator=torch.Generator().manual_seed(0))
    likelihood, alignment, both = (tiny_pipeline.rank(ids, "a red cat", by) for by in get_args(RankBy))
    standardised = [(s - s.mean()) / s.std() for s in (likelihood, alignment)]
    assert torch.allclose(both, sum(standardised), atol=1e-4)
    assert not torch.equal(likelihood.argsort(), alignment.argsort())
    with pytest.raises(ValueError, match="rank_by is 'luck'; choose likelihood, alignment, sum"):
        tiny_pipeline.rank(ids, "a red cat", "luck")


@pytest.mark.slow
def test_with_a_plain_tokenizer_likelihood_alone_ranks(tmp_path, tiny_checkpoint, refused):
    plain = shutil.copytree(tiny_checkpoint, tmp_path / "plain")
    path = plain / "tokenizer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"provenance": {"align": "none"}}))
    chain = ["--checkpoint", plain, "--device", "cpu"]
    flags = ["--best-of", 2, "--out", tmp_path / "out", *chain]
    assert "codes are not projected to words" in refused("generate", "a dog", *flags)
    assert "codes are not projected to words" in refused("caption", PHOTO, "--alignment", 4, *chain)
    run("generate", "a dog", "--rank-by", "likelihood", *flags)
    assert (tmp_path / "out" / "000000.png").is_file()


def test_a_random_seed_is_printed_and_recorded(tmp_path, checkpoint, capsys):
    run("generate", PROMPTS[0], "--seed", -1, "--out", tmp_path, *checkpoint)
    seed = int(capsys.readouterr().out.split()[1])
    assert seed >= 0 and read_recipe(tmp_path / "000000.png")["seed"] == seed


def test_complete_draws_and_prints_a_random_seed_too(tmp_path, checkpoint, capsys):
    run("complete", PHOTO, "a cat", "--keep", "top", "--seed", -1, "--out", tmp_path, *checkpoint)
    seed = int(capsys.readouterr().out.split()[1])
    assert seed >= 0 and read_recipe(tmp_path / "000000.png")["seed"] == seed


@pytest.mark.slow
def test_unconditional_images_come_from_the_null_text_and_are_drawn_again(
    tmp_path, checkpoint, tiny_pipeline, refused
):
    run("generate", "--unconditional", "--num-images", 2, "--seed", 5, "--out", tmp_path / "a", *checkpoint)
    files = sorted((tmp_path / "a").glob("*.png"))
    states = torch.randn(2, 32, 384)  # which nobody sees
    nothing = TokenStates(states, torch.zeros(2, 32, dtype=torch.bool))
    ids = sample(tiny_pipeline.generator, nothing, [5, 6], SamplingConfig(guidance_scale=1))
    for file, picture in zip(files, tiny_pipeline.decode(ids), strict=True):
        assert np.array_equal(pixels(file), np.asarray(picture))
    recipe = read_recipe(files[1])
    assert recipe["prompt"] == "" and recipe["seed"] == 6 and recipe["settings"]["guidance_scale"] == 1

    run("generate", "--from-png", files[1], "--out", tmp_path / "b", *checkpoint)
    assert np.array_equal(pixels(tmp_path / "b" / "000000.png"), pixels(files[1]))
    assert "takes no prompt" in refused("generate", "a dog", "--unconditional", *checkpoint)
    assert "need a prompt" in refused("generate", "--unconditional", "--best-of", 2, *checkpoint)


@pytest.mark.slow
def test_a_negative_prompt_is_recorded_and_drawn_again(tmp_path, checkpoint):
    flags = ["--negative-prompt", "a cat"]
    run("generate", PROMPTS[0], *flags, "--out", tmp_path / "a", *checkpoint)
    first = tmp_path / "a" / "000000.png"
    assert read_recipe(first)["negative_prompt"] == "a cat"
    run("generate", "--from-png", first, "--out", tmp_path / "b", *checkpoint)
    assert (tmp_path / "b" / "000000.png").read_bytes() == first.read_bytes()
    run("complete", PHOTO, "a dog", "--keep", "left", *flags, "--out", tmp_path / "c", *checkpoint)
    assert read_recipe(tmp_path / "c" / "000000.png")["negative_prompt"] == "a cat"


def write_prompts(path: Path) -> Path:
    if path.suffix == ".txt":
        path.write_text("\n\n".join(PROMPTS) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["id", "prompt"], *enumerate(PROMPTS)])
    return path


def test_a_recipe_of_an_earlier_version_is_read_under_the_names_of_today(tmp_path, tiny_pipeline):
    image = tiny_pipeline.generate([PROMPTS[0]], [3])[0]
    settings = dict(image.recipe["settings"])
    settings["guidance"] = settings.pop("guidance_scale")
    earlier = dataclasses.replace(image, recipe=image.recipe | {"settings": settings})
    earlier.save(tmp_path / "earlier.png")
    assert read_recipe(tmp_path / "earlier.png") == image.recipe


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_prompts_come_from_a_file(tmp_path, checkpoint, kind):
    prompts = write_prompts(tmp_path / f"prompts.{kind}")
    run("generate", "before", "--prompts-file", prompts, "--out", tmp_path / "out", *checkpoint)
    rows = [json.loads(line) for line in (tmp_path / "out" / "result.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["before", *PROMPTS] and {row["seed"] for row in rows} == {0}


@pytest.mark.slow
def test_a_png_is_drawn_again_from_its_recipe(tmp_path, checkpoint, refused):
    settings = ["--temperature", "0.8", "--top-k", "9", "--guidance-scale", "2"]
    ranked = ["--best-of", 2, "--rank-by", "likelihood"]
    run("generate", PROMPTS[1], "--seed", 5, *ranked, *settings, "--out", tmp_path / "a", *checkpoint)
    first = tmp_path / "a" / "000000.png"
    run("generate", "--from-png", first, "--out", tmp_path / "b", *checkpoint)
    again = tmp_path / "b" / "000000.png"
    assert again.read_bytes() == first.read_bytes()
    assert read_recipe(again)["settings"]["top_k"] == 9
    shutil.copytree(Path(checkpoint[1]) / "tokenizer", tmp_path / "half" / "tokenizer")
    absent = refused("generate", "--from-png", first, "--out", tmp_path, "--checkpoint", tmp_path / "half")
    assert "holds none; name the --checkpoint that generated it" in absent


def test_caption_prints_the_sentence_and_marks_what_is_unsure(checkpoint, tiny_pipeline, capsys):
    own = tiny_pipeline.caption([load_image(PHOTO)])[0][0]
    run("caption", PHOTO, *checkpoint)
    assert capsys.readouterr().out == own.text + "\n"
    run("caption", PHOTO, PHOTO, "--unsure-below", 1, "--show-scores", *checkpoint)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{PHOTO}\t" + " ".join(f"[{word.text}?]" for word in own.words)
    assert f"{own.score:.3f}" in lines[1] and lines[:2] == lines[2:]


def test_aligned_codes_choose_among_the_beams(tiny_pipeline, checkpoint, capsys):
    photo = load_image(PHOTO)
    beams = tiny_pipeline.caption([photo], DecodingConfig(n_best=5))[0]
    vectors = tiny_pipeline.alignment_encoder.encode([beam.text for beam in beams])
    fits = alignment_scores(tiny_pipeline.tokenizer, tiny_pipeline.encode([photo]), vectors)[0].tolist()
    totals = {beam.text: beam.score + 100 * fit for beam, fit in zip(beams, fits, strict=True)}
    assert max(totals, key=totals.get) != beams[0].text, "the likeliest must lose, or nothing is tested"
    run("caption", PHOTO, "--alignment", 100, "--n-best", 5, *checkpoint)
    assert capsys.readouterr().out.splitlines() == sorted(totals, key=totals.get, reverse=True)


def test_a_folder_is_described_into_a_file(tmp_path, checkpoint, tiny_pipeline):
    for number in range(2):
        shutil.copy(PHOTO, tmp_path / f"{number}.jpg")
    run("caption", tmp_path, "--out", tmp_path / "captions.jsonl", *checkpoint)
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    text = tiny_pipeline.caption([load_image(PHOTO)])[0][0].text
    assert [(row["image"], row["caption"]) for row in rows] == [("0.jpg", text), ("1.jpg", text)]


def test_reconstruct_writes_a_sheet_of_the_photos_above_their_reconstructions(
    tmp_path, checkpoint, tiny_pipeline, capsys
):
    run("reconstruct", PHOTO, "--out", tmp_path, *checkpoint)
    own = np.asarray(tiny_pipeline.reconstruct([load_image(PHOTO)])[0].image)
    names = ["cat.reconstruction.png", "sheet.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    sheet, size = pixels(tmp_path / names[1])[1::4, 1::4], len(own)  # enlarged four times
    assert np.array_equal(pixels(tmp_path / names[0]), own)
    assert np.array_equal(sheet[:size], squashed(PHOTO, size)) and np.array_equal(sheet[-size:], own)


def white_right_half(path: Path) -> Path:
    mask = Image.new("L", (100, 60))
    mask.paste(255, (50, 0, 100, 60))
    mask.save(path)
    return path


@pytest.mark.parametrize("part", ["top", "bottom", "left", "right", "box", "mask"])
def test_complete_keeps_the_pixels_of_its_part(tmp_path, checkpoint, tiny_pipeline, part):
    size, (width, height) = tiny_pipeline.tokenizer.decode_size_px, load_image(PHOTO).size
    half = size // 2
    kept = {
        "top": np.s_[:half],
        "bottom": np.s_[half:],
        "right": np.s_[:, half:],
        "box": np.s_[:half, :half],
    }.get(part, np.s_[:, :half])
    mask = white_right_half(tmp_path / "mask.png")
    keep = {"box": f"box=0,0,{width // 2},{height // 2}"}.get(part, part)
    which = ["--mask", mask] if part == "mask" else ["--keep", keep]
    run("complete", PHOTO, "a cat", *which, "--num-images", 2, "--out", tmp_path / "out", *checkpoint)
    first, second = (pixels(tmp_path / "out" / f"00000{number}.png") for number in range(2))
    photo = squashed(PHOTO, size)
    assert np.array_equal(first[kept], photo[kept]) and np.array_equal(second[kept], photo[kept])
    new = np.s_[:4, :4] if part in ("bottom", "right") else np.s_[-4:, -4:]
    assert not np.array_equal(first, second) and not np.array_equal(first[new], photo[new])


def test_variations_keep_a_random_share_of_the_tokens(tmp_path, checkpoint, tiny_pipeline):
    run("complete", PHOTO, "a cat", "--keep", "share=0.5", "--num-images", 2, "--out", tmp_path, *checkpoint)
    photo = load_image(PHOTO)
    own = tiny_pipeline.vary(photo, 0.5, "a cat", [0, 1])
    for number, picture in enumerate(own):
        assert np.array_equal(pixels(tmp_path / f"00000{number}.png"), np.asarray(picture.image))
    given = tiny_pipeline.encode([photo])[0].cpu()
    kept = [(picture.ids == given) for picture in own]
    assert all(mask.sum() >= given.numel() // 2 for mask in kept) and not torch.equal(*kept)


def test_a_long_prompt_is_warned_of_and_the_picture_drawn(tmp_path, checkpoint, capsys):
    run("generate", "a dog " * 100 + "barks", "--out", tmp_path / "out", *checkpoint)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1 and "barks" in warning
    assert (tmp_path / "out" / "000000.png").is_file()


def kinds_of_image(folder: Path) -> dict[str, tuple[Path, tuple[int, int, int]]]:
    """Files of unlike modes, and the colour that each shows."""
    pictures = {
        "grey": (Image.new("L", (40, 40), 100), (100, 100, 100)),
        "cmyk": (Image.new("CMYK", (40, 40), (0, 255, 255, 0)), (255, 0, 0)),
        "sixteen": (Image.fromarray(np.full((40, 40), 200 * 257, np.uint16)), (200, 200, 200)),
        "transparent": (Image.new("RGBA", (40, 40), (0, 0, 255, 0)), (255, 255, 255)),
    }
    made = {}
    for name, (image, colour) in pictures.items():
        made[name] = (folder / f"{name}.{'tif' if name == 'cmyk' else 'png'}", colour)
        image.save(made[name][0])
    return made


def test_images_of_every_mode_are_converted(tmp_path, checkpoint):
    kinds = kinds_of_image(tmp_path)
    run("reconstruct", *[path for path, _ in kinds.values()], "--out", tmp_path / "out", *checkpoint)
    sheet = pixels(tmp_path / "out" / "sheet.png")
    for place, (name, (_, colour)) in enumerate(kinds.items()):
        shown = sheet[12, place * 4 * (64 + 2) + 12]
        assert np.abs(shown.astype(int) - colour).max() <= 1, name


def test_bad_prompts_and_settings_are_refused_and_nothing_is_written(tmp_path, checkpoint, refused):
    out = ["--out", tmp_path / "out", *checkpoint]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "names.csv").write_text("name\na dog\n")
    assert "prompt is empty; describe" in refused("generate", "  ", *out)
    assert "no prompt; write one" in refused("generate", *out)
    assert "holds no prompt" in refused("generate", "--prompts-file", tmp_path / "empty.txt", *out)
    assert "`prompt`; add it" in refused("generate", "--prompts-file", tmp_path / "names.csv", *out)
    assert "no prompts file" in refused("generate", "--prompts-file", tmp_path / "absent.txt", *out)
    assert ".txt, .csv or .jsonl" in refused("generate", "--prompts-file", PHOTO, *out)
    assert "carries no recipe" in refused("generate", "--from-png", PHOTO, *out)
    assert "best_of is 0" in refused("generate", "a dog", "--best-of", 0, *out)
    assert "num_images is 0" in refused("generate", "a dog", "--num-images", 0, *out)
    assert "top_p is 1.5" in refused("generate", "a dog", "--top-p", 1.5, *out)
    assert "no device abacus here; choose" in refused("generate", "a dog", *out, "--device", "abacus")
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_among_good_ones_is_refused_before_the_first_picture(tmp_path, checkpoint, refused):
    prompts = ["a dog"] * 20 + [" "]
    assert "prompt is empty" in refused("generate", *prompts, "--out", tmp_path / "out", *checkpoint)
    assert not (tmp_path / "out").exists()


def test_bad_photos_are_refused_and_nothing_is_written(tmp_path, checkpoint, refused):
    truncated, dot, text = tmp_path / "cut.jpg", tmp_path / "dot.png", tmp_path / "text.jpg"
    truncated.write_bytes(PHOTO.read_bytes()[:3000])
    Image.new("RGB", (1, 1)).save(dot)
    text.write_text("no picture")
    out = ["--out", tmp_path / "out", *checkpoint]
    for photo, expected in (
        (truncated, "cut.jpg: "),
        (dot, "1 x 1 px, at least 8 px"),
        (text, "not an image"),
        (tmp_path / "absent.jpg", "absent.jpg"),
    ):
        assert expected in refused("caption", photo, *checkpoint)
        assert expected in refused("reconstruct", PHOTO, photo, *out)
        assert expected in refused("complete", photo, "a cat", "--keep", "top", *out)
    assert "no image; name one" in refused("caption", *checkpoint)
    assert "several images are called" in refused("reconstruct", PHOTO, PHOTO, *out)
    flags = ["--show-scores", "--out", tmp_path / "captions.jsonl"]
    assert "hold the probability of each word" in refused("caption", PHOTO.parent, *flags, *checkpoint)
    assert not (tmp_path / "out").exists()


def test_bad_completions_are_refused_and_nothing_is_written(tmp_path, checkpoint, refused):
    out = ["--out", tmp_path / "out", *checkpoint]
    Image.new("L", (20, 20)).save(tmp_path / "black.png")
    assert "lies outside the image" in refused("complete", PHOTO, "a", "--keep", "box=900,0,5,5", *out)
    assert "lies outside the image" in refused("complete", PHOTO, "a", "--keep", "box=-5,0,3,9", *out)
    assert "expected top, bottom, left" in refused("complete", PHOTO, "a", "--keep", "middle", *out)
    assert "share of tokens that stay is 1.0" in refused("complete", PHOTO, "a", "--keep", "share=1", *out)
    assert "such as share=0.3" in refused("complete", PHOTO, "a", "--keep", "share=some", *out)
    assert "name the part that stays" in refused("complete", PHOTO, "a", *out)
    assert "has no white part" in refused("complete", PHOTO, "a", "--mask", tmp_path / "black.png", *out)
    assert "prompt is empty" in refused("complete", PHOTO, " ", "--keep", "top", *out)
    assert "num_images is 0" in refused("complete", PHOTO, "a", "--keep", "top", "--num-images", 0, *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["tokenizer", "generator", "captioner"])
def test_a_checkpoint_without_config_is_refused(tmp_path, tiny_checkpoint, refused, part):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    (broken / part / "config.json").unlink()
    command = ["caption", PHOTO] if part == "captioner" else ["generate", "a dog", "--out", tmp_path / "out"]
    assert "config.json" in refused(*command, "--checkpoint", broken, "--device", "cpu")
    assert not (tmp_path / "out").exists()


def test_parts_of_another_codebook_are_refused(tmp_path, tiny_checkpoint, refused):
    mixed = shutil.copytree(tiny_checkpoint, tmp_path / "mixed")
    shutil.rmtree(mixed / "tokenizer")
    torch.manual_seed(1)
    other = TAVQTokenizer(PRESETS["tiny"])
    other.save_pretrained(mixed / "tokenizer")
    for command in (["generate", "a dog", "--out", tmp_path / "out"], ["caption", PHOTO]):
        message = refused(*command, "--checkpoint", mixed, "--device", "cpu")
        assert other.codebook_hash[:8] in message
    assert not (tmp_path / "out").exists()


def test_a_picture_of_other_weights_is_not_drawn_again(tmp_path, checkpoint, tiny_checkpoint, refused):
    run("generate", "a dog", "--out", tmp_path / "a", *checkpoint)
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    torch.manual_seed(1)
    generator = GeneratorModel(GeneratorModel.from_pretrained(other / "generator").config)
    shutil.rmtree(other / "generator")
    generator.save_pretrained(other / "generator")
    redo = ["generate", "--from-png", tmp_path / "a" / "000000.png", "--out", tmp_path / "b"]
    assert "was generated with generator" in refused(*redo, "--checkpoint", other)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("command", ["generate", "caption", "complete photo.jpg text", "demo"])
def test_an_unknown_flag_is_refused(command, refused):
    message = refused(*command.split(), "--colour", "red")
    assert message == f"error: Unrecognized options: --colour, red; see tavq {command.split()[0]} --help\n"


def test_an_unknown_command_is_refused(refused):
    assert "tavq --help lists the commands" in refused("paint")


def data_commands(data: Path | str, out: Path, checkpoint: Path) -> list[list[str | Path]]:
    tokenize = ["tokenize", "--checkpoint", checkpoint / "tokenizer"]
    train = ["train", "tokenizer", "--preset", "tiny"]
    return [[*command, "--data", data, "--out", out] for command in (tokenize, train)]


def missing_images(folder: Path) -> Path:
    images = [
        {"filename": f"{number}.jpg", "split": split, "sentences": [{"raw": "A dog."}]}
        for number, split in enumerate(["train", "val", "test"])
    ]
    folder.mkdir()
    (folder / "dataset_toy.json").write_text(json.dumps({"images": images, "dataset": "toy"}))
    return folder


def test_bad_data_sets_are_refused_and_nothing_is_written(tmp_path, tiny_checkpoint, refused):
    (tmp_path / "empty").mkdir()
    for data, expected in (
        (tmp_path / "absent", "absent"),
        (tmp_path / "empty", "empty"),
        (missing_images(tmp_path / "toy"), "0.jpg"),
    ):
        for command in data_commands(data, tmp_path / "out", tiny_checkpoint):
            assert expected in refused(*command)
    assert not (tmp_path / "out").exists()


def test_a_truncated_photo_among_good_ones_is_skipped_counted_and_named(tmp_path, tiny_checkpoint, capsys):
    rows = []
    for number in range(12):
        Image.new("RGB", (64, 64), (20 * number, 90, 40)).save(tmp_path / f"{number}.jpg")
        rows.append(
            json.dumps({"file_name": f"{number}.jpg", "text": "A dog.", "split": SPLITS[max(0, number - 9)]})
        )
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    (tmp_path / "7.jpg").write_bytes((tmp_path / "7.jpg").read_bytes()[:-100])
    run(*data_commands(tmp_path, tmp_path / "out", tiny_checkpoint)[0])
    warning = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
    assert "skipped 1 of 10" in warning and "7.jpg" in warning
    assert len(open_tokens(tmp_path / "out", "train")) == 9


def test_a_dataset_without_a_test_split_is_tokenised(tmp_path, tiny_checkpoint):
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "data" / split / "a.png")
        (tmp_path / "data" / split / "a.txt").write_text("A dog.")
    run(*data_commands(tmp_path / "data", tmp_path / "out", tiny_checkpoint)[0])
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
        "train-000000.tar",
        "val-000000.tar",
    ]
