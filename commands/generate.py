"""tavq generate PROMPT: generate images from text."""

from __future__ import annotations

import collections
import csv
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import OmitArgPrefixes, Positional

from tavq.base.arguments import from_dict, parse, run_main
from tavq.base.device import Device, choose_device
from tavq.base.engine import EngineConfig
from tavq.base.files import atomic_write, check_directory, remove_unfinished
from tavq.base.journal import append_row, read_journal
from tavq.base.locks import only_writer
from tavq.base.progress import Progress
from tavq.base.seeding import RANDOM, image_seeds
from tavq.base.weights import CHECKPOINT, local_directory, part_hashes
from tavq.generator.config import SamplingConfig, check_negative_prompt
from tavq.prompts import check_prompts
from tavq.ranking import RankBy
from tavq.serve.config import check_ray

if TYPE_CHECKING:
    from tavq.pipeline import Pipeline

PROMPTS_AT_ONCE = 16
RESULTS_FILE = "result.jsonl"
PARTS_FOLDER = "parts"
OPTIONS = ("negative_prompt", "best_of", "rank_by")
PROMPT_SUFFIXES = (".txt", ".csv", ".jsonl")


@dataclasses.dataclass(frozen=True)
class GenerateRun:
    """Generate images from text.

    Examples: tavq generate "a dog runs on the beach" --num-images 4 --seed 7 --out out/;  tavq generate
    "in the snow" --image dog.jpg;  tavq generate --unconditional --num-images 4 --out out/
    """

    prompts: Positional[tuple[str, ...]] = ()
    """What the images show."""
    prompts_file: Path | None = None
    """File of more prompts: .txt (one a line), .csv (column `prompt`) or .jsonl (key `prompt`). The same
    command resumes: what --out holds is not generated again."""
    image: tuple[Path, ...] = ()
    """Images that the generated ones shall be like: a subject, or scenes to mix. The prompt may then be left
    out. Needs a lexicon (tavq train lexicon)."""
    image_words: int = 4
    """Words that each image is written in: few keep the gist, many the lay-out."""
    unconditional: bool = False
    """Generate without a prompt, from the learned null text and without guidance."""
    negative_prompt: str | None = None
    """What the images shall not show: guidance leads away from it, in place of the learned null text."""
    num_images: int = 1
    """Images per prompt; image i has seed + i."""
    seed: int = 0
    """Seed of the first image; -1 chooses one at random and prints it."""
    out: Path = Path("out")
    """Directory for the numbered PNG files and result.jsonl."""
    best_of: int = 1
    """Candidates per image, of which the best is kept."""
    rank_by: RankBy = "sum"
    """Score of the candidates: the captioner's likelihood of the prompt, the alignment score, or their
    sum."""
    from_png: Path | None = None
    """Generate the image in this PNG again, from the recipe stored in it. Other settings are ignored."""
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/, generator/ and captioner/."""
    device: Device = "auto"
    """Device to run on."""
    json: bool = False
    """Print one line of JSON for each result, instead of text."""
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig()
    engine: OmitArgPrefixes[EngineConfig] = EngineConfig()

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}, expected 1 or more")
        if self.best_of < 1:
            raise ValueError(f"best_of is {self.best_of}, expected 1 or more")
        check_negative_prompt(self.negative_prompt, self.sampling)
        if self.engine.engine == "ray" and (self.seed == RANDOM or self.from_png):
            raise ValueError(
                "--engine ray takes prompts and a seed, so that a stopped job can go on; give both"
            )
        if self.unconditional:
            if self.prompts or self.prompts_file or self.from_png or self.image:
                raise ValueError("--unconditional takes no prompt; leave out the prompt, or the flag")
        elif not (self.prompts or self.prompts_file or self.from_png or self.image):
            raise ValueError('no prompt; write one, as in: tavq generate "a dog runs on the beach"')


@dataclasses.dataclass(frozen=True)
class Jobs:
    """The images to generate."""

    prompts_and_seeds: list[tuple[str, int]]
    """The prompt is empty in all of them where there is none."""
    sampling: SamplingConfig
    options: dict[str, Any]
    """As `Pipeline.generate` takes them: `negative_prompt`, `best_of`, `rank_by`, `images`, `image_words`."""
    required_hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    """Part of the checkpoint -> hash of its weights, where a recipe names them."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(GenerateRun, argv, prog="tavq generate")

    check_directory(run.out)
    jobs = jobs_of_recipe(run.from_png) if run.from_png else jobs_of_flags(run)
    if run.engine.engine == "ray":
        generate_on_ray(run, jobs)
        return

    from tavq.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    for part, required in jobs.required_hashes.items():
        present = pipeline.hashes.get(part, "none")
        if required != present:
            raise ValueError(
                f"{run.from_png} was generated with {part} {required}, {run.checkpoint} holds {present}; "
                "name the --checkpoint that generated it"
            )

    _ = pipeline.generator  # a bad checkpoint is refused before anything is written
    with only_writer(run.out):
        resumes = run.prompts_file and not run.image  # a recipe does not hold the images it was made from
        read_journal(run.out / RESULTS_FILE)  # cuts off what a killed process left half-written
        left = left_to_do(jobs, run.out, pipeline.hashes) if resumes else jobs.prompts_and_seeds
        generate_into(run, pipeline, jobs, left)


