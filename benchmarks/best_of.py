"""python benchmarks/best_of.py [--checkpoint DIR] [--judge DIR] [--prompts 100] [--out best_of.md]

What choosing among candidates gains: best of 1, 4 and 16, chosen by the captioner's likelihood of the prompt,
by the alignment score, or by their sum. Each choice is measured by both; with --judge, by a checkpoint that
drew and chose nothing. Without one, a score that chose also measures itself: such cells are in brackets.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tavq.base.arguments import parse, run_main
from tavq.base.weights import CHECKPOINT
from tavq.data.config import default_data
from tavq.data.layouts import open_dataset
from tavq.eval.judge import open_judge
from tavq.generator.config import SamplingConfig
from tavq.pipeline import Pipeline, RankBy, combine_scores
from tavq.tokenizer.retrieval import alignment_scores

RANK = 10


@dataclasses.dataclass(frozen=True)
class BestOf:
    """Measure what choosing among candidates gains."""

    checkpoint: str = CHECKPOINT
    data: str = dataclasses.field(default_factory=default_data)
    """Dataset: a directory in any known layout, hf:OWNER/NAME, `shapes` or `scenes`. By default that of
    TAVQ_DATA."""
    split: str = "val"
    prompts: int = 100
    """The first captions of so many photos."""
    counts: tuple[int, ...] = (1, 4, 16)
    judge: str | None = None
    """Checkpoint with its own tokenizer that measures the chosen pictures."""
    out: Path | None = None
    """File for the table; it is printed anyway."""
    sampling: SamplingConfig = SamplingConfig(draft_tokens=4, micro_batch=4)


def scores_of(judge: Pipeline, ids: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What `judge` thinks of the candidates `ids` (B, C, N) of B prompts, each (B, C): log-likelihood of the
    prompt; its alignment score; whether it is among the ten prompts that the picture is nearest
    to."""
    vectors = judge.alignment_encoder.encode(list(prompts))
    likelihood, alignment, hits = [], [], []
    for row, candidates in enumerate(ids):
        likelihood.append(judge.rank(candidates, prompts[row], "likelihood"))
        all_scores = alignment_scores(judge.tokenizer, candidates, vectors).cpu()
        own = all_scores[:, row : row + 1]
        alignment.append(own[:, 0])
        hits.append(((all_scores > own).sum(1) < RANK).float())
    return {
        "likelihood": torch.stack(likelihood),
        "alignment": torch.stack(alignment),
        "hit": torch.stack(hits),
    }


def chosen(own: dict[str, Tensor], by: RankBy, count: int) -> Tensor:
    """The best of the first `count` candidates of each prompt, as `Pipeline.rank` finds it: indices (B,)."""
    parts = [own[name][:, :count] for name in ("likelihood", "alignment") if by in (name, "sum")]
    return combine_scores(parts).argmax(1) if count > 1 else torch.zeros(len(parts[0]), dtype=torch.int64)


def table(own: dict[str, Tensor], measured: dict[str, Tensor], counts: Sequence[int]) -> str:
    title = f"prompt among the {RANK} nearest of {len(own['hit'])}"
    lines = [f"| chosen by | best of | nats of the prompt | {title} |", "| --- | ---: | ---: | ---: |"]
    for by in get_args(RankBy):
        for count in counts:
            index = chosen(own, by, count)[:, None]
            nats = f"{-float(measured['likelihood'].gather(1, index).mean()):.3f}"
            share = f"{100 * float(measured['hit'].gather(1, index).mean()):.1f} %"
            judged_itself = measured is own and count > 1
            if judged_itself and by != "alignment":
                nats = f"({nats})"
            if judged_itself and by != "likelihood":
                share = f"({share})"
            lines.append(f"| {by} | {count} | {nats} | {share} |")
    return "\n".join(lines)


TEXT = """# Choosing among candidates

Written by `python benchmarks/best_of.py`: {prompts} prompts of the {split} split, {seconds:.2f} s per
candidate. For each prompt, the best of so many images is chosen by the captioner's likelihood of the prompt,
by the alignment score, or by their sum. The result is measured by {measured}.
Fewer nats mean that the captioner finds the prompt more likely.

{table}
"""


@run_main
@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(BestOf, argv, prog="python benchmarks/best_of.py")
    pipeline = Pipeline.from_pretrained(run.checkpoint)
    judge = open_judge(run.judge, pipeline) if run.judge else pipeline
    dataset = open_dataset(run.data, run.split).take(run.prompts)
    prompts = [example.captions[0] for example in dataset.examples]
    began, ids = time.monotonic(), []
    for number, prompt in enumerate(tqdm(prompts, unit="prompt", disable=None)):
        ids.append(pipeline.candidates([prompt], [number], run.sampling, max(run.counts))[0])
    seconds = (time.monotonic() - began) / (len(prompts) * max(run.counts))
    drawn = torch.stack(ids)
    own = scores_of(pipeline, drawn, prompts)
    measured = own
    if judge is not pipeline:
        seen = [judge.encode(pipeline.decode(candidates)) for candidates in drawn]
        measured = scores_of(judge, torch.stack(seen), prompts)
    text = TEXT.format(
        table=table(own, measured, run.counts),
        prompts=len(prompts),
        split=run.split,
        seconds=seconds,
        measured="another checkpoint, which generated and chose nothing"
        if judge is not pipeline
        else "the checkpoint itself, so a score that chose also measures itself (in brackets)",
    )
    print(text)
    if run.out:
        run.out.write_text(text)


if __name__ == "__main__":
    main()
