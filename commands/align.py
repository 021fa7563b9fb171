"""tavq align --base diffusers:PATH --data DIR --out DIR

Fine-tune anybody's VQ model so that its codes are aligned with text. First small heads learn to read the
frozen model: that is "before". Then heads and model train together: that is "after".
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tavq.alignment.adapters import Adapter, adapt
from tavq.alignment.aligner import AlignmentConfig, Method, TextAligner, sample_texts
from tavq.alignment.projections import NUM_LEVELS, TextProjections
from tavq.alignment.unit_index import UnitIndex
from tavq.base.arguments import parse, run_main
from tavq.base.files import atomic_write
from tavq.base.seeding import mixed_seed
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.images import to_uint8
from tavq.data.layouts import open_dataset
from tavq.data.text_encoder import TextEncoder
from tavq.metrics.image import psnr
from tavq.tokenizer.adapter import TAVQAdapter
from tavq.tokenizer.fit_projections import fit_projections
from tavq.tokenizer.health import CodebookWatch
from tavq.tokenizer.heatmaps import PROBED_LEVELS
from tavq.tokenizer.losses import GradientBalance, open_perceptual, random_crop_alike
from tavq.tokenizer.model import TAVQTokenizer, TokenizerConfig
from tavq.tokenizer.retrieval import image_to_text_ranks, recall_at, scores_of_codes, text_to_image_ranks
from tavq.tokenizer.training_images import TrainingImages, image_batches
from tavq.training.loop import train
from tavq.training.run_folder import read_log
from tavq.training.task import StepOutput, Task, TrainingConfig

HEADS_FILE = "heads.safetensors"
REPORT_FILE = "report.json"
RECALLS = (1, 5, 10)
IMAGE_SIZE_PX = 128  # of other bases, where none is named
PROBE_LEARNING_RATE = 2e-3  # of fresh heads on a frozen base


@dataclasses.dataclass(frozen=True)
class AlignLosses:
    """Weights of the losses; that of `align` is a share of the reconstruction's gradient norm."""

    l1: float = 1.0
    perceptual: float = 1.0
    quantizer: float = 1.0
    """Of the base's own codebook and commitment terms."""
    align: float = 0.5


@dataclasses.dataclass(frozen=True)
class AlignRun:
    """Align the codes of anybody's VQ model with text.

    Example: tavq align --base diffusers:vqgan/ --data flickr8k/ --out runs/aligned --image-size-px 256
    """

    base: str
    """diffusers:PATH (a saved VQModel), call:MODULE:FUNCTION, which returns a taming, LlamaGen or
    vector_quantize_pytorch model with its weights, or tavq:PATH (a tokenizer of ours, with --probe-only)."""
    data: str
    """Data set: a directory in any known layout, or `shapes` (generated)."""
    out: Path
    """Directory of the aligned model in the format of its own library, and of report.json."""
    image_size_px: int | None = None
    """Side that the images are squashed to; by default 128, or that of a tokenizer of ours."""
    stages: tuple[str, str] | None = None
    """Submodules of the base that levels 1 and 2 are read from; by default those behind its global
    attention."""
    text_encoder: str = "minilm"
    """minilm, or a directory or hf:OWNER/NAME of a transformers text model."""
    perceptual: str | None = None
    """`lpips`, or the path of a TorchScript network that gives feature maps; without it L1 alone."""
    probe_steps: int = 500
    """Steps in which the heads learn to read the frozen base."""
    probe_only: bool = False
    """Stop there: how well codes that never saw a text can be read. With tavq:PATH, fit the way from codes to
    text anew and save the tokenizer with it."""
    method: Method = "ot"
    """How codes are aligned with text."""
    alignment: AlignmentConfig = AlignmentConfig()
    losses: AlignLosses = AlignLosses()
    training: TrainingConfig = TrainingConfig(
        steps=2000, batch_size=16, learning_rate=1e-4, warmup_steps=100, evaluate_every=500
    )


