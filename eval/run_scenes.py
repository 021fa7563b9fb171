"""python eval/run_scenes.py [--checkpoint DIR] [--split test] [--reader FILE]

Measure a checkpoint on generated scenes, whose truth is known.
"""

from __future__ import annotations

from collections.abc import Sequence

from tavq.base.arguments import parse, run_main
from tavq.eval.config import SceneEvaluation


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(SceneEvaluation, argv, prog="tavq eval scenes")

    from tavq.eval.scenes import evaluate_scenes

    evaluate_scenes(run)


if __name__ == "__main__":
    main()
