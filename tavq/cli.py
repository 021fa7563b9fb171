"""The `tavq` command: finds the command that is named and hands the rest of the line over to it.

Heavy libraries are imported by the command that needs them, so that `tavq --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("tavq.commands:generate", "draw pictures from text"),
    "caption": ("tavq.commands:caption", "describe a photo, or a folder of them"),
    "reconstruct": ("tavq.commands:reconstruct", "encode and decode photos"),
    "complete": ("tavq.complete:main", "draw a part of a photo anew, or variations of it"),
    "heatmap": ("tavq.heatmap:main", "show where the words of a text lie on a photo"),
    "demo": ("tavq.app.demo:main", "all of it in the browser"),
    "tokenize": ("tavq.tokenizer.tokenize:main", "turn a data set into ids, to train prior and captioner on"),
    "codebook": ("tavq.tokenizer.codebook:main", "show the codes: patches that use them, words near them"),
    "train tokenizer": ("tavq.tokenizer.train:main", "train the tokenizer, aligned with text or plain"),
    "train decoder": ("tavq.tokenizer.decoder:main", "train a tokenizer's decoder further; its ids stay"),
    "align": ("tavq.tokenizer.align:main", "align anybody's VQ model with text, and report before and after"),
    "train generator": ("tavq.commands:train_generator", "train the prior (text to ids)"),
    "train captioner": ("tavq.commands:train_captioner", "train the captioner (ids to text)"),
    "units": ("tavq.commands:units", "show the words, phrases and sentences of a text"),
    "export": ("tavq.commands:export", "copy a checkpoint for sharing, in half precision"),
    "score": ("tavq.eval.score:main", "score anybody's captions or pictures"),
    "table": ("tavq.eval.table:main", "make the README's tables from result files"),
    "report": ("tavq.eval.report:main", "one page of results, curves and pictures"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `tavq COMMAND ...`; `tavq COMMAND --help` shows the flags of a command, with examples."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for words in (2, 1):
        entry = COMMANDS.get(" ".join(argv[:words]))
        if entry is not None:
            module, function = entry[0].split(":")
            getattr(importlib.import_module(module), function)(argv[words:])
            return
    _parser().parse_args(argv or ["--help"])


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="tavq",
        usage="tavq COMMAND ...",
        description="Text-aligned image tokens: text to image, image to text, and the training of both.",
        epilog=f"commands:\n{listing}\n\ntavq COMMAND --help shows the flags of a command, with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = _unknown  # one line, as for every other mistake
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _unknown(message: str) -> None:
    sys.exit(_complain(message))


def _complain(message: str) -> int:
    print(f"error: {message}; tavq --help lists the commands", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
