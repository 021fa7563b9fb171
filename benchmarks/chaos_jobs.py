"""The commands that `chaos.py` kills, and what it means that two outputs are equal."""

from __future__ import annotations

import csv
import dataclasses
import json
import sqlite3
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

TRAINING = (
    "--training.steps 12 --training.evaluate-every 4 --training.log-every 1 --training.checkpoint-minutes 0"
)
TIMES = ("examples_per_s", "seconds", "s_per_image", "images_per_s")
"""What differs between two runs of anything."""

Difference = str
"""What is unlike; "" if nothing is."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One command that resumes."""

    name: str
    arguments: str
    """After `tavq`; {out} is the output, other names in braces are those of `World`."""
    compare: Callable[[Path, Path], Difference]
    suffix: str = ""
    """Of the output; none for a folder."""
    growing: str = ""
    """File of an output folder that grows while the command works; "" for an output that is a file."""


def same_run(whole: Path, killed: Path) -> Difference:
    """Compare weights, optimizer and losses of two training runs, bit by bit."""
    if (whole / "config.json").read_bytes() != (killed / "config.json").read_bytes():
        return "config.json differs"
    for file in [whole / "model.safetensors", *sorted((whole / "training" / "state").glob("*.safetensors"))]:
        name = file.relative_to(whole)
        tensors = (
            {key: tensor.tobytes() for key, tensor in load_file(f).items()} for f in (file, killed / name)
        )
        if difference := unlike(*tensors):
            return f"{name}: {difference}"
    logs = []
    for folder in (whole, killed):
        rows = [json.loads(line) for line in (folder / "training" / "log.jsonl").read_text().splitlines()]
        logs.append([without_times(row) for row in rows])
    return "" if logs[0] == logs[1] else "log.jsonl differs"


def same_tokens(whole: Path, killed: Path) -> Difference:
    """Compare the members of all shards."""
    contents = []
    for folder in (whole, killed):
        members: dict[str, bytes] = {}
        for shard in sorted(folder.glob("*.tar")):
            with tarfile.open(shard) as archive:
                for member in archive:
                    name = f"{shard.name}/{member.name}"
                    if name in members:
                        return f"{name} occurs twice"
                    members[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
        contents.append(members)
    return unlike(*contents)


def same_rows(whole: Path, killed: Path) -> Difference:
    """Compare two files of rows; the order may differ."""
    found = []
    for file in (whole, killed):
        text = file.read_text()
        if file.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        elif file.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines()]
        named: dict[str, Any] = {row.get("id") or row["image"]: row for row in rows}
        if len(named) != len(rows):
            return f"{len(rows) - len(named)} rows are doubled"
        found.append(named)
    return unlike(*found)


def same_texts(whole: Path, killed: Path) -> Difference:
    """Compare two folders of text files."""
    return unlike(
        *({str(f.relative_to(d)): f.read_text() for f in d.rglob("*.txt")} for d in (whole, killed))
    )


def same_images(whole: Path, killed: Path) -> Difference:
    """Compare generated images, which carry their recipe, and the rows that name them."""
    found = []
    for folder in (whole, killed):
        rows = [json.loads(line) for line in (folder / "result.jsonl").read_text().splitlines()]
        if len({row["file"] for row in rows}) != len(rows):
            return "an image is listed twice"
        if {row["file"] for row in rows} != {path.name for path in folder.glob("*.png")}:
            return "files and rows differ"
        recipes = {f"{row['prompt']}, seed {row['seed']}": folder / row["file"] for row in rows}
        if len(recipes) != len(rows):
            return f"{len(rows) - len(recipes)} images are doubled"
        found.append({recipe: file.read_bytes() for recipe, file in recipes.items()})
    return unlike(*found)


def same_index(whole: Path, killed: Path) -> Difference:
    """Compare the ids of all photos, and the vectors."""
    found: list[dict[str, Any]] = []
    for folder in (whole, killed):
        with sqlite3.connect(folder / "photos.sqlite") as database:
            found.append(dict(database.execute("SELECT name, ids FROM photos")))
    difference = unlike(*found)
    if not difference and (whole / "vectors.faiss").read_bytes() != (killed / "vectors.faiss").read_bytes():
        return "vectors.faiss differs"
    return difference