def generate_into(run: GenerateRun, pipeline: Pipeline, jobs: Jobs, left: list[tuple[str, int]]) -> None:
    """Generate the images that are left, and write each as soon as it is there."""
    total = len(jobs.prompts_and_seeds)
    with Progress(total=total, initial=total - len(left), unit="image") as bar:
        for start in range(0, len(left), PROMPTS_AT_ONCE):
            batch = left[start : start + PROMPTS_AT_ONCE]
            prompts = [prompt for prompt, _ in batch]
            seeds = [seed for _, seed in batch]
            prompt = prompts if any(prompts) else None
            for result in pipeline.generate_each(prompt, seeds, jobs.sampling, **jobs.options):
                path = next(free_names(run.out))
                result.save(path)
                append_row(run.out / RESULTS_FILE, {"file": path.name, **result.recipe})
                bar.update(1)
                bar.write(json.dumps({"file": str(path), **result.recipe}) if run.json else str(path))


def left_to_do(jobs: Jobs, out: Path, hashes: Mapping[str, str]) -> list[tuple[str, int]]:
    """Return the prompts and seeds whose images, by these weights and settings, `out` does not hold."""
    rows = read_journal(out / RESULTS_FILE)
    listed = {row["file"] for row in rows}
    for path in sorted(out.glob("[0-9]*.png")):
        if path.name not in listed and (recipe := recipe_in(path)):  # killed before its line was written
            append_row(out / RESULTS_FILE, {"file": path.name, **recipe})
            rows.append({"file": path.name, **recipe})

    settings = json.loads(json.dumps(dataclasses.asdict(jobs.sampling)))  # with lists, as a line has them
    same = {"settings": settings, **jobs.options}
    if jobs.options["best_of"] == 1:
        same["rank_by"] = None
    held: collections.Counter[tuple[str, int]] = collections.Counter()
    for row in rows:
        by_these = all(hashes.get(part) == sha256 for part, sha256 in row["checkpoints"].items())
        alike = by_these and all(row.get(name) == value for name, value in same.items())
        if alike and (out / row["file"]).is_file():
            held[row["prompt"], row["seed"]] += 1

    left = []
    for pair in jobs.prompts_and_seeds:
        if held[pair]:
            held[pair] -= 1  # a prompt that is listed twice is generated twice
        else:
            left.append(pair)
    return left


def recipe_in(path: Path) -> dict[str, Any] | None:
    """The recipe that a generated PNG carries; None for other files."""
    from tavq.results import read_recipe

    try:
        recipe = read_recipe(path)
    except (ValueError, OSError):
        return None
    return recipe if "checkpoints" in recipe and "completed_tokens" not in recipe else None


