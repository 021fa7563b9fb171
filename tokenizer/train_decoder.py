"""tavq train decoder --tokenizer DIR --data DIR --out DIR

Train the decoder of a finished tokenizer further, all else frozen. Ids, codebook and alignment stay as they
are, so generators, captioners and token files made with it stay valid; only the pictures change.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tavq.data.layouts import open_dataset
from tavq.training.card import continued
from tavq.training.task import StepOutput, Task, TrainingConfig

from .blocks import to_map
from .losses import PictureLossConfig, PictureLosses
from .model import TAVQTokenizer
from .photos import TrainingImages, photo_batches, reconstruction_sheet


@dataclasses.dataclass(frozen=True)
class DecoderRun:
    """Train the decoder of a finished tokenizer further; its ids stay as they are.

    Example: tavq train decoder --tokenizer runs/mine/tokenizer --data flickr8k/ --out runs/mine/decoder
    """

    tokenizer: Path = Path("runs/tokenizer")
    """Checkpoint to start from; it is not changed."""
    data: str = "shapes"
    """Data set: a directory in any known layout, or `shapes` (generated)."""
    out: Path = Path("runs/decoder")
    """Directory of the run; holds the whole tokenizer, ready to take the place of the first."""
    preset: str = "flickr8k"
    """flickr8k, or tiny (seconds on a CPU)."""
    config: Path | None = None
    """YAML file of these fields, instead of a preset."""
    perceptual: str | None = None
    """`lpips`, or the path of a TorchScript network that gives feature maps; without it L1 alone."""
    losses: PictureLossConfig = PictureLossConfig(adversarial_from=0.1)
    training: TrainingConfig = TrainingConfig(
        steps=1000,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=50,
        betas=(0.9, 0.95),
        optimizer="muon",
        ema_decay=0.998,
        evaluate_every=500,
    )


TINY = TrainingConfig(
    steps=20, batch_size=8, warmup_steps=5, optimizer="muon", ema_decay=0.9, evaluate_every=20
)
DECODER_PRESETS: dict[str, DecoderRun] = {
    "flickr8k": DecoderRun(),
    "tiny": DecoderRun(preset="tiny", training=TINY),
}


class DecoderTrainee(PictureLosses):
    """A tokenizer of which only the decoder learns."""

    def __init__(self, run: DecoderRun, tokenizer: TAVQTokenizer):
        super().__init__(run.losses, run.perceptual, run.training.steps)
        self.tokenizer = tokenizer.requires_grad_(False)
        tokenizer.decoder.requires_grad_(True)

    def decoded(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] and back, with a gradient to the decoder alone."""
        tokenizer = self.tokenizer
        codes = tokenizer.quantizer.lookup(tokenizer.encode(images).flatten(1).clone())
        return tokenizer.decoder(to_map(codes, tokenizer.grid_size))

    def forward(self, batch: dict[str, Tensor], step: int) -> StepOutput:
        images, report = batch["image"], {}
        got = self.decoded(images)
        reconstruction = self.reconstruction(got, images, report)
        last = self.tokenizer.decoder.last.weight
        loss = reconstruction + self.adversarial(got, reconstruction, last, report, step)
        return StepOutput(loss, report, for_critic=(images, got.detach()))


class DecoderTask(Task):
    """The decoder as the training loop sees it."""

    name = "tokenizer"
    watch = None  # with a discriminator, the last weights are the best ones
    hidden = frozenset({"stages", "trunk"})

    def __init__(self, run: DecoderRun):
        tokenizer = TAVQTokenizer.from_pretrained(run.tokenizer)
        self.earlier_card = tokenizer.card
        self.val_set, train_set = open_dataset(run.data, "val"), open_dataset(run.data, "train")
        self.dataset = TrainingImages(train_set, tokenizer.image_size_px)
        torch.manual_seed(run.training.seed)
        self.model = DecoderTrainee(run, tokenizer)
        self.critic = next(iter(self.model.critic), None)
        if self.model.perceptual is not None:
            provenance = tokenizer.config.provenance
            used = {*provenance.get("decoder_perceptual", "").split(), self.model.perceptual.hash}
            provenance["decoder_perceptual"] = " ".join(sorted(used))

    @torch.inference_mode()
    def evaluate(self, model: DecoderTrainee, step: int) -> dict[str, float]:
        """L1 and perceptual distance on the validation split."""
        n, sums = 0, Counter()
        for images, _ in photo_batches(self.val_set, model.tokenizer.image_size_px):
            images = images.to(model.tokenizer.codebook.device)
            sums.update(model.distances(model.decoded(images), images))
            n += len(images)
        return {name: total / n for name, total in sums.items()}

    def pictures(self, model: DecoderTrainee) -> dict[str, Any]:
        return {"reconstructions": reconstruction_sheet(model.tokenizer, self.val_set)}

    def save(self, model: DecoderTrainee, directory: Path, card: str) -> None:
        model.tokenizer.card = continued(card, self.earlier_card)
        model.tokenizer.save_pretrained(directory)
