"""tavq train tokenizer --data DIR --out DIR [--preset tiny|flickr8k|vqgan256] [--align ot|gaussian|none]

Train the TA-VQ tokenizer: reconstruction, perceptual and adversarial losses, alignment with text at three
levels, and, with --distill, the maps of a frozen vision network. The same command resumes a stopped run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from tavq.arguments import parse, run_main
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.examples import ImageTextDataset, readable_images
from tavq.data.images import UnreadableImageError, grid, to_pil, to_tensor
from tavq.data.layouts import open_dataset
from tavq.data.text_encoder import TextEncoder
from tavq.data.text_index import UnitIndex
from tavq.training.loop import StepOutput, Task, TrainingConfig, train
from tavq.training.stream import mixed_seed

from .alignment import LEVEL_NAMES, AlignmentConfig, TextAligner, TextBank, TextUnits
from .distillation import DistillationHead, teacher_maps
from .losses import FrozenNetwork, GradientBalance, PatchDiscriminator, hinge_loss, open_perceptual
from .model import PRESETS, TAVQTokenizer, TokenizerConfig
from .retrieval import alignment_scores, recall_at, text_to_image_ranks

EVALUATION_BATCH = 50
PICTURES = 16


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses. Those of `align`, `distill` and `adversarial` are shares of the reconstruction's
    gradient
    norm, not factors (see GradientBalance)."""

    l1: float = 1.0
    perceptual: float = 1.0
    quantizer: float = 1.0
    align: float = 0.5
    distill: float = 0.5
    adversarial: float = 0.3
    adversarial_from: float = 0.6
    """Share of the steps after which the discriminator joins; an early one ruins the reconstruction."""


@dataclasses.dataclass(frozen=True)
class TokenizerRun:
    """Train the TA-VQ tokenizer (image <-> ids, aligned with text).

    Example: tavq train tokenizer --data flickr8k/ --out runs/mine/tokenizer --perceptual squeezenet_layers.pt
    """

    data: str = "shapes"
    """Data set: a directory in any known layout, or `shapes` (generated)."""
    out: Path = Path("runs/tokenizer")
    """Directory of the run; holds the checkpoint, its log and the state to resume from."""
    preset: str = "flickr8k"
    """flickr8k, tiny (seconds on a CPU) or vqgan256 (256 px, f16, the setting of LG-VQ)."""
    config: Path | None = None
    """YAML file of these fields, instead of a preset."""
    align: Literal["ot", "gaussian", "none"] = "ot"
    """How codes are aligned with text; `none` is the plain VQ baseline."""
    perceptual: str | None = None
    """`lpips`, or the path of a TorchScript network that gives feature maps; without it L1 alone."""
    distill: Path | None = None
    """TorchScript vision network whose last map the latents learn to predict."""
    text_encoder: str = "minilm"
    """minilm, or a directory or hub id of a transformers text model."""
    model: TokenizerConfig = PRESETS["flickr8k"]
    alignment: AlignmentConfig = AlignmentConfig()
    losses: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig(
        steps=6000, batch_size=32, learning_rate=4e-4, warmup_steps=200, betas=(0.9, 0.95), ema_decay=0.998
    )

    def __post_init__(self) -> None:
        if self.align != "none" and self.model.quantizer.name == "fsq":
            raise ValueError(
                "fsq has no learned codebook to align; add --align none, or choose another quantizer"
            )


RUN_PRESETS: dict[str, TokenizerRun] = {
    "flickr8k": TokenizerRun(),
    "tiny": TokenizerRun(
        preset="tiny",
        model=PRESETS["tiny"],
        alignment=AlignmentConfig(samples=16, bank_size=32),
        training=TrainingConfig(
            steps=60, batch_size=8, learning_rate=2e-3, warmup_steps=10, ema_decay=0.9, evaluate_every=60
        ),
    ),
    "vqgan256": TokenizerRun(
        preset="vqgan256",
        model=PRESETS["vqgan256"],
        training=TrainingConfig(
            steps=100_000, batch_size=16, learning_rate=1e-4, warmup_steps=2000, evaluate_every=5000
        ),
    ),
}


def perplexity(use: Tensor) -> Tensor:
    """How many codes would be in use if all were used alike: use (K,), counts or a running mean -> scalar in
    [1, K]."""
    shares = use / use.sum()
    return torch.exp(-torch.special.xlogy(shares, shares).sum())