class AlignTrainer(nn.Module):
    """A base model behind its adapter, with the aligner and the losses that train both."""

    def __init__(self, run: AlignRun, adapter: Adapter, text_dim: int, frozen: bool):
        super().__init__()
        self.run = run
        self.adapter = adapter
        self.frozen = frozen
        # A frozen codebook takes no gradient, so the soft look-up would refuse it.
        lookup = "straight-through" if frozen else run.alignment.lookup
        config = dataclasses.replace(run.alignment, lookup=lookup)
        self.aligner = TextAligner(
            *adapter.codebook.shape, text_dim, config, method=run.method, projections=adapter.projections
        )
        self.perceptual = open_perceptual(run.perceptual) if run.perceptual and not frozen else None
        self.balance = GradientBalance({"align": run.losses.align})

    def train(self, mode: bool = True) -> AlignTrainer:
        super().train(mode)
        if self.frozen:
            self.adapter.base.eval()  # else its codebook might go on adapting
        return self

    def forward(self, batch: dict[str, Any], step: int) -> StepOutput:
        images, losses = batch["image"], self.run.losses
        decoded, captured = self.adapter.reconstruct(images)
        alignment = self.aligner(captured.features, self.adapter.codebook, batch["texts"])
        if self.frozen:
            return StepOutput(alignment.loss, dict(alignment.report))

        report = {"l1": F.l1_loss(decoded, images), "quantizer": captured.quantizer_loss, **alignment.report}
        reconstruction = losses.l1 * report["l1"]
        if self.perceptual is not None:
            cropped, targets = random_crop_alike(decoded, images)
            with torch.no_grad():
                wanted = self.perceptual(targets)
            report["perceptual"] = self.perceptual.distance(self.perceptual(cropped), wanted)
            reconstruction = reconstruction + losses.perceptual * report["perceptual"]
        on = captured.shared_activations
        weighed = self.balance.weigh("align", alignment.loss, reconstruction, on, step)
        report |= self.balance.report()
        loss = reconstruction + losses.quantizer * captured.quantizer_loss + weighed
        return StepOutput(loss, report)

    def heads(self) -> dict[str, Tensor]:
        """The weights beside the base's: what level heads and projections have learnt."""
        parts = {"heads": self.adapter.heads, "projections": self.aligner.projections}
        found = {
            f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()
        }
        return found | {"log_scale": self.aligner.log_scale.detach()}

    def load_heads(self, tensors: dict[str, Tensor]) -> None:
        """Copy what `heads` gave, from another trainee of the same shape."""
        with torch.no_grad():
            for name, tensor in self.heads().items():
                tensor.copy_(tensors[name])


class AlignData:
    """Photos and texts of a data set, read and encoded once for both stages."""

    def __init__(self, run: AlignRun):
        self.train_set, self.val_set = open_dataset(run.data, "train"), open_dataset(run.data, "val")
        self.images = TrainingImages(self.train_set, run.image_size_px)
        encoder = EmbeddingCache(TextEncoder(run.text_encoder))
        self.texts = UnitIndex.build(self.train_set, encoder)
        self.text_dim, self.text_hash = encoder.dim, encoder.hash
        captions = [caption for example in self.val_set.examples for caption in example.captions]
        counts = torch.tensor([len(example.captions) for example in self.val_set.examples])
        self.captions = encoder.encode(captions)
        self.owners = torch.arange(len(counts)).repeat_interleave(counts)
        self.first = counts.cumsum(0) - counts


