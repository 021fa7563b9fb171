"""The commands of `tavq` that use the whole chain; each reads its arguments, calls `Pipeline`, and writes
files."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm
from tyro.conf import OmitArgPrefixes, Positional

from tavq.arguments import Device, choose_device, from_dict, parse, run_main
from tavq.captioner.decoding import DecodingConfig
from tavq.captioner.folder import caption_folder
from tavq.captioner.model import Captioner
from tavq.captioner.train import RUN_PRESETS as CAPTIONER_PRESETS
from tavq.captioner.train import CaptionerRun
from tavq.captioner.train import train_captioner as run_captioner_training
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.images import grid, load_image
from tavq.data.tokens import open_tokens, read_meta
from tavq.data.units import split_units
from tavq.generator.model import Prior
from tavq.generator.sampling import SamplingConfig
from tavq.generator.train import RUN_PRESETS as PRIOR_PRESETS
from tavq.generator.train import PriorRun, train_prior
from tavq.pipeline import Pipeline, RankBy, check_prompts, read_recipe
from tavq.tokenizer.heatmaps import check_aligned
from tavq.tokenizer.model import NUM_LEVELS, TAVQTokenizer
from tavq.tokenizer.retrieval import alignment_scores, text_encoder_of
from tavq.training.checkpoint import CONFIG_FILE, local_directory, written_aside

CHECKPOINT = "checkpoints/flickr8k"
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
    """Directory or hub id that holds tokenizer/, generator/ and captioner/."""
    device: Device = "auto"
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig()

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}, expected 1 or more")
        if not (self.prompts or self.prompts_file or self.from_png):
            raise ValueError('no prompt; write one, as in: tavq generate "a dog runs on the beach"')


@run_main
def generate(argv: Sequence[str] | None = None) -> None:
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


@dataclasses.dataclass(frozen=True)
class CaptionRun:
    """Describe photos.

    Example: tavq caption photo.jpg --beam 5 --n-best 3;  tavq caption photos/ --out captions.jsonl
    """

    images: Positional[tuple[Path, ...]]
    """Photos, or one folder of them (then --out is needed; photos already described there are skipped)."""
    out: Path | None = None
    """.jsonl, .json or .csv file, or a directory for .txt side-cars; a folder's captions go there."""
    show_scores: bool = False
    """Print the score of each caption and the probability of each word (a folder's .jsonl or .json file holds
    them)."""
    unsure_below: float = 0.0
    """Mark words less probable than this as [word?], where captions are printed."""
    checkpoint: str = CHECKPOINT
    """Directory or hub id that holds tokenizer/ and captioner/."""
    device: Device = "auto"
    decoding: OmitArgPrefixes[DecodingConfig] = DecodingConfig()


@run_main
def caption(argv: Sequence[str] | None = None) -> None:
    run = parse(CaptionRun, argv, prog="tavq caption")
    if not run.images:
        raise ValueError("no photo; name one, as in: tavq caption photo.jpg")
    missing = [path for path in run.images if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no photo {missing[0]}; check the path")
    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    if any(path.is_dir() for path in run.images):
        if len(run.images) > 1 or run.out is None or run.show_scores or run.unsure_below:
            raise ValueError(
                "a folder is described into a file (.jsonl and .json with the probability of each word): "
                "tavq caption photos/ --out captions.jsonl"
            )
        count = caption_folder(run.images[0], run.out, lambda images: pipeline.caption(images, run.decoding))
        print(f"{count} photos described in {run.out}")
        return
    if run.out is not None:
        raise ValueError("captions of photos are printed; give a folder, or leave out --out")
    for path in run.images:
        for found in pipeline.caption([load_image(path)], run.decoding)[0]:
            text = found.marked(run.unsure_below) if run.unsure_below else found.text
            print(text if len(run.images) == 1 else f"{path}\t{text}")
            if run.show_scores:
                print(
                    f"  {found.score:.3f}  " + "  ".join(f"{w.text} {w.probability:.2f}" for w in found.words)
                )


@dataclasses.dataclass(frozen=True)
class ReconstructRun:
    """Encode and decode photos.

    Example: tavq reconstruct photo.jpg --out out/
    """

    images: Positional[tuple[Path, ...]]
    """Photos."""
    out: Path = Path("out")
    """Directory of NAME.reconstruction.png and sheet.png: the photos above what became of them."""
    checkpoint: str = CHECKPOINT
    """Directory or hub id that holds tokenizer/."""
    device: Device = "auto"


@run_main
def reconstruct(argv: Sequence[str] | None = None) -> None:
    run = parse(ReconstructRun, argv, prog="tavq reconstruct")
    pictures = [load_image(path) for path in run.images]
    if not pictures:
        raise ValueError("no photo; name one, as in: tavq reconstruct photo.jpg")
    twice = [stem for stem, count in Counter(path.stem for path in run.images).items() if count > 1]
    if twice:
        raise ValueError(f"several photos are called {twice[0]}; their reconstructions would share a name")
    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    rebuilt = [result.image for result in pipeline.reconstruct(pictures)]
    for path, image in zip(run.images, rebuilt, strict=True):
        _write_png(image, run.out / f"{path.stem}.reconstruction.png")
    squashed = [picture.resize(image.size) for picture, image in zip(pictures, rebuilt, strict=True)]
    sheet = grid(squashed + rebuilt, columns=len(rebuilt))
    _write_png(
        sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST), run.out / "sheet.png"
    )


