"""The `tavq` command: finds the command that is named and hands the rest of the line over to it.

Heavy libraries are imported by the command that needs them, so that `tavq --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "generate": "draw images from text",
    "caption": "describe an image, or a folder of them",
    "reconstruct": "encode and decode images",
    "complete": "draw a part of an image anew, or variations of it",
    "heatmap": "show where the words of a text lie on an image",
    "index": "make a folder of photos searchable",
    "search": "find photos by words, by a photo, or by both",
    "demo": "all of it in the browser",
    "describe": "write long descriptions of a dataset's images, by a vision-language model",
    "check-data": "find captions that fit badly, copies, broken images and other languages in a dataset",
    "tokenize": "turn a dataset into ids, to train generator and captioner on",
    "codebook": "show the codes: patches that use them, words near them",
    "train tokenizer": "train the tokenizer, aligned with text or plain",
    "train decoder": "train a tokenizer's decoder further; its ids stay",
    "train generator": "train the generator (text to ids)",
    "train captioner": "train the captioner (ids to text)",
    "align": "align anybody's VQ model with text, and report before and after",
    "units": "show the words, phrases and sentences of a text",
    "cache": "show what is kept on disk to save time, or clear it",
    "export": "copy a checkpoint for sharing, in half precision",
    "blind": "lay reconstructions by two tokenizers side by side, in secret order",
    "score": "score anybody's captions or images",
    "table": "make the README's tables from result files",
    "report": "one page of results, curves and images",
}
EVALUATION = ("blind", "score", "table", "report")
ROOMS = {"demo": "app"} | dict.fromkeys(EVALUATION, "eval")  # the others lie in commands/


def main(argv: Sequence[str] | None = None) -> None:
    """Run `tavq COMMAND ...`; `tavq COMMAND --help` shows the flags of a command, with examples."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            module = f"tavq.{ROOMS.get(name, 'commands')}.{re.sub('[ -]', '_', name)}"
            importlib.import_module(module).main(argv[words:])
            return
    _parser().parse_args(argv or ["--help"])


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
    parser = _Parser(
        prog="tavq",
        usage="tavq COMMAND ...",
        description="Text-aligned image tokens: text to image, image to text, and the training of both.",
        epilog=f"commands:\n{listing}\n\ntavq COMMAND --help shows the flags of a command, with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says of a mistake one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; tavq --help lists the commands", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
