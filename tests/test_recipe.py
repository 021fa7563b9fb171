"""The whole chain by one command, on generated shapes; a second run finds everything done."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from tavq.alignment.adapters import adapt
from tavq.base.arguments import parse
from tavq.captioner.config import RUN_PRESETS as CAPTIONER_PRESETS
from tavq.captioner.config import CaptionerRun
from tavq.data.keep import keep_only
from tavq.data.layouts import open_dataset
from tavq.eval.config import CaptionEvaluation, T2IEvaluation
from tavq.eval.results import measured, read_results, write_results
from tavq.generator.config import RUN_PRESETS as GENERATOR_PRESETS
from tavq.generator.config import GeneratorRun
from tavq.metrics.features import ImageSet, extract_features, load_network
from tavq.pipeline import Pipeline
from tavq.tokenizer.config import PRESETS, TokenizerRun
from tavq.tokenizer.config import RUN_PRESETS as TOKENIZER_PRESETS
from tavq.tokenizer.foreign import ForeignTokenizer
from tavq.tokenizer.losses import PerceptualNetwork
from tavq.tokenizer.run_config import DescribeRun, TokenizeRun

ROOT = Path(__file__).resolve().parent.parent


def recipe(run: Path) -> str:
    environment = os.environ | {"PRESET": "tiny", "RUN": str(run), "PYTHON": sys.executable}
    environment |= {"PREFERENCE_PRESET": "tiny-preference", "PREFERENCE_PROMPTS": "24"}
    command = ["bash", str(ROOT / "recipes" / "flickr8k.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def load(name: str) -> ModuleType:
    place = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(place)
    sys.modules[name] = module  # where dataclasses looks its fields up
    place.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_recipe_trains_and_measures_everything_once(tmp_path):
    first = recipe(tmp_path)
    steps = [line for line in first.splitlines() if line.startswith("== ")]
    assert len(steps) == 19 and "done before" not in first
    weights = {path.parent.name for path in (tmp_path / "ready").glob("*/model.safetensors")}
    assert weights == {"tokenizer", "generator", "captioner", "lexicon"}
    Pipeline(tmp_path / "ready").generate("a circle", images=ROOT / "app" / "examples" / "cat.jpg")
    assert read_results(tmp_path / "ready" / "results" / "caption.json").protocol["n"] == 60
    second = recipe(tmp_path)
    assert second.count("done before") == 18


def test_the_ablation_table_is_made_from_the_results_that_are_there(tmp_path):
    ablation = load("ablation")
    run = ablation.Ablation(data="shapes", seeds=(0, 1), runs=tmp_path, out=tmp_path / "ablation.md")
    values = {"ot": ((0.10, 300.0), (0.20, 280.0)), "none": ((0.05, 310.0),)}
    for name, seeds in values.items():
        for seed, (recall, distance) in enumerate(seeds):
            results = ablation.folder_of(run, name, seed) / "results"
            one = {"value": recall, "n": 4}
            measured = {"t2i_R@10": one, "i2t_R@10": one, "rFD-moments": {"value": distance, "n": 4}}
            write_results(results / "tokenizer.json", measured, {})
            write_results(results / "probed.json", {"t2i_R@10": one}, {})
            write_results(results / "caption.json", {"CIDEr": {"value": 0.3, "n": 4}}, {})
    lines = ablation.document(run).splitlines()
    assert "| none | 1 | 5.0 | 5.0 |  | 310.0 |  |  | 30.0 |" in lines
    ot = next(line for line in lines if line.startswith("| ot |"))
    assert ot.startswith("| ot | 2 | 15.0 (10.0 to 20.0) |") and "290.0 (280.0 to 300.0)" in ot
    assert not any(line.startswith("| gaussian |") for line in lines)


def test_the_row_of_short_text_keeps_the_first_caption_of_each_image_and_counts_its_units(tmp_path):
    ablation = load("ablation")
    run = ablation.Ablation(data="shapes", seeds=(0,), runs=tmp_path, out=tmp_path / "ablation.md")
    dataset = open_dataset("shapes", "train")
    kept = keep_only(dataset, ablation.first_captions(run))
    assert [e.captions for e in kept.examples] == [e.captions[:1] for e in dataset.examples]
    text = ablation.units_per_text(run)
    first, all_of_them = np.split(np.array(re.findall(r"[\d.]+(?= \w+s[ ,;.])", text), dtype=float), 2)
    assert len(first) == 3 and first[2] == 1 and (first <= all_of_them).all()


def test_purity_of_codes_has_a_table_of_its_own_where_it_was_measured(tmp_path):
    ablation = load("ablation")
    run = ablation.Ablation(data="shapes", seeds=(0,), runs=tmp_path, out=tmp_path / "ablation.md")
    for name, purity in (("none", None), ("ot, sgc", 0.25)):
        results = ablation.folder_of(run, name, 0) / "results"
        measured = {} if purity is None else {"code_purity": {"value": purity, "n": 4}}
        write_results(results / "tokenizer.json", measured, {})
        write_results(results / "probed.json", {}, {})
        write_results(results / "caption.json", {"CIDEr": {"value": 0.3, "n": 4}}, {})
    _, meaning = ablation.document(run).split("What codes mean")
    assert "| ot, sgc | 1 | 25.0 |" in meaning and "| none |" not in meaning


def test_rows_of_the_ablation_with_more_seeds_than_are_here_stay_if_the_settings_are_the_same(tmp_path):
    ablation = load("ablation")
    run = ablation.Ablation(data="shapes", runs=tmp_path, out=tmp_path / "ablation.md")
    for name in ("gaussian", "ot"):
        for part in ("tokenizer", "probed", "caption"):
            results = ablation.folder_of(run, name, 0) / "results"
            write_results(results / f"{part}.json", {"CIDEr": {"value": 0.3, "n": 4}}, {})
    *_, gaussian, ot = ablation.document(run).splitlines()
    assert gaussian.startswith("| gaussian | 1 |") and ot.startswith("| ot | 1 |")
    kept = [gaussian, "| ot | 2 | 15.0 |", "| ot, twice the share | 1 | 14.0 |"]
    elsewhere = ["| gaussian | 1 | 14.0 |", *kept[1:]]
    run.out.write_text("\n".join([*ablation.document(run).splitlines()[:-2], *elsewhere]))
    assert ablation.document(run).splitlines()[-3:] == kept
    assert "(1 of 4 done)" in ablation.document(run)
    assert kept[1] not in ablation.document(dataclasses.replace(run, images=10))


def test_the_comparison_of_captions_shows_each_seed_with_its_interval(tmp_path):
    captions = load("captions")
    run = captions.CaptionComparison(data="shapes", seeds=(0, 1), runs=tmp_path)
    plain, ids = np.random.default_rng(0).uniform(0, 1, size=60), [f"{i}.jpg" for i in range(60)]
    gain = {0: np.full(60, 0.1), 1: np.random.default_rng(1).normal(0, 1, size=60)}
    for seed in run.seeds:
        for codebook, scores in (("none", plain), ("ot", plain + gain[seed])):
            for stage in captions.STAGES:
                for beam in captions.BEAMS:
                    path = captions.result_of(run, codebook, seed, stage, beam)
                    decoding = {"temperature": 0.0, "beam": beam}
                    protocol = {"task": "captions", "decoding": decoding, "ids": ids}
                    metrics = {"CIDEr": measured(float(scores.mean()), 60)}
                    write_results(path, metrics, protocol, per_image={"CIDEr": scores}, ids=ids)
    lines = captions.document(run).splitlines()
    assert "| greedy, cross-entropy, seed 0 | **+10.0 [+10.0, +10.0]** | - | - | - |" in lines
    unclear = next(line for line in lines if line.startswith("| beam 5, self-critical, seed 1 |"))
    assert "**" not in unclear
    assert sum(line.startswith("| aligned - plain |") for line in lines) == 1


def test_the_tables_of_the_scenes_pair_seeds_and_show_what_differs(tmp_path):
    load("ablation")  # whose queue the recipe imports
    scenes = load("scenes")
    run = scenes.Scenes(seeds=(0, 1), runs=tmp_path, results=tmp_path / "results")
    metric, ids = "CIDEr", [f"test-{i:05d}" for i in range(50)]
    rows = np.random.default_rng(0).uniform(0, 1, size=50)
    for name, gains in {"ot": (0, 0), "none": (-0.2, -0.1), "ot, no bank": (0.0,)}.items():
        for seed, gain in enumerate(gains):
            scores = rows + seed + gain
            path = scenes.result_of(run, name, seed, "own")
            floors = {f"{metric}, captions of the next image": 0.125}
            write_results(
                path,
                {metric: measured(scores.mean(), 50)},
                {"floors": floors},
                per_image={metric: scores},
                ids=ids,
            )
    lines = scenes.document(run).splitlines()
    mean = 100 * rows.mean()
    assert f"| ot, 2 | - | - | - | - | - | {mean + 50:.1f} |" in lines
    assert any(f"| {mean + 35:.1f} (**-15.0 [-20.0, -10.0]**) |" in line for line in lines)
    assert any(line.startswith("| ot, no bank, 1 |") and "(+0.0 [+0.0, +0.0]) |" in line for line in lines)
    assert any("| captions of the next image |" in line and line.endswith("| 12.5 |") for line in lines)
    assert scenes.queue_of({"a": (), "b": ()}, (0, 1)) == [
        ("a", (), 0),
        ("b", (), 0),
        ("a", (), 1),
        ("b", (), 1),
    ]
    assert "ot, short text" in run.names
    with pytest.raises(ValueError, match="choose among: none"):
        scenes.Scenes(only=("nothing",))


def test_every_variant_of_the_scenes_is_a_command_that_is_understood():
    load("ablation")
    scenes = load("scenes")
    for name, flags in scenes.VARIANTS.items():
        run = parse(TokenizerRun, [*flags, *scenes.TOKENIZER], prog="tavq", presets=TOKENIZER_PRESETS)
        assert run.align == name.split(",")[0] and run.model.upsample_channels == ()
    parse(CaptionerRun, [*scenes.CAPTIONER, *scenes.CAPTIONER_SIZE], prog="tavq", presets=CAPTIONER_PRESETS)
    parse(GeneratorRun, ["--long-text", *scenes.GENERATOR_SIZE], prog="tavq", presets=GENERATOR_PRESETS)


@pytest.mark.slow
def test_the_networks_of_the_recipes_teach_and_measure(tmp_path, monkeypatch):
    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path / "cache"))  # where it is noted that both may be loaded
    load("networks").main(["--out", str(tmp_path), "--no-pretrained"])
    perceptual = PerceptualNetwork(tmp_path / "squeezenet_layers.pt")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images.requires_grad_()
    distance = perceptual.distance(perceptual(images), perceptual(images.detach().flip(0)))
    distance.backward()
    assert len(perceptual(images)) == 7 and 0 < distance < 4 and images.grad.norm() > 0
    network = load_network(tmp_path / "mobilenet_v2_features.pt")
    features = extract_features(ImageSet((images.detach() * 127 + 127).byte()), network)
    assert network.name == "mobilenet_v2" and [f.shape for f in features.values()] == [(2, 1280)]


def test_the_pictures_of_the_docs_are_made_anew(tmp_path, tiny_checkpoint):
    pictures = load("pictures")
    pictures.main(["--checkpoint", str(tiny_checkpoint), "--docs", str(tmp_path)])
    size = PRESETS["tiny"].decode_size_px
    assert Image.open(tmp_path / "images" / "prompts.png").size == (4 * (size + 2) - 2, 3 * (size + 2) - 2)
    assert Image.open(tmp_path / "images" / "reconstructions.png").height == 2 * size + 2
    page = (tmp_path / "prompts.md").read_text()
    assert page.count("![") == len(pictures.TWELVE) == len(list((tmp_path / "images" / "prompts").iterdir()))


@pytest.mark.slow
def test_the_plan_of_a_256_px_recipe_builds_every_model_without_values(capsys):
    plan = load("plan")
    plan.main(["coco256", "--gpus", "8"])
    lines = capsys.readouterr().out.splitlines()
    tokenizer, generator, captioner = ([cell.strip() for cell in line.split("|")] for line in lines[2:5])
    assert tokenizer[1:4] == ["tokenizer", "`vqgan256`", "3 x 256 x 256"]
    assert generator[3:5] == ["256 x 1024", "101 M"] and captioner[3].startswith("5 x 21 x ")
    assert "about 2 hours" in lines[-1]

    stages = plan.stages_of(plan.DATASETS["coco256"])
    cost = plan.cost_of(stages[1])
    # A transformer takes 6 numbers' work a parameter and token; attention and the text come on top.
    assert 6 < cost.flops / (cost.parameters * 256) < 9
    wrong = dataclasses.replace(stages[1], shape=lambda count: (count, 1024, 1024))
    with pytest.raises(ValueError, match=r"generator of preset base returns \(2, 256, 1024\)"):
        plan.cost_of(wrong)
    plan.main(["coco256", "--gpus", "4", "--steps"])
    assert [int(word) for word in capsys.readouterr().out.split()] == [194023, 48506, 19402]


STUB = """#!/bin/sh
case "$*" in
    *--steps*) echo 30 20 10 ;;
    *coco_train2014.py*) exit 0 ;;
    *) echo "$@" >> {log} ;;
