"""Train the decoder of a finished tokenizer further, all else frozen.

Ids, codebook and alignment stay as they are, so generators, captioners and token files made with it stay
valid; only the decoded images change.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tavq.base.processes import common_generator, drawn_for_rows, shares_of_all, sum_of_counts
from tavq.data.image_folder import with_more_images
from tavq.data.layouts import open_dataset
from tavq.training.config import TrainingConfig
from tavq.training.task import StepOutput, Task

from .blocks import to_map
from .discriminator import ProjectedDiscriminator
from .losses import ReconstructionLoss
from .model import TAVQTokenizer, TokenizerConfig, Window
from .run_config import DecoderRun
from .training_images import (
    TrainingImages,
    originals,
    random_window,
    reconstruction_sheet,
    shared_image_batches,
)

NEW_PARTS = ("upsample", "to_rgb")  # of the decoder; they learn faster than what has been trained before
TRAINED_RATE = 0.3

Resample = Callable[[Tensor], Tensor]
"""ids (B, N) -> other ids (B, N)."""


def with_decoder_shape(
    tokenizer: TAVQTokenizer,
    upsample_channels: tuple[int, ...],
    decoder_blocks: int,
    decoder_noise: bool = False,
    decode_size_px: int | None = None,
) -> TAVQTokenizer:
    """A tokenizer of the same ids with another decoder; parts that both have keep their weights.

    Args:
        tokenizer: stays as it is.
        upsample_channels: as in TokenizerConfig.
        decoder_blocks: likewise; at least as many as `tokenizer` has.
        decoder_noise: likewise; its strength starts at 0, so it changes no image yet. Noise that
            `tokenizer` has stays.
        decode_size_px: side of the images it shall give, a multiple of 2 to the number of stages; None: as
            the stages make it of the map that `tokenizer` has there.
    """
    if decoder_blocks < tokenizer.config.decoder_blocks:
        raise ValueError(
            f"decoder_blocks is {decoder_blocks}, the tokenizer has {tokenizer.config.decoder_blocks} "
            "already; give at least as many"
        )
    scale = 2 ** len(upsample_channels)
    if decode_size_px is not None and (decode_size_px < scale or decode_size_px % scale):
        raise ValueError(f"decode_size_px is {decode_size_px}, expected a multiple of {scale}")
    config: TokenizerConfig = dataclasses.replace(
        tokenizer.config,
        upsample_channels=upsample_channels,
        upsample_from=(decode_size_px or 0) // scale or tokenizer.config.upsample_from,
        decoder_blocks=decoder_blocks,
        decoder_noise=decoder_noise or tokenizer.config.decoder_noise,
    )
    grown = TAVQTokenizer(config)
    state = grown.state_dict()
    trained = tokenizer.state_dict()
    state |= {k: v for k, v in trained.items() if k in state and v.shape == state[k].shape}
    grown.load_state_dict(state)
    return grown


class DecoderTrainer(nn.Module):
    """A tokenizer of which only the decoder learns, with its losses.

    The ids of a view are computed when it is first seen and kept: a later step costs no encoder.

    Args:
        run: the run.
        tokenizer: to train.
        resample: ids (B, N) -> what a generator samples at each place, given the ids before it. Some of it
            replaces the ids, so that the decoder learns to bear a generator's mistakes (after RobusTok,
            arXiv:2509.12474).
    """

    def __init__(self, run: DecoderRun, tokenizer: TAVQTokenizer, resample: Resample | None = None):
        super().__init__()
        self.run = run
        self.resample = resample
        self.loss = ReconstructionLoss(run.losses, run.perceptual, run.training.steps)
        self.tokenizer = tokenizer.requires_grad_(False)
        tokenizer.decoder.requires_grad_(True)
        self.window_px = run.losses.window_px
        self.known_ids: dict[tuple[int, int], Tensor] = {}

    def ids(self, batch: dict[str, Tensor]) -> Tensor:
        """The ids (B, N) of the batch's views, from memory where they are known."""
        views = list(zip(batch["index"].tolist(), batch["draw"].tolist(), strict=True))
        unknown = [row for row, view in enumerate(views) if view not in self.known_ids]
        if unknown:
            encoded = self.tokenizer.encode(batch["image"][unknown]).flatten(1)
            for row, ids in zip(unknown, encoded.to("cpu", torch.int32), strict=True):
                self.known_ids[views[row]] = ids
        return torch.stack([self.known_ids[view] for view in views]).to(batch["image"].device).long()

    def with_mistakes(self, ids: Tensor) -> Tensor:
        """Replace some of the ids (B, N), in some batches, by what the generator samples there."""
        if (
            self.resample is None
            or torch.rand((), generator=common_generator()) >= self.run.generated_batches
        ):
            return ids
        replaced = drawn_for_rows(torch.rand, *ids.shape, device=ids.device) < self.run.generated_tokens
        return torch.where(replaced, self.resample(ids), ids)

    def decode(self, ids: Tensor, window: Window | None = None) -> Tensor:
        """ids (B, N) -> images (B, 3, H', W'), not clipped, with a gradient to the decoder alone."""
        codes = self.tokenizer.quantizer.lookup(ids)
        return self.tokenizer.decoder(to_map(codes, self.tokenizer.grid_size), window)

    def forward(
        self, batch: dict[str, Tensor], step: int, discriminator: ProjectedDiscriminator | None = None
    ) -> StepOutput:
        window = random_window(self.tokenizer, self.window_px)
        decoded = self.decode(self.with_mistakes(self.ids(batch)), window)
        target = batch["target"]
        if window is not None:
            target = window.of_pixels(target, self.tokenizer.decoder.pixels_per_cell)

        report: dict[str, Any] = {}
        result = self.loss(decoded, target, report, step, discriminator)
        report |= self.loss.balance.report()
        return StepOutput(result.reconstruction + result.adversarial, report, result.features)