def same_result(whole: Path, killed: Path) -> Difference:
    """Compare the metrics of two result files."""
    return unlike(*(json.loads(path.read_text())["metrics"] for path in (whole, killed)))


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.endswith(TIMES)}


def unlike(whole: dict[str, Any], killed: dict[str, Any]) -> Difference:
    """Name the first thing that is missing, new or different."""
    for what, names in (
        ("is missing", whole.keys() - killed.keys()),
        ("is new", killed.keys() - whole.keys()),
    ):
        if names:
            return f"{min(names)} {what} ({len(names)} in all)"
    differing = sorted(name for name in whole if whole[name] != killed[name])
    return f"{differing[0]} differs ({len(differing)} in all)" if differing else ""


CHECKPOINT = "--checkpoint {checkpoint}"
TOKENIZER = "--tokenizer {checkpoint}/tokenizer"
RUN = f"--out {{out}} {TRAINING}"
LOG = "training/log.jsonl"
JOBS = (
    Job(
        "train tokenizer",
        f"train tokenizer --preset tiny --data {{photos}} --fit-steps 4 {RUN}",
        same_run,
        growing=LOG,
    ),
    Job(
        "train decoder",
        f"train decoder --preset tiny {TOKENIZER} --data {{photos}} {RUN}",
        same_run,
        growing=LOG,
    ),
    Job(
        "train generator",
        f"train generator --preset tiny --tokens {{tokens}} {TOKENIZER} {RUN}",
        same_run,
        growing=LOG,
    ),
    Job(
        "train generator (preference)",
        f"train generator --preset tiny-preference --tokens {{tokens}} {TOKENIZER} "
        f"--start {{checkpoint}}/generator --preferences {{preferences}} {RUN}",
        same_run,
        growing=LOG,
    ),
    Job(
        "train captioner",
        f"train captioner --preset tiny --tokens {{tokens}} {TOKENIZER} {RUN}",
        same_run,
        growing=LOG,
    ),
    Job(
        "train captioner (self-critical)",
        "train captioner --preset tiny-self-critical --tokens {tokens} "
        f"--start {{checkpoint}}/captioner {RUN}",
        same_run,
        growing=LOG,
    ),
    Job(
        "train lexicon",
        f"train lexicon --preset tiny --tokens {{tokens}} --generator {{checkpoint}}/generator {RUN}",
        same_run,
        growing=LOG,
    ),
    Job(
        "tokenize",
        "tokenize --data {photos} --checkpoint {checkpoint}/tokenizer --crops 6 --out {out}",
        same_tokens,
    ),
    Job("caption", f"caption {{photos}} {CHECKPOINT} --out {{out}}", same_rows, ".jsonl"),
    Job("caption (csv)", f"caption {{photos}} {CHECKPOINT} --out {{out}}", same_rows, ".csv"),
    Job("caption (folder)", f"caption {{photos}} {CHECKPOINT} --out {{out}}", same_texts),
    Job(
        "describe",
        "describe --data {photos} --model any --endpoint {endpoint} --requests 2 --device cpu --out {out}",
        same_rows,
        ".jsonl",
    ),
    Job(
        "generate",
        f"generate --prompts-file {{prompts}} {CHECKPOINT} --micro-batch 2 --out {{out}}",
        same_images,
        growing="result.jsonl",
    ),
    Job(
        "preferences",
        f"preferences --data {{photos}} {CHECKPOINT} --prompts 12 --candidates 2 --out {{out}}",
        same_rows,
        ".jsonl",
    ),
    Job("index", f"index {{photos}} {CHECKPOINT} --out {{out}}", same_index, growing="photos.sqlite"),
    Job(
        "eval tokenizer",
        f"eval tokenizer --data {{photos}} {CHECKPOINT} --features {{network}} --out {{out}}",
        same_result,
        ".json",
    ),
    Job(
        "eval caption",
        f"eval caption --data {{photos}} {CHECKPOINT} --backend python --out {{out}}",
        same_result,
        ".json",
    ),
    Job(
        "eval t2i",
        f"eval t2i --data {{photos}} {CHECKPOINT} --features {{network}} --seeds 1 --out {{out}}",
        same_result,
        ".json",
    ),
)
