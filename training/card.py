"""The model card that every training run writes beside its weights: one page.

Its front matter lists every run that shaped the weights (`training_runs`). A run that starts from finished
weights reads that list from their card and adds one row.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import torch
import yaml

from tavq.base.hub import HUB_PREFIX
from tavq.data.tokens import read_meta

RUNS_KEY = "training_runs"
MINILM = "minilm"
GENERATED = "shapes"
RESEARCH_PHOTOS = {
    "flickr8k": "The photos of Flickr8k (Hodosh, Young and Hockenmaier 2013) belong to their Flickr authors\n"
    "and are for research use.",
    "coco": "The photos of COCO (Lin et al. 2014) belong to their Flickr authors.",
}
"""Beginning of a dataset's name -> whose the photos are."""
RESEARCH_NOTICE = """\
These files contain no photo, but generated images may resemble the photos. Use the weights for research."""
OTHER_NOTICE = """\
The rights in the training images decide how these weights may be used. Check them before you share the
weights, and put a licence into the front matter of this card."""
TEXT_NOTICE = """\
Text vectors come from all-MiniLM-L6-v2 (Apache-2.0). Its training data include Flickr30k captions, and
probably those of Flickr8k."""
PURPOSES = {
    "tokenizer": "Encodes a square image as a grid of ids of one codebook, and decodes the ids.",
    "generator": "Generates the ids of an image from a text. `config.json` names the codebook it needs.",
    "lexicon": "Writes the ids of an image as words for a generator, which `config.json` names.",
    "captioner": "Writes a sentence from the ids of an image. `config.json` names the codebook it needs.",
}
_LOCAL_FIELDS = ("out", "config")  # folders and files of one machine
_FORMER_DATA = re.compile(r"Trained on the training split of `(.+?)`")
_FORMER_RUN = re.compile(r"([\d,]+) steps, ([\d,]+) examples")


def model_card(
    name: str,
    resolved: dict[str, Any],
    lines: list[dict[str, float]],
    examples: int,
    seconds: float,
    earlier: str = "",
) -> str:
    """Return Markdown with front matter: what the weights are, what shaped them, and how well they do.

    Args:
        name: "tokenizer", "generator", "captioner" or "lexicon".
        resolved: configuration of the run, as `config.yaml` holds it.
        lines: of the run's log, for steps and validation metrics.
        examples: seen in training, by all processes together.
        seconds: spent in training and evaluation.
        earlier: card of the weights that the run started from; "" where it started from scratch.
    """
    run = {
        "stage": _stage(name, resolved),
        "data": ", ".join(_sources(resolved)),
        "steps": int(lines[-1]["step"]) if lines else 0,
        "examples": examples,
        "minutes": round(seconds / 60),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "networks": _networks(resolved),
    }
    runs = [*earlier_runs(earlier), run]
    sources = list(dict.fromkeys(source for row in runs for source in row["data"].split(", ")))
    licence, notice = _licence(sources)
    front = {**licence, "library_name": "ta-vq", "datasets": sources, RUNS_KEY: runs}

    scores = next((line for line in reversed(lines) if any(key.startswith("val/") for key in line)), {})
    metrics = "\n".join(f"| {key[4:]} | {value:.4f} |" for key, value in scores.items() if key != "step")
    texts = f"\n{TEXT_NOTICE}\n" if any(MINILM in row.get("networks", ()) for row in runs) else ""
    return f"""---
{_yaml(front)}
---
# TA-VQ {name}

{PURPOSES[name]}

These weights come from our own formulation of the abstract of TA-VQ (Liang et al., CVPR 2025,
arXiv:2503.01261). They are not the authors' weights. Do not use them to judge, identify or depict real
people.

## Data and licence

Trained on the training split of {", ".join(sources)}.
{notice}{texts}
## Scores on the validation split

| metric | value |
| --- | ---: |
{metrics}

## Training

{_runs_table(runs)}

<details><summary>Configuration of the last run</summary>

```yaml
{_yaml(_without_paths(resolved))}
```

</details>
"""


def earlier_runs(card: str) -> list[dict[str, Any]]:
    """Return the runs that `card` lists, the first one first; [] for "".

    Cards of version 0.1 hold no list. Each run has a section of its own there, the last run first.
    """
    _, begin, rest = card.partition("---\n")
    front, end, body = rest.partition("---\n")
    if not begin or not end:
        return []
    values = yaml.safe_load(front)
    if isinstance(values, dict) and isinstance(values.get(RUNS_KEY), list):
        return values[RUNS_KEY]
    former = zip(_FORMER_DATA.findall(body), _FORMER_RUN.findall(body), strict=False)
    runs = [
        {"stage": "earlier", "data": data, "steps": _number(steps), "examples": _number(examples)}
        for data, (steps, examples) in former
    ]
    return runs[::-1]


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def _stage(name: str, resolved: dict[str, Any]) -> str:
    """Return the word for what the run trained."""
    if name == "tokenizer" and "tokenizer" in resolved:
        return "decoder alone"
    return str(resolved.get("stage", name))


def _sources(resolved: dict[str, Any]) -> list[str]:
    """Return the names of the datasets of a run: those of its images, or those that its tokens come from."""
    if "data" not in resolved:
        return [read_meta(Path(resolved["tokens"])).data]
    return [_dataset_name(folder) for folder in (resolved["data"], *resolved.get("images", ()))]


def _dataset_name(folder: str) -> str:
    if folder.startswith("hf:"):  # without revision and options
        folder = folder.partition("?")[0].partition("@")[0]
    path = Path(folder)
    return path.parent.name if path.name.lower() == "images" and path.parent.name else path.name


def _licence(sources: list[str]) -> tuple[dict[str, str], str]:
    """Return the licence fields of the front matter, and the notice that goes with them."""
    owners = [
        owner
        for name, owner in RESEARCH_PHOTOS.items()
        if any(source.lower().startswith(name) for source in sources)
    ]
    if owners:
        notice = "\n".join([*owners, RESEARCH_NOTICE])
        return {"license": "other", "license_name": "research-only-training-photos"}, f"{notice}\n"
    if set(sources) == {GENERATED}:
        return {"license": "apache-2.0"}, ""
    return {"license": "other", "license_name": "as-the-training-images"}, f"{OTHER_NOTICE}\n"


def _networks(resolved: dict[str, Any]) -> list[str]:
    """Return the names of the frozen networks that taught the run or gave it text vectors."""
    networks = [resolved.get("perceptual"), resolved.get("distill")]
    if resolved.get("align") != "none":
        networks += [resolved.get("text_encoder"), resolved.get("model", {}).get("text_encoder")]
    return list(dict.fromkeys(_without_paths(network) for network in networks if network))


def _runs_table(runs: list[dict[str, Any]]) -> str:
    """Return the runs as Markdown, the last one last."""
    rows = [
        f"| {run['stage']} | {run['data']} | {run['steps']:,} | {run['examples']:,} "
        f"| {run.get('minutes', '')} | {run.get('device', '')} | {', '.join(run.get('networks', ()))} |"
        for run in runs
    ]
    head = "| run | data | steps | examples | minutes | device | frozen networks |"
    return "\n".join([head, "|" + " --- |" * 7, *rows])


def _without_paths(value: Any) -> Any:
    """Return a configuration whose paths are shortened to their last part."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if key not in _LOCAL_FIELDS}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and not value.startswith(HUB_PREFIX):
        return Path(value).name
    return value


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100).strip()
