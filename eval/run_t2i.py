"""python eval/run_t2i.py [--checkpoint DIR] [--data DIR] [--split test] [--features NETWORK.pt]

Generate one image from the first caption of each image of a split, and compare the generated images with the
real ones: FID or FD, KID, precision, recall, IS. Rerunning resumes where a killed run stopped.

Shapes: n images, S image size in px.
"""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.eval.config import T2IEvaluation


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(T2IEvaluation, argv, prog="tavq eval t2i")

    from tavq.eval.t2i import evaluate_generator

    evaluate_generator(run)


if __name__ == "__main__":
    main()