class AlignTask(Task):
    """One of the two stages as the training loop sees it."""

    name, monitor = "tokenizer", None

    def __init__(self, run: AlignRun, adapter: Adapter, data: AlignData, frozen: bool):
        self.run, self.data, self.dataset = run, data, data.images
        torch.manual_seed(run.training.seed)
        self.model = AlignTrainer(run, adapter, data.text_dim, frozen)
        self.shipped = self.model
        self.codebook_monitor = CodebookWatch()

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(mixed_seed(examples[0]["draw"], len(examples)))
        indices = [example["index"] for example in examples]
        texts = sample_texts(self.data.texts, indices, generator, self.run.alignment)
        return {"image": torch.stack([example["image"] for example in examples]), "texts": texts}

    @torch.inference_mode()
    def evaluate(self, model: AlignTrainer, step: int) -> dict[str, float]:
        """Reconstruction, usage of the codebook, and retrieval through its codes, on the validation split."""
        adapter, device = model.adapter, next(model.parameters()).device
        ids, rows, l1, ratios = [], [], [], []
        sizes = (self.run.image_size_px, adapter.decode_size_px)
        for (images, targets), indices in image_batches(self.data.val_set, *sizes):
            rebuilt, captured = adapter.reconstruct(images.to(device))
            ids.append(captured.ids.cpu())
            rows += indices
            l1.append((rebuilt.cpu() - targets).abs().flatten(1).mean(dim=1))
            ratios.append(torch.from_numpy(psnr(to_uint8(rebuilt.cpu()), to_uint8(targets))))
        all_ids = torch.cat(ids)
        return {
            "l1": float(torch.cat(l1).mean()),
            "PSNR": float(torch.cat(ratios).mean()),
            **self.codebook_monitor.look(all_ids, adapter.codebook, step),
            **self._retrieval(model, all_ids, torch.tensor(rows)),
        }

    def _retrieval(self, model: AlignTrainer, ids: Tensor, rows: Tensor) -> dict[str, float]:
        """The first caption of each photo among the photos, and each photo among all captions."""
        alignment, data = self.run.alignment, self.data
        projections = model.aligner.projections
        projected = projections(model.adapter.codebook, projections.per_code_embedding, NUM_LEVELS)
        projected = F.normalize(projected, dim=-1).cpu()
        scores = scores_of_codes(projected, ids, data.captions, alignment.epsilon + alignment.relaxation)
        place = torch.full((len(data.val_set),), -1)
        place[rows] = torch.arange(len(rows))
        t2i = text_to_image_ranks(scores[:, data.first[rows]], torch.arange(len(rows)))
        i2t = image_to_text_ranks(scores, place[data.owners])
        return {
            f"{way}_R@{k}": recall_at(ranks, k)
            for k in RECALLS
            for way, ranks in (("t2i", t2i), ("i2t", i2t))
        }

    def save(self, model: AlignTrainer, directory: Path, card: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        base = model.adapter.base
        if isinstance(base, TAVQTokenizer):  # its codes stay; what has been learnt is its way to text
            base.card = card
            model.adapter.save(directory)
        elif not model.frozen:
            model.adapter.save(directory)
        with atomic_write(directory / HEADS_FILE) as path:
            save_file({name: t.cpu().contiguous() for name, t in model.heads().items()}, path)

    def probed(self, config: TokenizerConfig) -> TokenizerConfig:
        """`config` of a tokenizer of ours, as it is once its codes can be read."""
        alignment = self.run.alignment
        provenance = config.provenance | {
            "probe": self.run.method,
            "text_encoder": self.run.text_encoder,
            "text_encoder_hash": self.data.text_hash,
        }
        temperature = alignment.epsilon + alignment.relaxation
        return dataclasses.replace(config, provenance=provenance, transport_temperature=temperature)


def open_base(source: str) -> nn.Module:
    """The model that `--base` names.

    Raises:
        ValueError: the kind is unknown, or MODULE:FUNCTION gives no model.
        FileNotFoundError: nothing lies at PATH.
    """
    kind, _, place = source.partition(":")
    if kind == "diffusers" and place:
        return _open_diffusers(place)
    if kind == "tavq" and place:
        return TAVQTokenizer.from_pretrained(place)
    module, _, function = place.rpartition(":")
    if kind != "call" or not module:
        raise ValueError(f"--base is {source!r}, expected diffusers:PATH, tavq:PATH or call:MODULE:FUNCTION")
    try:
        model = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--base {source}: {error}; check that the module lies on PYTHONPATH") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--base {source} returned a {type(model).__name__}, expected a torch module")
    return model


def _open_diffusers(place: str) -> nn.Module:
    try:
        from diffusers import VQModel
    except ImportError as error:
        raise ValueError("--base diffusers:PATH needs the package: pip install diffusers") from error
    try:
        return VQModel.from_pretrained(place)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"no VQModel at {place} ({reason}); give a directory that VQModel.save_pretrained wrote"
        ) from error


