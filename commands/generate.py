"""tavq generate PROMPT: draw images from text."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from tyro.conf import OmitArgPrefixes, Positional

from tavq.base.arguments import from_dict, parse, run_main
from tavq.base.device import Device, choose_device
from tavq.generator.sampling import SamplingConfig
from tavq.pipeline import CHECKPOINT, Pipeline, RankBy, check_prompts, read_recipe

PROMPTS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class GenerateRun:
    """Draw pictures from text.

    Example: tavq generate "a dog runs on the beach" --num-images 4 --seed 7 --out out/
    """

    prompts: Positional[tuple[str, ...]] = ()
    """What the pictures show."""
    prompts_file: Path | None = None
    """More prompts: .txt (one a line), .csv (column `prompt`) or .jsonl (key `prompt`)."""
    num_images: int = 1
    """Pictures a prompt; picture i has seed + i."""
    seed: int = 0
    """-1 draws one at random and prints it."""
    out: Path = Path("out")
    """Directory of the numbered PNG files and of result.jsonl."""
    best_of: int = 1
    """Candidates a picture, of which the captioner and the alignment choose one."""
    rank_by: RankBy = "sum"
    """What chooses: the captioner's likelihood of the prompt, the alignment score, or their sum."""
    from_png: Path | None = None
    """Draw again what this PNG shows, from the recipe in it; other settings are ignored."""
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/, generator/ and captioner/."""
    device: Device = "auto"
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig()

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}, expected 1 or more")
        if not (self.prompts or self.prompts_file or self.from_png):
            raise ValueError('no prompt; write one, as in: tavq generate "a dog runs on the beach"')


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(GenerateRun, argv, prog="tavq generate")
    jobs, settings, choice, hashes = _recorded(run.from_png) if run.from_png else _asked_for(run)
    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    for part, found in hashes.items():
        here = pipeline.hashes.get(part, "none")
        if found != here:
            raise ValueError(
                f"{run.from_png} was drawn with {part} {found}, {run.checkpoint} holds {here}; "
                "name the --checkpoint that drew it"
            )
    bar = tqdm(total=len(jobs), unit="picture", disable=None)
    for start in range(0, len(jobs), PROMPTS_AT_ONCE):
        prompts, seeds = zip(*jobs[start : start + PROMPTS_AT_ONCE], strict=True)
        for picture in pipeline.generate(prompts, seeds, settings, **choice):
            path = next(free_names(run.out))
            picture.save(path)
            with (run.out / "result.jsonl").open("a") as results:
                results.write(json.dumps({"file": path.name, **picture.recipe}) + "\n")
            bar.update(1)
            bar.write(str(path))
    bar.close()


Jobs = tuple[list[tuple[str, int]], SamplingConfig, dict[str, Any], dict[str, str]]
"""(prompt, seed) of each picture, how to draw, how to choose, hashes of the checkpoints that must draw."""


def _asked_for(run: GenerateRun) -> Jobs:
    prompts = [*run.prompts, *(read_prompts(run.prompts_file) if run.prompts_file else [])]
    check_prompts(prompts)  # all of them before the first picture
    seed = random.SystemRandom().randrange(2**31) if run.seed < 0 else run.seed
    if run.seed < 0:
        print(f"seed {seed}")
    jobs = [(p, seed + i) for p in prompts for i in range(run.num_images)]
    return jobs, run.sampling, {"best_of": run.best_of, "rank_by": run.rank_by}, {}


def _recorded(path: Path) -> Jobs:
    recipe = read_recipe(path)
    if "completed_tokens" in recipe:
        raise ValueError(f"{path} completes a photo, which its recipe does not hold; use tavq complete")
    settings = from_dict(SamplingConfig, recipe["settings"], source=str(path))
    choice = {key: recipe[key] for key in ("best_of", "rank_by") if key in recipe}
    return [(recipe["prompt"], recipe["seed"])], settings, choice, recipe["checkpoints"]


def read_prompts(path: Path) -> list[str]:
    """Prompts of a .txt, .csv or .jsonl file, in order, empty lines left out.

    Raises:
        ValueError: another kind of file, no column or key `prompt`, or no prompt at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file {path}; expected .txt, .csv or .jsonl")
    if path.suffix not in (".txt", ".csv", ".jsonl"):
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}, expected .txt, .csv or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if path.suffix == ".csv":
            lines = [row["prompt"] or "" for row in csv.DictReader(lines)]
        elif path.suffix == ".jsonl":
            lines = [str(json.loads(line)["prompt"]) for line in lines if line.strip()]
    except KeyError as error:
        raise ValueError(f"{path} has no column or key `prompt`; add it") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path} is no {path.suffix} file in UTF-8 ({error}); mend it") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def free_names(folder: Path) -> Iterator[Path]:
    """000000.png, 000001.png, ..., leaving out those that exist."""
    paths = (folder / f"{number:06d}.png" for number in itertools.count())
    return (path for path in paths if not path.exists())
