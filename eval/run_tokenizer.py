"""python eval/run_tokenizer.py [--checkpoint DIR] [--data DIR] [--split test] [--features NETWORK.pt]

Measure a tokenizer: reconstruction (rFID, PSNR, SSIM, spectra), use of the codebook, retrieval by its codes.

Shapes: n images, S image size in px, h w token grid.
"""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.eval.config import TokenizerEvaluation


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(TokenizerEvaluation, argv, prog="tavq eval tokenizer")

    from tavq.eval.reconstruction import evaluate_tokenizer

    evaluate_tokenizer(run)


if __name__ == "__main__":
    main()