@contextlib.contextmanager
def frozen(base: nn.Module) -> Iterator[None]:
    """Keep gradients from the base."""
    moving = [p for p in base.parameters() if p.requires_grad]
    for parameter in moving:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)


def last_scores(folder: Path) -> dict[str, float]:
    """The last evaluation that the log of a run holds; empty where a run was stopped before its first."""
    lines = [line for line in read_log(folder / "training" / "log.jsonl") if "val/l1" in line]
    return {name[4:]: value for name, value in lines[-1].items() if name != "step"} if lines else {}


def print_table(stages: dict[str, dict[str, float]]) -> None:
    print(f"{'':<12}" + "".join(f"{stage:>10}" for stage in stages))
    for name in next(iter(stages.values())):
        print(
            f"{name:<12}" + "".join(f"{scores.get(name, float('nan')):>10.4f}" for scores in stages.values())
        )


def read_own(run: AlignRun, adapter: Adapter, data: AlignData) -> dict[str, float]:
    """Fit a new way from codes to text of a tokenizer of ours, which has no other heads; save and score."""
    base, seed = adapter.base, run.training.seed
    torch.manual_seed(seed)
    base.projections = TextProjections(
        base.num_codes, base.config.code_dim, base.config.projection_width, base.config.text_dim
    ).to(base.codebook.device)
    task = AlignTask(run, adapter, data, frozen=True)
    base.config = task.probed(base.config)
    fit_projections(base, data.train_set, data.texts, PROBED_LEVELS, run.probe_steps, seed)
    task.save(task.model, run.out, base.card)
    return task.evaluate(task.model.eval(), run.probe_steps)


def report(
    run: AlignRun, data: AlignData, stages: dict[str, dict[str, float]], hashes: dict[str, str] | None = None
) -> None:
    """Write report.json and print its table."""
    content = {"base": run.base, "data": data.train_set.name, "split": "val", "images": len(data.val_set)}
    content |= {"hashes": {"text_encoder": data.text_hash} | (hashes or {}), **stages}
    with atomic_write(run.out / REPORT_FILE) as path:
        path.write_text(json.dumps(content, indent=2) + "\n")
    print_table(stages)


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(AlignRun, argv, prog="tavq align")
    base = open_base(run.base)
    own = isinstance(base, TAVQTokenizer)
    if run.image_size_px is None:
        run = dataclasses.replace(run, image_size_px=base.image_size_px if own else IMAGE_SIZE_PX)
    adapter = (TAVQAdapter if own else adapt)(base, run.image_size_px, run.stages)
    if own and not run.probe_only:
        raise ValueError(
            "a tokenizer of ours is aligned by tavq train tokenizer; add --probe-only to learn to read its "
            "codes as they are"
        )
    data, before = AlignData(run), run.out if run.probe_only else run.out / "before"
    if own:
        if data.text_dim != base.config.text_dim:
            raise ValueError(
                f"the codes of {run.base} lead to {base.config.text_dim} numbers, {run.text_encoder} gives "
                f"{data.text_dim}; name another --text-encoder"
            )
        report(run, data, {"before": read_own(run, adapter, data)})
        return
    probe = dataclasses.replace(  # evaluated and saved at its end alone
        run.training,
        steps=run.probe_steps,
        evaluate_every=run.probe_steps,
        learning_rate=PROBE_LEARNING_RATE,
    )
    with frozen(adapter.base):
        train(AlignTask(run, adapter, data, frozen=True), probe, before, run)
    stages, hashes = {"before": last_scores(before)}, {}
    if not run.probe_only and stages["before"]:
        task = AlignTask(run, adapter, data, frozen=False)
        task.model.load_heads(load_file(before / HEADS_FILE))
        train(task, run.training, run.out, run)
        stages["after"] = last_scores(run.out)
        if task.model.perceptual is not None:
            hashes["perceptual"] = task.model.perceptual.hash
    report(run, data, stages, hashes)
