"""The model card that every training run writes beside its weights."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import yaml

from tavq.data.tokens import read_meta

PHOTO_NOTICE = """\
For weights trained on Flickr8k (Hodosh, Young and Hockenmaier 2013): the photos belong to their Flickr
authors and are for research use. No photo is part of these files; weights trained on them, and the pictures
that they draw, may resemble them."""
TEXT_NOTICE = """
Text vectors come from all-MiniLM-L6-v2 (Apache-2.0), whose own training read Flickr30k captions, which
probably include those of Flickr8k.
"""
PURPOSES = {
    "tokenizer": "Turns a square picture into a grid of ids of one codebook, and back.",
    "generator": "Draws the ids of a picture from a text. Its config names the codebook that it needs.",
    "captioner": "Writes a sentence from the ids of a picture. Its config names the codebook that it needs.",
}


def model_card(
    name: str, resolved: dict[str, Any], lines: list[dict[str, float]], examples: int, seconds: float
) -> str:
    """Markdown with front matter: what the weights are, what they were made from, how, and how well they do.

    Args:
        name: "tokenizer", "generator" or "captioner".
        resolved: configuration of the run, as `config.yaml` holds it.
        lines: of the run's log, for steps and validation metrics.
        examples: seen in training, by all processes together.
        seconds: spent in training and evaluation.
    """
    steps = int(lines[-1]["step"]) if lines else 0
    scores = next((line for line in reversed(lines) if any(name.startswith("val/") for name in line)), {})
    table = "\n".join(f"| {name[4:]} | {value:.4f} |" for name, value in scores.items() if name != "step")
    own = "data" in resolved  # else ids, made of somebody's data
    source = Path(str(resolved["data"])).name if own else read_meta(Path(resolved["tokens"])).data
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    encoder = resolved.get("text_encoder") or resolved.get("model", {}).get("text_encoder")
    read_text = encoder == "minilm" and resolved.get("align") != "none"
    return f"""---
license: apache-2.0
library_name: ta-vq
---
# TA-VQ {name}

{PURPOSES[name]}

Our own formulation of what the abstract of TA-VQ (Liang et al., CVPR 2025, arXiv:2503.01261) states; not the
authors' weights. Not for judging, identifying or depicting real people.

## Data

Trained on the training split of `{source}`.

{PHOTO_NOTICE}
{TEXT_NOTICE if read_text else ""}
## Training

{steps:,} steps, {examples:,} examples, about {seconds / 60:.0f} minutes on {processor} with
{torch.get_num_threads()} thread(s), torch {torch.__version__}. The configuration, as `--config` reads it:

```yaml
{yaml.safe_dump(resolved, sort_keys=False).strip()}
```

## Validation split

| metric | value |
| --- | --- |
{table}
"""


def continued(card: str, earlier: str) -> str:
    """`card` of a run that went on from weights whose card is `earlier` (may be empty)."""
    _, _, body = earlier.partition("\n# ")
    return card + f"\n# What it went on from: {body}" if body else card
