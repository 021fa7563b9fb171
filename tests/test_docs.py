"""The documents tell the truth: their commands and Python run, their flags and files exist, their tables are
fresh.

Each page runs from top to bottom in a folder of its own that looks like a checkout, with some generated
photos and tiny frozen networks. Presets and sizes are replaced by tiny ones.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from tavq.cli import COMMANDS, main
from tavq.data.layouts import open_dataset
from tavq.eval import table

from .conftest import ThreeMaps, save_network

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "checkpoints" / "flickr8k"
README = ROOT / "README.md"
ODD_COMMANDS = ROOT / "docs" / "command-line.md"  # full of flags that do not exist
GUIDES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem != "experiments")
PAGES = [README, ROOT / "CONTRIBUTING.md", *GUIDES]
OUTSIDE = [*PAGES, ROOT / "SECURITY.md", *SHIPPED.rglob("README.md")]
PHOTOS = {"train": 24, "val": 8, "test": 8}
CONTINUED = re.compile(r" *\\\n *")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)

TRAIN_TINY = "--training.steps 4 --training.batch-size 4 --training.evaluate-every 4"
SMALLER = {
    "train tokenizer": f"--preset tiny {TRAIN_TINY} --fit-steps 2",
    "train decoder": f"--preset tiny {TRAIN_TINY}",
    "train generator": f"--preset tiny {TRAIN_TINY}",
    "train captioner": f"--preset tiny {TRAIN_TINY} --min-word-count 1",
    "train lexicon": f"--preset tiny {TRAIN_TINY}",
    "score images": "--kid-subset-size 4",
    "align": f"{TRAIN_TINY} --image-size-px 32 --probe-steps 2 --alignment.samples 8",
    "describe": "--max-tokens 8",
    "preferences": "--prompts 2 --candidates 2",
    "check-data": "--min-side-px 8 --duplicate-similarity 1.0",
    "eval tokenizer": "--limit 6",
    "eval t2i": "--limit 6 --seeds 1",
    "eval caption": "--limit 6",
    "eval/caption_baselines.py": "--limit 6",
    "recipes/networks.py": "--no-pretrained",
}
"""Beginning of a command -> flags that make it small. A flag that the page gives is replaced."""
ELSEWHERE = {
    "make ": "tests/test_install.py",
    "python3.11 install.py ": "tests/test_install.py",
    "bash recipes/flickr8k.sh": "tests/test_recipe.py",
    "bash recipes/coco256.sh": "tests/test_recipe.py",
    "bash recipes/cc3m256.sh": "tests/test_recipe.py",
    "accelerate launch ": "tests/test_processes.py",
    "source .venv/bin/activate": "tests/test_install.py",
    "tavq demo": "tests/test_app.py",
    "tavq serve": "tests/test_serve.py",
    "tavq caption photos/ --out captions.jsonl --engine ray": "tests/test_engine_ray.py",
    "tavq generate --prompts-file prompts.txt --out images/ --engine ray": "tests/test_engine_ray.py",
    "tavq tokenize --data photos/ --out tokens/ --engine ray": "tests/test_engine_ray.py",
    "tavq index photos/ --out photos-index/ --engine ray": "tests/test_engine_ray.py",
    "tavq describe --data photos/ --model vlm/ --engine ray": "tests/test_engine_ray.py",
    "tavq eval tokenizer --data photos/ --engine ray": "tests/test_engine_ray.py",
    "tavq export checkpoints/flickr8k/tokenizer --out programs/": "tests/test_programs.py",
    "tavq export checkpoints/flickr8k/generator --out programs/": "tests/test_programs.py",
    "curl -s http://127.0.0.1:8000/generate": "tests/test_serve.py",
    "tavq describe --endpoint": "tests/test_describe.py",
    "tavq completion": "tests/test_cli.py",
    "from gradio_client": "tests/test_demo_api.py",
    "curl ": "tests/test_demo_api.py",
    "docker build ": "tests/test_deploy.py",
    "python spaces/make_space.py ": "tests/test_deploy.py",
    "python benchmarks/serving.py ": "tests/test_demo_hostile.py",
    "from tavq.alignment": "tests/test_tokenizer_adapters.py",
}
"""Beginning of a command or Python block -> the test file that runs it instead."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One command line, or one Python block, of a page."""

    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """Return what a reader of the page runs, in order; commands in table cells count, too."""
    found = []
    text = page.read_text()
    for match in re.finditer(rf"{FENCE.pattern}|^\|[^|]+\| `(?P<cell>tavq [^`]+)` \|$", text, FENCE.flags):
        if match["cell"]:
            found.append(Block("bash", match["cell"]))
        elif match[1] == "bash":
            lines = CONTINUED.sub(" ", match[2]).splitlines()
            found += [Block("bash", line) for line in lines if shlex.split(line, comments=True)]
        elif match[1] == "python":
            found.append(Block("python", match[2]))
    return found


