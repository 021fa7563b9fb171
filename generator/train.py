"""tavq train generator --tokens DIR --out DIR [--tokenizer DIR] [--preset tiny|flickr8k|base]

Train the generator on tokenised images and the frozen text encoder's token states of their captions. The same
command resumes a stopped run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from tavq.base.seeding import mixed_seed
from tavq.data.images import grid, to_pil
from tavq.data.text_encoder import TextEncoder
from tavq.data.tokens import TokenMeta, TokenSet, open_tokens
from tavq.training.card import continued
from tavq.training.checkpoint import tensor_hash
from tavq.training.loop import train
from tavq.training.provenance import TokenProvenance
from tavq.training.task import StepOutput, Task, TrainingConfig

from .model import PRESETS, GeneratorConfig, GeneratorModel, GeneratorShape
from .sampling import SamplingConfig, sample
from .text_states import pack_states

EVALUATION_BATCH = 100
PICTURES = 16

Decode = Callable[[Tensor], Tensor]
"""ids (B, h, w) -> images (B, 3, H, W)."""


@dataclasses.dataclass(frozen=True)
class GeneratorRun:
    """Train the generator (text -> ids).

    Example: tavq train generator --tokens runs/tokens --tokenizer runs/tokenizer --out runs/generator
    """

    tokens: Path = Path("runs/tokens")
    """Token set that `tavq tokenize` made."""
    out: Path = Path("runs/generator")
    """Directory of the run; holds the checkpoint, its log and the state to resume from."""
    preset: str = "flickr8k"
    """flickr8k, tiny (seconds on a CPU) or base (about 100 M, 256 tokens)."""
    config: Path | None = None
    """YAML file of these fields, instead of a preset."""
    start: Path | None = None
    """Generator to go on from, such as one of this tokenizer before it was trained further; its shape
    stands."""
    tokenizer: Path | None = None
    """Tokenizer whose codebook the token embeddings start from, and that draws the sample grids."""
    label_smoothing: float = 0.05
    """Share of the target spread over all codes."""
    null_text_rate: float = 0.1
    """Share of captions replaced by the learned null text, for guidance."""
    sampling: SamplingConfig = SamplingConfig()
    """Of the sample grids."""
    model: GeneratorShape = PRESETS["flickr8k"]
    training: TrainingConfig = TrainingConfig(
        steps=1280,
        batch_size=16,
        learning_rate=2e-3,
        warmup_steps=120,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        optimizer="muon",
        ema_decay=0.995,
        evaluate_every=320,
        patience=6,
    )

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "null_text_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 <= {name} < 1")


RUN_PRESETS: dict[str, GeneratorRun] = {
    "flickr8k": GeneratorRun(),
    "tiny": GeneratorRun(
        preset="tiny",
        model=PRESETS["tiny"],
        training=TrainingConfig(
            steps=60, batch_size=8, learning_rate=3e-3, warmup_steps=10, ema_decay=0.9, evaluate_every=30
        ),
    ),
    "base": GeneratorRun(
        preset="base",
        model=PRESETS["base"],
        training=TrainingConfig(
            steps=100_000,
            batch_size=64,
            learning_rate=3e-4,
            warmup_steps=2000,
            evaluate_every=2000,
            patience=10,
        ),
    ),
}


class TokenExamples(Dataset):
    """`self[(index, draw_seed)]` picks one variant and one caption: ids (N,), and the number of a caption."""

    def __init__(self, tokens: TokenSet):
        self.ids_nVN = tokens.ids.flatten(2).long()
        self.counts = [len(captions) for captions in tokens.captions]
        self.first_caption = np.cumsum([0, *self.counts[:-1]]).tolist()

    def __len__(self) -> int:
        return len(self.ids_nVN)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, draw = item
        variant = mixed_seed(draw, 0) % self.ids_nVN.shape[1]
        caption = mixed_seed(draw, 1) % self.counts[index]
        return self.ids_nVN[index, variant], self.first_caption[index] + caption


class GeneratorTrainee(nn.Module):
    """The generator with its loss."""

    def __init__(self, run: GeneratorRun, generator: GeneratorModel):
        super().__init__()
        self.run, self.generator = run, generator

    def forward(self, batch: dict[str, Tensor], step: int) -> StepOutput:
        dropped = torch.rand(len(batch["ids"]), 1, device=batch["mask"].device) < self.run.null_text_rate
        logits = self.generator(batch["ids"], batch["states"], batch["mask"] & ~dropped)
        targets = batch["ids"].flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), targets, label_smoothing=self.run.label_smoothing)
        with torch.no_grad():
            plain = F.cross_entropy(logits.flatten(0, 1), targets)
        return StepOutput(loss, {"loss": loss.detach(), "nats_per_token": plain})


class GeneratorTask(Task):
    """The generator as the training loop sees it; the validation loss decides which weights are kept."""

    name = "generator"
    monitor = ("loss", "min")
    muon_modules = frozenset({"blocks"})

    def __init__(self, run: GeneratorRun, decode: Decode | None = None, codebook: Tensor | None = None):
        earlier = None if run.start is None else GeneratorModel.from_pretrained(run.start)
        if earlier is not None:
            names = [field.name for field in dataclasses.fields(GeneratorShape)]
            run = dataclasses.replace(
                run, model=GeneratorShape(**{n: getattr(earlier.config, n) for n in names})
            )
        self.run, self.decode, self.earlier_card = run, decode, "" if earlier is None else earlier.card
        train_set, self.val_set = (open_tokens(run.tokens, split) for split in ("train", "val"))
        encoder = TextEncoder(run.model.text_encoder)
        self.dataset = TokenExamples(train_set)
        slots = run.model.max_text_tokens
        self.texts = pack_states(encoder, [c for captions in train_set.captions for c in captions], slots)
        self.val_texts = pack_states(encoder, [captions[0] for captions in self.val_set.captions], slots)
        torch.manual_seed(run.training.seed)
        generator = GeneratorModel(_resolved(run, train_set.meta, encoder))
        if codebook is not None:
            generator.check_codebook(tensor_hash(codebook))
            generator.init_weights(codebook)
        if earlier is not None:
            _check_start(run, earlier.config, generator.config)
            generator.load_state_dict(earlier.state_dict())
        self.model = GeneratorTrainee(run, generator)
        self.shipped = generator

    def collate(self, examples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        texts = self.texts.rows([caption for _, caption in examples])
        return {"ids": torch.stack([ids for ids, _ in examples]), "states": texts.states, "mask": texts.mask}

    @torch.inference_mode()
    def evaluate(self, model: GeneratorModel, step: int) -> dict[str, float]:
        """Nats a token on the validation split as it is, with the first caption and with the null text."""
        return {
            "loss": self._nats(model, with_text=True),
            "loss_null_text": self._nats(model, False),
        }

    def _nats(self, generator: GeneratorModel, with_text: bool) -> float:
        ids, total, device = self.val_set.ids[:, 0].flatten(1).long(), 0.0, generator.bos_embedding.device
        for rows in torch.arange(len(ids)).split(EVALUATION_BATCH):
            texts, targets = self.val_texts.rows(rows.tolist()), ids[rows].to(device)
            logits = generator(targets, texts.states.to(device), texts.mask.to(device) & with_text)
            total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        return total / ids.numel()

    def sample_images(self, model: GeneratorModel) -> dict[str, Any]:
        if self.decode is None:
            return {}
        rows = range(min(PICTURES, len(self.val_set)))
        ids = sample(model, self.val_texts.rows(rows), list(rows), self.run.sampling)
        images = self.decode(ids.unflatten(1, model.config.grid_size))
        return {"samples": np.asarray(grid(to_pil(images), columns=8))}

    def save(self, model: GeneratorModel, directory: Path, card: str) -> None:
        model.card = continued(card, self.earlier_card)
        model.save_pretrained(directory)


def _resolved(run: GeneratorRun, meta: TokenMeta, encoder: TextEncoder) -> GeneratorConfig:
    """The configuration of the model with all that data and encoder decide."""
    provenance = TokenProvenance(meta.data, meta.tokenizer)
    return GeneratorConfig.of(
        run.model,
        num_codes=meta.num_codes,
        grid_size=meta.grid_size,
        codebook_hash=meta.codebook_hash,
        text_dim=encoder.token_dim,
        text_encoder_hash=encoder.hash,
        provenance=provenance,
    )


def _check_start(run: GeneratorRun, earlier: GeneratorConfig, wanted: GeneratorConfig) -> None:
    for field in ("num_codes", "grid_size", "text_encoder_hash"):
        if getattr(earlier, field) != getattr(wanted, field):
            raise ValueError(
                f"{run.start} has {field} {getattr(earlier, field)}, {run.tokens} needs "
                f"{getattr(wanted, field)}; train a generator anew, without --start"
            )


def train_generator(run: GeneratorRun, decode: Decode | None = None, codebook: Tensor | None = None) -> None:
    """Train as `run` says.

    Args:
        run: the run.
        decode: ids (B, h, w) -> images, for the sample grids.
        codebook: (K, E) that the token embeddings start from.
    """
    if run.tokenizer is not None and (decode is None or codebook is None):
        raise ValueError(
            f"tokenizer is {run.tokenizer}, but its decoder and codebook were not handed in; "
            "use the command `tavq train generator`"
        )
    task = GeneratorTask(run, decode, codebook)
    train(task, run.training, run.out, task.run)