def _write_png(image: Image.Image, path: Path) -> None:
    with written_aside(path) as aside:
        image.save(aside, format="PNG")
    print(path)


@dataclasses.dataclass(frozen=True)
class ExportRun:
    """Copy a trained checkpoint for sharing, in half precision (the codebook stays in full).

    Rounded weights change a few ids: tokenize with the exported tokenizer. Example: tavq export
    runs/mine/tokenizer --out checkpoints/mine/tokenizer
    """

    source: Positional[str]
    """Directory or hub id of a tokenizer, prior or captioner."""
    out: Path
    """Directory of the copy."""
    half: bool = True
    """Store float16; loading gives float32 again."""


@run_main
def export(argv: Sequence[str] | None = None) -> None:
    run = parse(ExportRun, argv, prog="tavq export")
    directory = local_directory(run.source)
    kind = (
        json.loads((directory / CONFIG_FILE).read_text()).get("kind")
        if (directory / CONFIG_FILE).is_file()
        else None
    )
    model_class = {c.kind: c for c in (TAVQTokenizer, Prior, Captioner)}.get(kind)
    if model_class is None:
        raise ValueError(
            f"{directory} holds no tokenizer, prior or captioner; name the directory of one of them"
        )
    model_class.from_pretrained(directory).save_pretrained(run.out, half=run.half)
    print(run.out)


@dataclasses.dataclass(frozen=True)
class UnitsRun:
    """Show the words, phrases and sentences that alignment draws from a text.

    Example: tavq units "Two black dogs jump over a fallen log."
    """

    text: Positional[str]
    """The text, or - for standard input."""


@run_main
def units(argv: Sequence[str] | None = None) -> None:
    run = parse(UnitsRun, argv, prog="tavq units")
    text = sys.stdin.read() if run.text == "-" else run.text
    if not text.strip():
        raise ValueError('the text is empty; write one, as in: tavq units "a dog jumps over a log"')
    for kind, found in dataclasses.asdict(split_units(text)).items():
        print(f"{kind}: " + "; ".join(found))


@run_main
def train_generator(argv: Sequence[str] | None = None) -> None:
    run = parse(PriorRun, argv, prog="tavq train generator", presets=PRIOR_PRESETS)
    if run.tokenizer is None:
        train_prior(run)
        return
    tokenizer = TAVQTokenizer.from_pretrained(run.tokenizer)
    train_prior(run, lambda ids: tokenizer.decode(ids.cpu()), tokenizer.codebook)


@run_main
def train_captioner(argv: Sequence[str] | None = None) -> None:
    run = parse(CaptionerRun, argv, prog="tavq train captioner", presets=CAPTIONER_PRESETS)
    if run.tokenizer is None:
        run_captioner_training(run)
        return
    tokenizer = TAVQTokenizer.from_pretrained(run.tokenizer)
    if tokenizer.codebook_hash != read_meta(run.tokens).codebook_hash:
        raise ValueError(f"{run.tokens} was made by another tokenizer than {run.tokenizer}; give that one")
    agreement = caption_agreement(tokenizer, run.tokens) if run.model.quality_buckets else None
    run_captioner_training(run, tokenizer.codebook, agreement)


def caption_agreement(tokenizer: TAVQTokenizer, tokens: Path) -> list[np.ndarray]:
    """The alignment score of each training caption with its image, for noise-aware captioning.

    Raises ValueError for a plain tokenizer.
    """
    check_aligned(tokenizer, NUM_LEVELS)
    cache = EmbeddingCache(text_encoder_of(tokenizer))
    found = open_tokens(tokens, "train")
    vectors = cache.encode([caption for captions in found.captions for caption in captions])
    parts = vectors.split([len(captions) for captions in found.captions])
    return [
        alignment_scores(tokenizer, ids[:1], part)[0].numpy()
        for ids, part in zip(found.ids.long(), parts, strict=True)
    ]
