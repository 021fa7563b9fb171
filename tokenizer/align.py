"""Fine-tune anybody's VQ model so that its codes are aligned with text. First projections are fitted to the
frozen model, which gives the scores "before". Then model and projections are trained together, which gives
the scores "after".
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from tavq.alignment.adapters import Adapter, adapt
from tavq.alignment.projections import TextProjections
from tavq.base.arguments import print_json
from tavq.base.files import atomic_write
from tavq.base.locks import only_writer
from tavq.metrics.features import refuse_training_network
from tavq.training.dry_run import dry_run
from tavq.training.loop import train
from tavq.training.run_folder import read_log

from .adapter import TAVQAdapter
from .fit_projections import fit_projections
from .foreign import DEFAULT_IMAGE_SIZE_PX, open_base
from .losses import open_perceptual
from .model import TAVQTokenizer, TokenizerConfig
from .provenance import ALL_LEVELS
from .run_config import AlignRun
from .train_adapter import HEADS_FILE, AlignData, AlignTask

REPORT_FILE = "report.json"
PROBE_LEARNING_RATE = 2e-3  # higher than in training: the heads are fresh, and the base is frozen

Scores = dict[str, float]


def align_model(run: AlignRun) -> None:
    """Align the model that `run` names, and report before and after."""
    base = open_base(run.base)
    if isinstance(base, TAVQTokenizer):
        probe_own_tokenizer(run, base)
    else:
        align_foreign_model(run, base)


def align_foreign_model(run: AlignRun, base: nn.Module) -> None:
    """Probe a model, train it with the alignment, and report both."""
    image_size_px = DEFAULT_IMAGE_SIZE_PX if run.image_size_px is None else run.image_size_px
    run = dataclasses.replace(run, image_size_px=image_size_px)
    adapter = adapt(base, image_size_px, run.stages)
    data = AlignData(run, image_size_px)
    if run.perceptual is not None and not run.probe_only:
        teacher = open_perceptual(run.perceptual)  # refused before the probe's steps, not after
        if data.network is not None:
            refuse_training_network(data.network, {"perceptual loss": teacher.hash})
    hashes = {"text_encoder": data.text_hash}

    if run.dry_run:
        dry_run(AlignTask(run, adapter, data, frozen=False), run.training, run)
        return

    probe_folder = run.out if run.probe_only else run.out / "before"
    _probe(run, adapter, data, probe_folder)
    stages = {"before": last_scores(probe_folder)}

    # Without scores the probe was stopped; the same command goes on with it.
    if not run.probe_only and stages["before"]:
        task = AlignTask(run, adapter, data, frozen=False)
        task.model.load_heads(load_file(probe_folder / HEADS_FILE))
        train(task, run.training, run.out, run)
        stages["after"] = last_scores(run.out)
        if task.model.perceptual is not None:
            hashes["perceptual"] = task.model.perceptual.hash
    write_report(run, data, stages, hashes)


def _probe(run: AlignRun, adapter: Adapter, data: AlignData, folder: Path) -> None:
    """Fit heads and projections to the frozen base; they are evaluated and saved once, at the end."""
    config = dataclasses.replace(
        run.training,
        steps=run.probe_steps,
        evaluate_every=run.probe_steps,
        learning_rate=PROBE_LEARNING_RATE,
    )
    with frozen(adapter.base):
        train(AlignTask(run, adapter, data, frozen=True), config, folder, run)


def probe_own_tokenizer(run: AlignRun, base: TAVQTokenizer) -> None:
    """Fit the projections of a tokenizer of this project anew, save it with them, and report.

    Its levels need no heads, so the projections are fitted to the ids directly, without the training loop.
    """
    if run.dry_run:
        raise ValueError("--dry-run measures training, and tavq:PATH is only probed; leave it out")
    if not run.probe_only:
        raise ValueError(
            "a tokenizer of this project is aligned by tavq train tokenizer; add --probe-only to fit "
            "projections to its codes as they are"
        )
    image_size_px = base.image_size_px if run.image_size_px is None else run.image_size_px
    run = dataclasses.replace(run, image_size_px=image_size_px)
    adapter = TAVQAdapter(base, image_size_px, run.stages)
    data = AlignData(run, image_size_px)
    config = base.config
    if data.text_dim != config.text_dim:
        raise ValueError(
            f"the codes of {run.base} are projected to {config.text_dim} numbers, {run.text_encoder} gives "
            f"{data.text_dim}; name another --text-encoder"
        )

    # Fresh projections: what an earlier alignment has learnt would make the probe no measure of the codes.
    torch.manual_seed(run.training.seed)
    base.projections = TextProjections(
        base.num_codes, config.code_dim, config.projection_width, config.text_dim
    ).to(base.codebook.device)
    task = AlignTask(run, adapter, data, frozen=True)
    base.config = _probed_config(config, run, data.text_hash)
    fit_projections(
        base,
        data.train_set,
        data.texts,
        base.aligned_levels,
        run.probe_steps,
        run.training.seed,
        per_code_embedding=run.alignment.per_code_embedding,
    )

    with only_writer(run.out):
        task.save(task.model, run.out, base.card)
    scores = task.evaluate(task.model.eval(), run.probe_steps)
    write_report(run, data, {"before": scores}, {"text_encoder": data.text_hash})


def _probed_config(config: TokenizerConfig, run: AlignRun, text_hash: str) -> TokenizerConfig:
    """Return `config` with a record of the probe, by which the tokenizer knows how to score texts."""
    provenance = dataclasses.replace(
        config.provenance,
        probed=True,
        aligned_levels=ALL_LEVELS,
        text_encoder=run.text_encoder,
        text_encoder_hash=text_hash,
    )
    temperature = run.alignment.retrieval_temperature(run.method)
    return dataclasses.replace(config, provenance=provenance, transport_temperature=temperature)


@contextlib.contextmanager
def frozen(base: nn.Module) -> Iterator[None]:
    """Keep gradients from the parameters of `base` inside the block."""
    trainable = [parameter for parameter in base.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def last_scores(folder: Path) -> Scores:
    """Return the last evaluation in the log of a run; empty where the run was stopped before its first."""
    evaluations = [line for line in read_log(folder / "training" / "log.jsonl") if "val/l1" in line]
    if not evaluations:
        return {}
    return {name.removeprefix("val/"): value for name, value in evaluations[-1].items() if name != "step"}


def write_report(run: AlignRun, data: AlignData, stages: dict[str, Scores], hashes: dict[str, str]) -> None:
    """Write report.json, and print the scores of the stages side by side."""
    report = {
        "base": run.base,
        "data": data.train_set.name,
        "split": "val",
        "images": len(data.val_set),
        "hashes": hashes,
        **stages,
    }
    with atomic_write(run.out / REPORT_FILE) as path:
        path.write_text(json.dumps(report, indent=2) + "\n")

    if run.json:
        print_json(report)
        return
    print(f"{'':<12}" + "".join(f"{stage:>10}" for stage in stages))
    for name in next(iter(stages.values())):
        cells = [f"{scores.get(name, float('nan')):>10.4f}" for scores in stages.values()]
        print(f"{name:<12}" + "".join(cells))
