"""tavq export DIR --out DIR: copy a checkpoint for sharing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from tavq.base.arguments import parse, run_main
from tavq.base.files import check_directory
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
    format: Literal["safetensors", "pt2"] = "safetensors"
    """safetensors is a checkpoint. pt2 writes programs of torch.export in float32, for other servers: encoder
    and decoder of a tokenizer, prefill and step of a generator, each for batches of any size."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(ExportRun, argv, prog="tavq export")
    check_directory(run.out)

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
    model = model_class.from_pretrained(directory)
    if run.format == "safetensors":
        model.save_pretrained(run.out, half=run.half)
        print(run.out)
        return

    if not isinstance(model, TAVQTokenizer | GeneratorModel):
        raise ValueError(f"{directory} holds a {kind}; pt2 is for tokenizers and generators")
    from tavq.serve.programs import write_programs

    for path in write_programs(model, run.out):
        print(path)
