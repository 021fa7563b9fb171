"""tavq preferences --data DIR --out FILE.jsonl: the best and the worst of several images of each prompt."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from tavq.base.arguments import parse, run_main
from tavq.base.device import Device, choose_device
from tavq.base.files import check_file
from tavq.base.journal import append_row, read_journal
from tavq.base.locks import only_writer
from tavq.base.progress import Progress
from tavq.base.weights import CHECKPOINT
from tavq.data.config import default_data
from tavq.generator.config import SamplingConfig
from tavq.ranking import RankBy


@dataclasses.dataclass(frozen=True)
class PreferenceRun:
    """Generate several images of each training prompt, and write down the best and the worst.

    `tavq train generator --preset flickr8k-preference` learns from them. The captioner's likelihood of the
    prompt and the alignment score decide, as in `tavq generate --best-of`. The same command resumes.

    Example: tavq preferences --data flickr8k/ --out runs/preferences.jsonl
    """

    data: str = dataclasses.field(default_factory=default_data)
    """Dataset: a directory in any known layout, hf:OWNER/NAME, `shapes` or `scenes`. By default that of
    TAVQ_DATA."""
    out: Path = Path("runs/preferences.jsonl")
    """File of JSON lines, one for each prompt."""
    prompts: int = 1000
    """Prompts: a random caption of as many training images."""
    candidates: int = 8
    """Images of each prompt, of which the best and the worst are kept."""
    rank_by: RankBy = "sum"
    """Score of the candidates: the captioner's likelihood of the prompt, the alignment score, or their
    sum."""
    seed: int = 0
    """Seed of the choice of images and captions, and of the candidates."""
    checkpoint: str = CHECKPOINT
    """Directory or hf:OWNER/NAME that holds tokenizer/, generator/ and captioner/."""
    device: Device = "auto"
    """Device to run on."""
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig(micro_batch=8, draft_tokens=1)

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise ValueError(f"candidates is {self.candidates}, expected 2 or more: a best and a worst")
        if self.prompts < 1:
            raise ValueError(f"prompts is {self.prompts}, expected 1 or more")


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(PreferenceRun, argv, prog="tavq preferences")
    check_file(run.out, ".jsonl")

    from tavq.data.layouts import open_dataset
    from tavq.pipeline import Pipeline

    examples = open_dataset(run.data, "train").examples
    rng = random.Random(run.seed)
    chosen = rng.sample(examples, min(run.prompts, len(examples)))
    prompts = [(example.id, rng.choice(example.captions)) for example in chosen]

    pipeline = Pipeline.from_pretrained(run.checkpoint, choose_device(run.device))
    codebook = pipeline.tokenizer.codebook_hash
    with only_writer(run.out):
        done = {row["id"] for row in read_journal(run.out)}
        with Progress(total=len(prompts), initial=len(done), unit="prompt") as bar:
            for number, (image, prompt) in enumerate(prompts):
                if image in done:
                    continue
                # A seed of its own for each prompt, so that a resumed run generates what it would have.
                ids = pipeline.candidates([prompt], [run.seed + number], run.sampling, run.candidates)[0]
                scores = pipeline.rank(ids, prompt, run.rank_by)
                best, worst = int(scores.argmax()), int(scores.argmin())
                row = {"id": image, "prompt": prompt, "codebook": codebook}
                append_row(run.out, row | {"best": ids[best].tolist(), "worst": ids[worst].tolist()})
                bar.update(1)
    print(run.out)