class DecoderTask(Task[DecoderTrainer, TAVQTokenizer]):
    """The decoder as the training loop sees it."""

    name = "tokenizer"
    monitor = None  # with a discriminator, the last weights are the best ones
    muon_modules = frozenset({"stages", "attention"})

    def __init__(self, run: DecoderRun, resample: Resample | None = None):
        tokenizer = TAVQTokenizer.from_pretrained(run.tokenizer)
        self.earlier_card = tokenizer.card
        self.val_set = open_dataset(run.data, "val")
        train_set = with_more_images(open_dataset(run.data, "train"), run.images)
        torch.manual_seed(run.training.seed)
        tokenizer = with_decoder_shape(
            tokenizer, run.upsample_channels, run.decoder_blocks, run.decoder_noise, run.decode_size_px
        )
        self.dataset = TrainingImages(train_set, tokenizer.image_size_px, tokenizer.decode_size_px, run.views)
        self.model = DecoderTrainer(run, tokenizer, resample)
        self.shipped = tokenizer
        provenance = tokenizer.config.provenance.taught_also_by(self.model.loss.network_hash)
        tokenizer.config = dataclasses.replace(tokenizer.config, provenance=provenance)
        self.discriminator = self.model.loss.make_discriminator(originals(self.dataset, run.losses.window_px))
        self.discriminator_rate = run.losses.discriminator_rate

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        decoder = self.shipped.decoder
        new = {p for part in NEW_PARTS if hasattr(decoder, part) for p in getattr(decoder, part).parameters()}
        groups = []
        for group in super().parameter_groups(config):
            fast = [p for p in group["params"] if p in new]
            slow = [p for p in group["params"] if p not in new]
            groups += [group | {"params": fast}, group | {"params": slow, "lr_scale": TRAINED_RATE}]
        return [group for group in groups if group["params"]]

    @torch.inference_mode()
    def evaluate(self, model: TAVQTokenizer, step: int) -> dict[str, float]:
        """Pixel and perceptual distance on the validation split."""
        n = 0
        sums: Counter[str] = Counter()
        sizes = (model.image_size_px, model.decode_size_px)
        for (images, targets), _ in shared_image_batches(self.val_set, *sizes):
            device = model.codebook.device
            decoded = model.decode(model.encode(images.to(device)))
            sums.update(self.model.loss.distances(decoded, targets.to(device)))
            n += len(images)
        n = sum(shares_of_all([n]))
        sums = sum_of_counts(sums)
        return {name: total / n for name, total in sums.items()}

    def sample_images(self, model: TAVQTokenizer) -> dict[str, Any]:
        return {"reconstructions": reconstruction_sheet(model, self.val_set)}

    def save(self, model: TAVQTokenizer, directory: Path, card: str) -> None:
        model.card = card
        model.save_pretrained(directory)
