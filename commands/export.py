"""tavq export DIR --out DIR: copy a checkpoint for sharing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from tavq.base.arguments import parse, run_main
from tavq.base.weights import CONFIG_FILE, local_directory


@dataclasses.dataclass(frozen=True)
class ExportRun:
    """Copy a trained checkpoint for sharing, in half precision (the codebook stays in full).

    Rounded weights change a few ids, so tokenize with the exported tokenizer.

    Example: tavq export runs/mine/tokenizer --out checkpoints/mine/tokenizer
    """

    source: Positional[str]
    """Directory or hf:OWNER/NAME of a tokenizer, generator, captioner or lexicon."""
    out: Path
    """Directory for the copy."""
    half: bool = True
    """Store weights as float16. They are loaded as float32 again."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(ExportRun, argv, prog="tavq export")

    from tavq.captioner.model import Captioner
    from tavq.generator.lexicon import Lexicon
    from tavq.generator.model import GeneratorModel
    from tavq.tokenizer.model import TAVQTokenizer
    from tavq.training.checkpoint import read_json

    models = (TAVQTokenizer, GeneratorModel, Captioner, Lexicon)
    directory = local_directory(run.source)
    path = directory / CONFIG_FILE
    kind = read_json(path).get("kind") if path.is_file() else None
    model_class = next((model for model in models if kind in (model.kind, *model.former_kinds)), None)
    if model_class is None:
        raise ValueError(
            f"{directory} holds no tokenizer, generator, captioner or lexicon; name the directory of one"
        )
    model_class.from_pretrained(directory).save_pretrained(run.out, half=run.half)
    print(run.out)
