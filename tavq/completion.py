"""tavq completion SHELL: print a script that completes commands and flags in your shell."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, subcommand

from tavq.app.demo import DemoRun
from tavq.base.arguments import parse, run_main
from tavq.captioner.config import RUN_PRESETS as CAPTIONER_PRESETS
from tavq.commands.cache import CacheRun
from tavq.commands.caption import CaptionRun
from tavq.commands.complete import CompleteRun
from tavq.commands.export import ExportRun
from tavq.commands.generate import GenerateRun
from tavq.commands.heatmap import HeatmapRun
from tavq.commands.index import IndexRun
from tavq.commands.preferences import PreferenceRun
from tavq.commands.reconstruct import ReconstructRun
from tavq.commands.search import SearchRun
from tavq.commands.serve import ServeRun
from tavq.commands.units import UnitsRun
from tavq.eval.config import (
    BlindRun,
    CaptionEvaluation,
    SceneEvaluation,
    ScoreFaithfulness,
    T2IEvaluation,
    TokenizerEvaluation,
)
from tavq.eval.report import Report
from tavq.eval.score import ScoreCaptions, ScoreImages
from tavq.eval.table import Table
from tavq.generator.config import LEXICON_PRESETS
from tavq.generator.config import RUN_PRESETS as GENERATOR_PRESETS
from tavq.tokenizer.config import RUN_PRESETS as TOKENIZER_PRESETS
from tavq.tokenizer.run_config import (
    DECODER_PRESETS,
    AlignRun,
    CheckRun,
    CodebookRun,
    DescribeRun,
    TokenizeRun,
)


@dataclasses.dataclass(frozen=True)
class CompletionRun:
    """Print a script that completes commands and flags in your shell.

    Example: tavq completion bash > ~/.local/share/bash-completion/completions/tavq
    """

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """The shell."""


FLAGS: dict[str, Any] = {
    "generate": GenerateRun,
    "caption": CaptionRun,
    "reconstruct": ReconstructRun,
    "complete": CompleteRun,
    "heatmap": HeatmapRun,
    "index": IndexRun,
    "search": SearchRun,
    "demo": DemoRun,
    "serve": ServeRun,
    "describe": DescribeRun,
    "check-data": CheckRun,
    "tokenize": TokenizeRun,
    "codebook": CodebookRun,
    "train tokenizer": TOKENIZER_PRESETS,
    "train decoder": DECODER_PRESETS,
    "preferences": PreferenceRun,
    "train generator": GENERATOR_PRESETS,
    "train lexicon": LEXICON_PRESETS,
    "train captioner": CAPTIONER_PRESETS,
    "align": AlignRun,
    "units": UnitsRun,
    "cache": CacheRun,
    "export": ExportRun,
    "eval tokenizer": TokenizerEvaluation,
    "eval t2i": T2IEvaluation,
    "eval caption": CaptionEvaluation,
    "eval scenes": SceneEvaluation,
    "blind": BlindRun,
    "score captions": ScoreCaptions,
    "score images": ScoreImages,
    "score faithfulness": ScoreFaithfulness,
    "table": Table,
    "report": Report,
    "completion": CompletionRun,
}
"""Command -> the dataclass of its flags, or its presets."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CompletionRun, argv, prog="tavq completion")
    tyro.cli(all_commands(), args=["--tyro-write-completion", run.shell, "-"], prog="tavq")


def all_commands() -> Any:
    """Return the type from which tyro makes one parser of all commands: a union for each level of names."""
    first_words = dict.fromkeys(name.split()[0] for name in FLAGS)
    return _union({word: _below(word) for word in first_words})


def _below(word: str) -> Any:
    group = {name.split()[1]: flags for name, flags in FLAGS.items() if name.startswith(f"{word} ")}
    return _union(group) if group else FLAGS[word]


def _union(members: Mapping[str, Any]) -> Any:
    annotated = []
    for name, flags in members.items():
        if isinstance(flags, dict):
            default = next(iter(flags.values()))
            settings = subcommand(name, default=default, prefix_name=False)
            annotated.append(Annotated[type(default), settings])
        else:
            annotated.append(Annotated[flags, subcommand(name, prefix_name=False)])
    return functools.reduce(operator.or_, annotated)