esac
"""


@pytest.mark.parametrize("name", ["coco256", "cc3m256"])
def test_every_command_of_a_256_px_recipe_is_understood(name, tmp_path):
    stub, log, run = tmp_path / "python", tmp_path / "log", tmp_path / "run"
    stub.write_text(STUB.format(log=log))
    stub.chmod(0o755)
    variables = {
        "PYTHON": stub,
        "RUN": run,
        "DATA": "data",
        "COCO": "coco",
        "TEACHER": "squeezenet_layers.pt",
    }
    variables["VLM"] = "--model any --endpoint http://127.0.0.1:1/v1"
    environment = os.environ | {key: str(value) for key, value in variables.items()}
    command = ["bash", str(ROOT / "recipes" / f"{name}.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in log.read_text().splitlines()]

    started = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/ddp.yaml"]
    assert (ROOT / started[-1]).is_file()
    launched = [line[len(started) :] for line in lines if line[: len(started)] == started]
    assert [line[:4] for line in launched] == [
        ["-m", "tavq", "train", what] for what in ("tokenizer", "generator", "captioner", "captioner")
    ]
    tokenizer = parse(TokenizerRun, launched[0][4:], prog="", presets=TOKENIZER_PRESETS)
    generator = parse(GeneratorRun, launched[1][4:], prog="", presets=GENERATOR_PRESETS)
    captioners = [parse(CaptionerRun, line[4:], prog="", presets=CAPTIONER_PRESETS) for line in launched[2:]]
    trainings = [one.training for one in (tokenizer, generator, *captioners)]
    assert [training.precision for training in trainings] == ["bf16"] * 4
    assert [training.steps for training in trainings[:3]] == [30, 20, 10]
    assert tokenizer.model.image_size_px == 256 and captioners[1].stage == "self-critical"

    commands = {
        line[2] if line[2] != "eval" else f"eval {line[3]}": line for line in lines if line[1] == "tavq"
    }
    parse(DescribeRun, commands["describe"][3:], prog="")
    parse(TokenizeRun, commands["tokenize"][3:], prog="")
    drawn = parse(T2IEvaluation, commands["eval t2i"][4:], prog="")
    assert drawn.limit == 30_000 and drawn.split == "val" and drawn.features is None
    assert drawn.data.endswith("annotations/captions_val2014.json")
    captioned = parse(CaptionEvaluation, commands["eval caption"][4:], prog="")
    assert captioned.split == "test" and "dataset_coco" in captioned.data


def test_what_is_measured_of_coco_is_not_trained_on(tmp_path):
    splits = ("train", "restval", "val", "test")
    images = [{"filename": f"{split}.jpg", "filepath": "val2014", "split": split} for split in splits]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    with pytest.raises(SystemExit):
        load("coco_train2014").main([str(tmp_path)])
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2014.json").touch()
    for folder in ("train2014", "val2014"):
        (tmp_path / folder).mkdir()
    load("coco_train2014").main([str(tmp_path)])
    written = json.loads((tmp_path / "dataset_coco_train2014.json").read_text())
    assert [image["split"] for image in written["images"]] == ["train", "val", "test"]


def test_the_plugin_table_is_made_of_the_results_that_are_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    plugin = load("plugin")
    out = tmp_path / "align.md"
    out.write_text("<!-- plugin: begin -->\n<!-- plugin: end -->\n")
    run = plugin.Plugin(data="shapes", results=tmp_path, out=out)
    for seed, cider in ((0, 0.2), (1, 0.4)):
        scores = {"rFD-x": 100.0 + seed, "t2i_R@10": 0.05, "CIDEr": cider}
        plugin.result_of(run, "taming", "aligned", seed).write_text(json.dumps(scores))
    (row,) = [line for line in plugin.table_of(run).splitlines() if "taming" in line]
    assert row.split("|")[1:4] == [" `taming`, aligned ", " 2 ", " 100.5 (100.0 to 101.0) "]
    assert "| 30.0 (20.0 to 40.0) |" in row


@pytest.mark.parametrize("name", ["diffusers", "vector_quantize_pytorch"])
def test_the_models_of_the_plugin_recipe_fit_their_adapters_and_come_back_from_what_is_saved(
    tmp_path, monkeypatch, name
):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    plugin, models = load("plugin"), load("plugin_models")
    monkeypatch.setenv("PLUGIN_SEED", "3")
    tokenizer = ForeignTokenizer(adapt(getattr(models, name)(), models.SIZE_PX))
    assert tokenizer.grid_size == (8, 8) and tokenizer.num_codes == 512
    tokenizer.adapter.save(tmp_path)
    monkeypatch.setattr(models, "WEIGHTS", str(tmp_path / plugin.SAVED_AS[name]))
    again = ForeignTokenizer(adapt(getattr(models, name)(), models.SIZE_PX))
    assert again.weights_hash == tokenizer.weights_hash
