"""The `tavq` command: finds the command that is named and hands the rest of the line over to it.

Heavy libraries are imported by the command that needs them, so that `tavq --help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tavq.base.arguments import EntryPoint

COMMANDS = {
    "generate": "draw images from text",
    "caption": "describe an image, or a folder of them",
    "reconstruct": "encode and decode images",
    "complete": "draw a part of an image anew, or variations of it",
    "heatmap": "show where the words of a text lie on an image",
    "index": "make a folder of photos searchable",
    "search": "find photos by words, by a photo, or by both",
    "demo": "all of it in the browser",
    "serve": "answer many clients over HTTP, in batches, on one machine or a cluster",
    "describe": "write long descriptions of a dataset's images, by a vision-language model",
    "check-data": "find captions that fit badly, copies, broken images and other languages in a dataset",
    "tokenize": "turn a dataset into ids, to train generator and captioner on",
    "codebook": "show the codes: patches that use them, words near them",
    "preferences": "generate several images of each prompt, and write down the best and the worst",
    "train tokenizer": "train the tokenizer, aligned with text or plain",
    "train decoder": "train a tokenizer's decoder further; its ids stay",
    "train generator": "train the generator (text to ids)",
    "train captioner": "train the captioner (ids to text)",
    "train lexicon": "train image words, so that the generator draws from images, too",
    "align": "align anybody's VQ model with text, and report before and after",
    "units": "show the words, phrases and sentences of a text",
    "cache": "show what is kept on disk to save time, or clear it",
    "export": "copy a checkpoint for sharing, in half precision",
    "eval tokenizer": "measure reconstruction, use of the codebook and retrieval",
    "eval t2i": "measure generated images against real ones",
    "eval caption": "measure captions against human ones",
    "eval scenes": "measure maps, binding, captions and images on scenes whose truth is known",
    "blind": "lay reconstructions by two tokenizers side by side, in secret order",
    "score captions": "score anybody's captions",
    "score images": "score anybody's images",
    "score faithfulness": "score whether images show what their prompts ask for",
    "table": "print tables of result files, or write them into a page",
    "report": "one page of results, curves and images",
    "completion": "print a script that completes commands and flags in your shell",
}
"""Command -> its purpose."""
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}
MODULES = {
    "demo": "app.demo",
    "eval tokenizer": "eval.run_tokenizer",
    "eval t2i": "eval.run_t2i",
    "eval caption": "eval.run_caption",
    "eval scenes": "eval.run_scenes",
    "blind": "eval.blind",
    "score captions": "eval.score:captions",
    "score images": "eval.score:images",
    "score faithfulness": "eval.score:faithfulness",
    "table": "eval.table",
    "report": "eval.report",
    "completion": "completion",
}
"""Command -> its module, and the function if it is not `main`; the others lie in commands/, named as they are
typed."""
HELP = ("-h", "--help", "help")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `tavq COMMAND ...`; `tavq COMMAND --help` shows the flags of a command, with an example."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(argv)
    except KeyboardInterrupt:  # while the command is imported; `run_main` takes over afterwards
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _run(argv: list[str]) -> None:
    if argv[:1] == ["help"] and len(argv) > 1:
        argv = [*argv[1:], "--help"]
    for count in (2, 1):
        name = " ".join(argv[:count])
        if name in COMMANDS:
            entry_point(name)(argv[count:])
            return

    first = argv[0] if argv else "help"
    if first in HELP:
        print(_overview())
    elif first in ("-V", "--version"):
        print(f"tavq {importlib.metadata.version('ta-vq')}")
    elif first in GROUPS and (len(argv) == 1 or argv[1] in HELP):
        print(_listing([name for name in COMMANDS if name.startswith(f"{first} ")]))
        print(f"\ntavq {first} NAME --help shows the flags, with an example.")
    else:
        _refuse(argv)


def entry_point(name: str) -> EntryPoint:
    """Import a command, and return its function."""
    module, _, function = MODULES.get(name, f"commands.{re.sub('[ -]', '_', name)}").partition(":")
    return getattr(importlib.import_module(f"tavq.{module}"), function or "main")


def _refuse(argv: list[str]) -> None:
    """Name the command that is meant, or where the commands are listed; exit with 2."""
    first = argv[0]
    if first in GROUPS:
        typed = argv[1]
        choices = [name.split()[1] for name in COMMANDS if name.startswith(f"{first} ")]
        way_out = "choose one of: " + ", ".join(choices)
        above = f"{first} "
    else:
        typed = first
        choices = [*COMMANDS, *GROUPS]
        way_out = "tavq --help lists the commands"
        above = ""
    meant = difflib.get_close_matches(typed, choices, n=1, cutoff=0.7)
    if meant:
        way_out = f"did you mean tavq {above}{meant[0]}?"
    kind = "option" if first.startswith("-") else "command"
    print(f"error: there is no {kind} {above + typed!r}; {way_out}", file=sys.stderr)
    sys.exit(2)


def _overview() -> str:
    return (
        "usage: tavq COMMAND ...\n\n"
        "Text-aligned image tokens: text to image, image to text, and the training of both.\n\n"
        f"{_listing(list(COMMANDS))}\n\n"
        "tavq COMMAND --help, or tavq help COMMAND, shows the flags of a command, with an example.\n"
        "tavq --version prints the version. --debug after a command shows the traceback of an error."
    )


def _listing(names: list[str]) -> str:
    width = max(map(len, names))
    return "\n".join(["commands:", *(f"  {name:<{width}}  {COMMANDS[name]}" for name in names)])


if __name__ == "__main__":
    main()
