"""python eval/run_caption.py [--checkpoint DIR] [--data DIR] [--split test] [--beam 5]

Caption the images of a split and score the captions: CIDEr, BLEU, METEOR, ROUGE-L, SPICE where it can run.
"""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.eval.config import CaptionEvaluation


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CaptionEvaluation, argv, prog="tavq eval caption")

    from tavq.eval.captioning import evaluate_captioner

    evaluate_captioner(run)


if __name__ == "__main__":
    main()
