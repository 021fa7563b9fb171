"""tavq blind TOKENIZER TOKENIZER --data DIR [--split val] [--out blind]

Lay the reconstructions of two tokenizers side by side in random order, so that somebody writes down what they
see before they know which is which. Frechet distances run ahead of the eye.
"""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.eval.config import BlindRun


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    """Run `tavq blind`."""
    run = parse(BlindRun, argv, prog="tavq blind")

    from tavq.eval.blind_sheets import make_sheets

    make_sheets(run)


if __name__ == "__main__":
    main()