def generate_on_ray(run: GenerateRun, jobs: Jobs) -> None:
    """Generate the images with the work spread over a Ray cluster; the same command resumes a stopped job."""
    check_ray()
    from tavq.serve.ray_jobs import PartJob, clear_parts
    from tavq.serve.work import open_generator

    checkpoint = local_directory(run.checkpoint).resolve()
    images = {"images": tuple(path.resolve() for path in run.image)} if run.image else {}
    options = tuple(sorted((jobs.options | images).items()))
    files = [f"{number:06d}.png" for number in range(len(jobs.prompts_and_seeds))]
    job = PartJob(
        run.out / PARTS_FOLDER,
        [(file, prompt, seed) for file, (prompt, seed) in zip(files, jobs.prompts_and_seeds, strict=True)],
        PROMPTS_AT_ONCE,
        open_generator,
        (str(checkpoint), run.device, jobs.sampling, options, run.out.resolve()),
        fingerprint=f"generate {jobs.sampling} {options} {part_hashes(checkpoint)}",
    )
    with only_writer(run.out):
        if not job.folder.exists() and any(run.out.glob("*.png")):
            if not left_to_do(jobs, run.out, part_hashes(checkpoint)):
                return
            raise ValueError(f"{run.out} holds other images; name an empty directory with --out")
        lines = [path.read_text(encoding="utf-8") for path in job.run(run.engine)]
        remove_unfinished(run.out)  # by workers that were lost
        with atomic_write(run.out / RESULTS_FILE) as aside:
            aside.write_text("".join(lines), encoding="utf-8")
        clear_parts(job.folder)
    for line in "".join(lines).splitlines():
        recipe = json.loads(line)
        path = run.out / recipe["file"]
        print(json.dumps(recipe | {"file": str(path)}) if run.json else path)


def jobs_of_flags(run: GenerateRun) -> Jobs:
    """Return the images that prompts, seed and number of images ask for."""
    prompts = [*run.prompts, *(read_prompts(run.prompts_file) if run.prompts_file else [])]
    check_prompts(prompts)  # all of them, so that no mistake shows after an hour
    prompts = prompts or [""]  # of --unconditional, or of images alone
    seeds = image_seeds(run.seed, run.num_images)
    if run.seed == RANDOM and not run.json:
        print(f"seed {seeds[0]}")
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    options = {name: getattr(run, name) for name in OPTIONS}
    if run.image:
        options |= {"images": run.image, "image_words": run.image_words}
    return Jobs(pairs, run.sampling, options)


def jobs_of_recipe(path: Path) -> Jobs:
    """Return the image that the recipe in a PNG describes."""
    from tavq.results import read_recipe

    recipe = read_recipe(path)
    absent = {"prompt", "seed", "settings", "checkpoints"} - set(recipe)
    if absent:
        raise ValueError(f"{path} holds a recipe without {', '.join(sorted(absent))}; name another PNG")
    if "image_words" in recipe:
        raise ValueError(f"{path} was generated from images, which its recipe does not hold; use --image")
    if "completed_tokens" in recipe:
        raise ValueError(f"{path} completes an image, which its recipe does not hold; use tavq complete")
    sampling = from_dict(SamplingConfig, recipe["settings"], source=str(path))
    options = {name: recipe[name] for name in OPTIONS if name in recipe}
    return Jobs([(recipe["prompt"], recipe["seed"])], sampling, options, recipe["checkpoints"])


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a .txt, .csv or .jsonl file in order; empty lines are left out.

    Raises:
        ValueError: the file is of another kind, has no column or key `prompt`, or no prompt at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file {path}; expected .txt, .csv or .jsonl")
    if path.suffix not in PROMPT_SUFFIXES:
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
        raise ValueError(f"{path} is no {path.suffix} file in UTF-8 ({error}); correct it") from error

    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def free_names(folder: Path) -> Iterator[Path]:
    """Yield 000000.png, 000001.png, ..., leaving out those that exist."""
    paths = (folder / f"{number:06d}.png" for number in itertools.count())
    return (path for path in paths if not path.exists())