class TrainingImages(Dataset):
    """Photos as the tokenizer trains on them: squashed to the square, flipped half of the time.

    `self[(index, draw_seed)]` gives a dict with `image` (3, H, W), `index`, `flipped` and `draw`. An image
    that cannot be read is named once, and the next one takes its place.
    """

    def __init__(self, dataset: ImageTextDataset, size_px: int):
        self.dataset, self.size_px = dataset, size_px
        self.unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        index, draw = item
        image = self._read(index)
        while image is None:
            index = (index + 1) % len(self.dataset)
            image = self._read(index)
        flipped = draw % 2 == 1
        return {
            "image": image.flip(-1) if flipped else image,
            "index": index,
            "flipped": flipped,
            "draw": draw,
        }

    def _read(self, index: int) -> Tensor | None:
        if index in self.unreadable:
            return None
        try:
            return to_tensor(self.dataset.load_image(index), self.size_px)
        except UnreadableImageError as error:
            self.unreadable.add(index)
            print(f"warning: skipped {self.dataset[index].id}: {error}", flush=True)
            if len(self.unreadable) > max(1, len(self.dataset) // 100):
                raise ValueError(
                    f"{len(self.unreadable)} images cannot be read; repair {self.dataset.name}"
                ) from error
            return None


class TokenizerTrainee(nn.Module):
    """Tokenizer, aligner and distillation head with the losses that train them."""

    def __init__(self, run: TokenizerRun, tokenizer: TAVQTokenizer, teacher_dim: int | None):
        super().__init__()
        self.run, self.tokenizer = run, tokenizer
        code_dim = run.model.code_dim
        self.aligner = None
        if run.align != "none":
            config = dataclasses.replace(run.alignment, method=run.align)
            self.aligner = TextAligner(
                config, code_dim, run.model.text_dim, projections=tokenizer.projections
            )
        else:
            tokenizer.projections.requires_grad_(False)
        self.head = DistillationHead(code_dim, teacher_dim) if teacher_dim else None
        self.perceptual = open_perceptual(run.perceptual) if run.perceptual else None
        shares = {
            "align": run.losses.align,
            "distill": run.losses.distill,
            "adversarial": run.losses.adversarial,
        }
        self.balance = GradientBalance(shares)
        self.adversarial_from = round(run.losses.adversarial_from * run.training.steps)
        self.critic: tuple[nn.Module, ...] = ()  # in a tuple: it is no part of this module

    def forward(self, batch: dict[str, Tensor], step: int) -> StepOutput:
        images, losses = batch["image"], self.run.losses
        encoded = self.tokenizer(images)
        report: dict[str, Tensor | float] = {"l1": F.l1_loss(encoded.images, images)}
        reconstruction = losses.l1 * report["l1"]
        if self.perceptual is not None:
            report["perceptual"] = self.perceptual.distance(encoded.images, images)
            reconstruction = reconstruction + losses.perceptual * report["perceptual"]
        report["quantizer"] = encoded.quantizer_loss
        loss = reconstruction + losses.quantizer * encoded.quantizer_loss
        if self.aligner is not None:
            loss = loss + self._alignment(batch, encoded.latents, reconstruction, report, step)
        if self.head is not None:
            report["distill"] = self.head(encoded.latents[-1], batch["teacher"])
            on = (encoded.latents[-1],)
            loss = loss + self.balance.weigh("distill", report["distill"], reconstruction, on, step)
        if losses.adversarial and step >= self.adversarial_from:
            report["adversarial"] = self._adversarial(encoded.images)
            on = (self.tokenizer.decoder.last.weight,)
            loss = loss + self.balance.weigh("adversarial", report["adversarial"], reconstruction, on, step)
        report |= {name: value for name, value in self.balance.report().items() if not value.isnan()}
        report["perplexity"] = perplexity(self.tokenizer.quantizer.usage)
        return StepOutput(loss, report, for_critic=(images, encoded.images.detach()))

    def _alignment(
        self,
        batch: dict[str, Any],
        latents: tuple[Tensor, ...],
        reconstruction: Tensor,
        report: dict[str, Tensor | float],
        step: int,
    ) -> Tensor:
        quantizer = self.tokenizer.quantizer
        features = [quantizer.normalise(level.movedim(1, -1)).movedim(-1, 1) for level in latents]
        texts = [TextUnits(*pair) for pair in batch["texts"]]
        banks = [TextBank(*pair) for pair in batch["banks"]]
        alignment = self.aligner(features, quantizer.codebook, texts, banks)
        report |= alignment.report
        return self.balance.weigh("align", alignment.loss, reconstruction, latents, step)

    def _adversarial(self, images: Tensor) -> Tensor:
        """Hinge loss of the decoder; the critic's own parameters take no gradient from it."""
        critic = self.critic[0].requires_grad_(False)
        loss = -critic.discriminator(images).mean()
        critic.requires_grad_(True)
        return loss


class Critic(nn.Module):
    """The patch discriminator as the loop's second player; idle before its start."""

    def __init__(self, first_step: int):
        super().__init__()
        self.discriminator, self.first_step = PatchDiscriminator(), first_step

    def forward(self, images: tuple[Tensor, Tensor], step: int) -> StepOutput:
        real, fake = images
        if step < self.first_step:
            return StepOutput(self.discriminator.layers[0].bias.sum() * 0.0, {})
        real_logits, fake_logits = self.discriminator(torch.cat([real, fake])).chunk(2)
        loss = hinge_loss(real_logits, fake_logits)
        return StepOutput(loss, {"critic/loss": loss, "critic/real": real_logits.mean()})


class TokenizerTask(Task):
    """The tokenizer as the training loop sees it."""

    name = "tokenizer"
    watch = None  # with a discriminator that joins late, the last weights are the best ones

    def __init__(self, run: TokenizerRun):
        self.run = run
        self.train_set = open_dataset(run.data, "train")
        self.val_set = open_dataset(run.data, "val")
        self.dataset = TrainingImages(self.train_set, run.model.image_size_px)
        self.texts = self.maps = None
        provenance = {"align": run.align, "data": self.train_set.name}
        if run.align != "none":
            cache = EmbeddingCache(TextEncoder(run.text_encoder))
            self.texts = UnitIndex.build(self.train_set, cache)
            self.val_captions = cache.encode([example.captions[0] for example in self.val_set.examples])
            provenance |= {"text_encoder": run.text_encoder, "text_encoder_hash": cache.hash}
        if run.distill is not None:
            teacher = FrozenNetwork(run.distill)
            self.maps = teacher_maps(teacher, self.train_set, run.model.grid_size)
            provenance["distilled_from"] = teacher.hash
        torch.manual_seed(run.training.seed)
        temperature = run.alignment.epsilon + run.alignment.relaxation
        config = dataclasses.replace(run.model, provenance=provenance, transport_temperature=temperature)
        tokenizer = TAVQTokenizer(config)
        self.model = TokenizerTrainee(run, tokenizer, None if self.maps is None else self.maps.shape[1])
        if self.model.perceptual is not None:
            provenance["perceptual"] = self.model.perceptual.hash
        self.critic = Critic(self.model.adversarial_from) if run.losses.adversarial else None
        self.model.critic = (self.critic,)

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        indices = [example["index"] for example in examples]
        batch: dict[str, Any] = {"image": torch.stack([example["image"] for example in examples])}
        if self.texts is not None:
            generator = torch.Generator().manual_seed(mixed_seed(examples[0]["draw"], len(examples)))
            batch |= self._text_batch(indices, generator)
        if self.maps is not None:
            maps = [
                self.maps[e["index"]].flip(-1) if e["flipped"] else self.maps[e["index"]] for e in examples
            ]
            batch["teacher"] = torch.stack(maps)
        return batch

    def _text_batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        config, levels = self.run.alignment, range(1, len(LEVEL_NAMES) + 1)
        return {
            "texts": [self.texts.batch(indices, level, generator, config.max_units) for level in levels],
            "banks": [self.texts.bank(indices, level, generator, config.bank_size) for level in levels],
        }

    @torch.inference_mode()
    def evaluate(self, model: TokenizerTrainee, step: int) -> dict[str, float]:
        """Reconstruction, codebook usage and text-to-image recall at 10 on the validation split."""
        device = next(model.parameters()).device
        tokenizer, size = model.tokenizer, self.run.model.image_size_px
        ids, rows, l1, perceptual = [], [], [], []
        for images, indices in _batches(self.val_set, size):
            images = images.to(device)
            encoded = tokenizer(images)
            ids.append(encoded.ids)
            rows += indices
            l1.append(F.l1_loss(encoded.images, images) * len(images))
            if model.perceptual is not None:
                perceptual.append(model.perceptual.distance(encoded.images, images) * len(images))
        all_ids = torch.cat(ids)
        counts = torch.bincount(all_ids.flatten(), minlength=tokenizer.num_codes)
        metrics = {
            "l1": float(sum(l1)) / len(all_ids),
            "usage": float((counts > 0).float().mean()),
            "perplexity": float(perplexity(counts)),
        }
        if perceptual:
            metrics["perceptual"] = float(sum(perceptual)) / len(all_ids)
        if self.texts is not None:
            captions = self.val_captions[rows].to(device)
            scores = alignment_scores(tokenizer, all_ids, captions)
            ranks = text_to_image_ranks(scores, torch.arange(len(scores), device=device))
            metrics["t2i_R@10"] = recall_at(ranks, 10)
        return metrics

    @torch.inference_mode()
    def pictures(self, model: TokenizerTrainee) -> dict[str, Any]:
        images, _ = next(_batches(self.val_set, self.run.model.image_size_px))
        images = images[:PICTURES].to(next(model.parameters()).device)
        tokenizer = model.tokenizer
        both = to_pil(images) + to_pil(tokenizer.decode(tokenizer.encode(images)))
        return {"reconstructions": np.asarray(grid(both, columns=PICTURES))}

    def save(self, model: TokenizerTrainee, directory: Path, card: str) -> None:
        model.tokenizer.card = card
        model.tokenizer.save_pretrained(directory)


def _batches(dataset: ImageTextDataset, size_px: int) -> Any:
    """Batches of (images (B, 3, H, W), their indices) over a split, unreadable images left out."""
    images, indices = [], []
    for index, image in readable_images(dataset):
        images.append(to_tensor(image, size_px))
        indices.append(index)
        if len(images) == EVALUATION_BATCH:
            yield torch.stack(images), indices
            images, indices = [], []
    if images:
        yield torch.stack(images), indices


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(TokenizerRun, argv, prog="tavq train tokenizer", presets=RUN_PRESETS)
    train(TokenizerTask(run), run.training, run.out, run)


if __name__ == "__main__":
    main()