def elsewhere(block: Block) -> str:
    """Return the test file that runs this block instead; "" where it runs here."""
    command = re.sub(r"^(\w+=\S+ )+", "", block.text)
    return next((test for start, test in ELSEWHERE.items() if command.startswith(start)), "")


RUNNING = [page for page in PAGES if any(not elsewhere(block) for block in blocks_of(page))]


def test_every_page_with_something_to_run_is_found():
    names = {page.name for page in RUNNING}
    assert names >= {"README.md", "index.md", "training.md", "evaluation.md", "align.md", "serving.md"}
    assert len([block for block in blocks_of(README) if block.text.startswith("tavq ")]) == 6, "six tasks"
    tests = {elsewhere(block) for page in PAGES for block in blocks_of(page)} - {""}
    assert all((ROOT / test).is_file() for test in tests)
    used = [block.text for page in PAGES for block in blocks_of(page)]
    assert [start for start in ELSEWHERE if not any(start in text for text in used)] == []


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages presuppose: the files of a checkout, photos, networks, other people's
    output and a diffusers model."""
    for name in ("app", "eval", "recipes", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(SHIPPED, tmp_path / "checkpoints" / "flickr8k")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    write_photos(tmp_path / "photos")
    write_networks(tmp_path / "networks")
    write_foreign_output(tmp_path)
    (tmp_path / "prompts.txt").write_text("a dog runs\n")
    (tmp_path / "table.md").write_text("<!-- results: begin -->\n<!-- results: end -->\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAVQ_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write_photos(folder: Path) -> None:
    for split, count in PHOTOS.items():
        dataset = open_dataset("shapes", split).take(count)
        (folder / split).mkdir(parents=True)
        for number, example in enumerate(dataset.examples):
            dataset.load_image(number).save(folder / split / f"{number:03d}.png")
            (folder / split / f"{number:03d}.txt").write_text("\n".join(example.captions))


def write_networks(folder: Path) -> None:
    folder.mkdir()
    torch.manual_seed(0)
    save_network(ThreeMaps(), folder / "squeezenet_layers.pt")
    example = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    colours = torch.jit.trace(lambda x: x.float().mean(dim=(2, 3)), example)
    save_network(colours, folder / "mobilenet_v2_features.pt")


def write_foreign_output(folder: Path) -> None:
    captions = [{"image_id": number, "caption": "a dog runs"} for number in range(2)]
    (folder / "results.json").write_text(json.dumps(captions))
    annotations = [{"image_id": n, "id": n, "caption": "a dog runs fast"} for n in range(2)]
    (folder / "references.json").write_text(
        json.dumps({"images": [{"id": n} for n in range(2)], "annotations": annotations})
    )
    for name in ("generated", "real", "more-photos"):
        (folder / name).mkdir()
        for number in range(4):
            Image.new("RGB", (32, 32), (40 * number, 90, 10 * len(name))).save(
                folder / name / f"{number}.png"
            )


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.name)
def test_everything_on_the_page_runs(page, checkout, tiny_checkpoint, tiny_vision_language, capsys):
    if page.name == "align.md":
        from .test_tokenizer_adapters import diffusers_model

        diffusers_model().save_pretrained(checkout / "vqgan")
    if page.name == "neighbours.md":
        shutil.copytree(tiny_vision_language, checkout / "vlm")
    if page.name != "training.md":  # which makes it
        shutil.copytree(tiny_checkpoint, checkout / "checkpoints" / "mine")
    names: dict[str, object] = {}
    for block in blocks_of(page):
        if elsewhere(block):
            continue
        if block.language == "python":
            exec(compile(block.text, page.name, "exec"), names)
        else:
            run(block.text)


def run(command: str) -> None:
    """Run one command line, made small."""
    words = [
        path for word in shlex.split(command, comments=True) for path in sorted(glob.glob(word)) or [word]
    ]
    if words[0] == "tavq":
        main(made_small(words[1:]))
    elif words[0] == "python" and words[1].startswith("eval/"):
        module = importlib.import_module(f"tavq.{words[1].removesuffix('.py').replace('/', '.')}")
        module.main(made_small(words[1:])[1:])
    elif words[0] == "python":
        subprocess.run([sys.executable, *made_small(words[1:])], check=True)
    else:
        raise AssertionError(f"no test knows how to run {command!r}; see ELSEWHERE")


def command_of(words: list[str]) -> str:
    """Return the name of the `tavq` command that begins the line."""
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
    assert name, f"no such command: tavq {shlex.join(words)}"
    return name


def made_small(words: list[str]) -> list[str]:
    """Return a command with the flags of `SMALLER` in the place of those of the same names."""
    added = next(
        (f.split() for start, f in SMALLER.items() if words[: len(start.split())] == start.split()), []
    )
    if "flickr8k-self-critical" in words:
        added[added.index("tiny")] = "tiny-self-critical"
    kept = list(words)
    for flag in (word for word in added if word.startswith("--") and word in kept):
        at = kept.index(flag)
        del kept[at : at + 2]
    return kept + added


def commands_in(text: str) -> Iterator[str]:
    """Yield every command with its flags, those in prose included."""
    code = [line for _, block in FENCE.findall(text) for line in CONTINUED.sub(" ", block).splitlines()]
    code += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for line in code:
        line = re.sub(r"^(\w+=\S+ )+|^accelerate launch .* -m ", "", line.strip())
        if line.startswith(("tavq ", "python eval/")) and "COMMAND" not in line:
            yield line


def test_every_flag_exists(capsys):
    shown: dict[str, str] = {}
    pages = {*OUTSIDE, *(ROOT / "docs").glob("*.md")} - {ODD_COMMANDS}
    commands = {command for page in pages for command in commands_in(page.read_text())}
    assert len(commands) > 30
    for command in sorted(commands):
        words = shlex.split(command, comments=True)
        if words[0] == "python":
            name, entry = words[1], f"tavq.{words[1].removesuffix('.py').replace('/', '.')}"
            entry_point, arguments = importlib.import_module(entry).main, []
        elif words[1].startswith("--"):
            continue  # tavq --help
        else:
            name, entry_point = command_of(words[1:]), main
            arguments = name.split()
        if name not in shown:
            with pytest.raises(SystemExit):
                entry_point([*arguments, "--help"])
            shown[name] = capsys.readouterr().out
        for flag in re.findall(r"(?<=\s)(--[a-z][\w.-]*)", command):
            assert flag in shown[name], f"{flag} of {command!r} is no flag of {name}"


def test_what_is_installed_by_hand_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"^make (\w+)|`make (\w+)", text, flags=re.MULTILINE)) and targets
    for fenced, prose in re.findall(r"^make (\w+)|`make (\w+)", text, flags=re.MULTILINE):
        assert (fenced or prose) in targets
    for extras in re.findall(r"install\.py ([\w,]+)", text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("page", OUTSIDE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_linked_is_there(page):
    # CONTRIBUTING.md is shown on the site as well, so it names files instead of linking to them.
    links = re.findall(r"\]\((?!https?:|#|<)([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == [] and page.is_file()


def test_every_test_that_is_named_is_there():
    named = {match for page in PAGES for match in re.findall(r"`(tests/\w+\.py)::(\w+)`", page.read_text())}
    assert len(named) > 20
    for file, test in sorted(named):
        assert re.search(rf"^ *(def|class) {test}\b", (ROOT / file).read_text(), flags=re.MULTILINE), test


def test_every_file_that_is_named_in_code_is_there():
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
    missing = []
    for page in OUTSIDE:
        for name in re.findall(rf"`((?:{folders})/[\w./-]+\.(?:py|md|sh|json|jpg))`", page.read_text()):
            if not (ROOT / name).exists() and not name.startswith("checkpoints/mine"):
                missing.append(f"{page.name}: {name}")
    assert missing == []


@pytest.mark.parametrize(
    ("page", "folders"),
    [
        ("README.md", ["results"]),
        ("docs/results.md", ["results"]),
        ("docs/pair.md", ["results/pair/plain", "results/pair/aligned"]),
        ("checkpoints/flickr8k/README.md", ["results"]),
    ],
)
def test_the_tables_are_made_from_the_results(page, folders):
    results = [path for folder in folders for path in sorted((SHIPPED / folder).glob("*.json"))]
    assert {path.stem for path in results} >= {"tokenizer", "t2i", "caption"}
    table.main([*map(str, results), "--readme", str(ROOT / page), "--check"])


def test_the_readme_is_short_and_says_whose_formulation_this_is():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    prose = " ".join(text.split())
    for sentence in ("our own formulation", "No code of that paper is public", "we quote no number of it"):
        assert sentence in prose
    assert "TA-TiTok" in prose and "TA-Tok," in prose and "are different things" in prose


def test_cards_of_shipped_weights_say_what_the_photos_allow():
    for card in SHIPPED.rglob("README.md"):
        front = card.read_text().split("---\n")[1]
        assert "license: other" in front and "license_name: " in front, card
        assert "research use" in " ".join(card.read_text().split())


def test_the_shipped_weights_are_small_and_in_half_precision():
    weights = list(SHIPPED.glob("*/model.safetensors"))
    assert {path.parent.name for path in weights} == {"tokenizer", "generator", "captioner"}
    assert sum(path.stat().st_size for path in weights) <= 40e6
