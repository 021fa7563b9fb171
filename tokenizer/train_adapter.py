"""Train somebody else's VQ model so that its codes are aligned with text: the task behind `tavq align`.

The training loop runs it twice. A probe learns to project the codes of the frozen model to text, which tells
how much text they carry before any alignment. Then model and projections are trained together.

Shapes: B batch, H W image size in px, h w token grid, K codes, E code width, D text width, n images,
    m captions.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tavq.alignment.adapters import Adapter
from tavq.alignment.aligner import TextAligner, sample_texts
from tavq.alignment.config import NUM_LEVELS
from tavq.alignment.unit_index import UnitIndex
from tavq.base.files import atomic_write
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.images import to_pil, to_pixels, to_uint8
from tavq.data.layouts import open_dataset
from tavq.data.text_encoder import TextEncoder
from tavq.metrics.features import (
    REFERENCE_SIZE_PX,
    FeatureNetwork,
    ImageSet,
    extract_features,
    load_network,
)
from tavq.metrics.frechet import frechet_distance
from tavq.metrics.image import psnr
from tavq.training.stream import Draws
from tavq.training.task import StepOutput, Task

from .codebook_usage import CodebookMonitor
from .losses import GradientBalance, open_perceptual, random_crop_alike
from .model import TAVQTokenizer
from .retrieval import image_to_text_ranks, recall_at, scores_of_codes, text_to_image_ranks
from .run_config import AlignRun
from .training_images import TrainingImages, draws_of_texts, of_whole_split, shared_image_batches

HEADS_FILE = "heads.safetensors"
RECALLS = (1, 5, 10)


class AlignTrainer(nn.Module):
    """A base model behind its adapter, with the aligner and the losses that train both.

    Args:
        frozen: whether only heads and projections learn, as in the probe.
    """

    def __init__(self, run: AlignRun, adapter: Adapter, text_dim: int, frozen: bool):
        super().__init__()
        self.run = run
        self.adapter = adapter
        self.frozen = frozen
        # A frozen codebook takes no gradient, so the soft look-up would refuse it.
        lookup = "straight-through" if frozen else run.alignment.lookup
        config = dataclasses.replace(run.alignment, lookup=lookup)
        num_codes, code_dim = adapter.codebook.shape
        self.aligner = TextAligner(
            num_codes, code_dim, text_dim, config, method=run.method, projections=adapter.projections
        )
        self.perceptual = open_perceptual(run.perceptual) if run.perceptual and not frozen else None
        self.balance = GradientBalance({"align": run.losses.align})

    def train(self, mode: bool = True) -> AlignTrainer:
        super().train(mode)
        if self.frozen:
            self.adapter.base.eval()  # else a codebook of moving averages would go on adapting
        return self

    def forward(self, batch: dict[str, Any], step: int) -> StepOutput:
        """Compute the losses of a batch: `image` (B, 3, H, W) in [-1, 1] and `texts`."""
        images = batch["image"]
        losses = self.run.losses
        decoded, captured = self.adapter.reconstruct(images)
        if self.frozen:
            alignment = self.aligner(captured.features, self.adapter.codebook, batch["texts"])
            return StepOutput(alignment.loss, dict(alignment.report))

        report: dict[str, Any] = {"l1": F.l1_loss(decoded, images), "quantizer": captured.quantizer_loss}
        reconstruction = losses.l1 * report["l1"]
        if self.perceptual is not None:
            cropped, targets = random_crop_alike(decoded, images)
            with torch.no_grad():
                target_features = self.perceptual(targets)
            report["perceptual"] = self.perceptual.distance(self.perceptual(cropped), target_features)
            reconstruction = reconstruction + losses.perceptual * report["perceptual"]

        loss = reconstruction + losses.quantizer * captured.quantizer_loss
        if losses.align:
            alignment = self.aligner(captured.features, self.adapter.codebook, batch["texts"])
            # The two gradients are compared where they meet: on the activations that both losses depend on.
            shared = captured.shared_activations
            loss = loss + self.balance.weigh("align", alignment.loss, reconstruction, shared, step)
            report |= alignment.report | self.balance.report()
        return StepOutput(loss, report)

    def heads(self) -> dict[str, Tensor]:
        """Return the weights that are not the base's: level heads, projections and the scale of the loss."""
        weights = {"log_scale": self.aligner.log_scale.detach()}
        for part, module in (("heads", self.adapter.heads), ("projections", self.aligner.projections)):
            for name, tensor in module.state_dict().items():
                weights[f"{part}.{name}"] = tensor
        return weights

    def load_heads(self, weights: dict[str, Tensor]) -> None:
        """Copy what `heads` returned for another trainer of the same shape."""
        with torch.no_grad():
            for name, tensor in self.heads().items():
                tensor.copy_(weights[name])


def features_of(decoded: Tensor, originals: Tensor, network: FeatureNetwork) -> list[Tensor]:
    """Features (B, D) of decoded images and of their originals, at the size at which all are measured.

    Args:
        decoded: (B, 3, H, W) in [-1, 1].
        originals: (B, 3, 224, 224) in [-1, 1].
        network: the network.
    """
    enlarged = torch.stack([to_pixels(image, REFERENCE_SIZE_PX) for image in to_pil(decoded)])
    return [
        extract_features(ImageSet(images), network)[network.layers["fid"]]
        for images in (enlarged, to_uint8(originals))
    ]


class AlignData:
    """Images and texts of a dataset, read and encoded once for both stages.

    Attributes:
        val_captions: (m, D) vectors of all validation captions.
        image_of_caption: (m,) index of the image that each belongs to.
        first_caption: (n,) index of the first caption of each validation image.
        network: that measures rFD, or None.
    """

    def __init__(self, run: AlignRun, image_size_px: int):
        self.train_set = open_dataset(run.data, "train")
        self.val_set = open_dataset(run.data, "val")
        self.images = TrainingImages(self.train_set, image_size_px)

        encoder = EmbeddingCache(TextEncoder(run.text_encoder))
        self.text_dim = encoder.dim
        self.text_hash = encoder.hash
        # Before the texts are encoded, which takes minutes: a bad file ends the run here.
        self.network = None if run.features is None else load_network(run.features)
        self.texts = UnitIndex.build(self.train_set, encoder, long_text=run.alignment.long_text)

        captions = [caption for example in self.val_set.examples for caption in example.captions]
        counts = torch.tensor([len(example.captions) for example in self.val_set.examples])
        self.val_captions = encoder.encode(captions)
        self.image_of_caption = torch.arange(len(counts)).repeat_interleave(counts)
        self.first_caption = counts.cumsum(0) - counts


class AlignTask(Task[AlignTrainer, AlignTrainer]):
    """One of the two stages as the training loop sees it."""

    name = "tokenizer"
    monitor = None  # the last weights are kept: reconstruction and retrieval pull in two directions

    def __init__(self, run: AlignRun, adapter: Adapter, data: AlignData, frozen: bool):
        self.run = run
        self.data = data
        self.dataset = data.images
        torch.manual_seed(run.training.seed)
        self.model = AlignTrainer(run, adapter, data.text_dim, frozen)
        self.shipped = self.model
        self.codebook_monitor = CodebookMonitor()

    def collate(self, examples: list[dict[str, Any]], draws: Draws | None = None) -> dict[str, Any]:
        indices, rng, own = draws_of_texts(examples, draws)
        texts = sample_texts(self.data.texts, indices, rng, self.run.alignment, own)
        return {"image": torch.stack([example["image"] for example in examples]), "texts": texts}

    @torch.inference_mode()
    def evaluate(self, model: AlignTrainer, step: int) -> dict[str, float]:
        """Measure reconstruction, use of the codebook, and retrieval through its codes on the val split."""
        adapter = model.adapter
        device = next(model.parameters()).device
        found: list[tuple[list[int], list[Tensor]]] = []
        network = self.data.network
        sizes = [adapter.image_size_px, adapter.decode_size_px, *([REFERENCE_SIZE_PX] if network else [])]
        for (images, targets, *large), indices in shared_image_batches(self.data.val_set, *sizes):
            decoded, captured = adapter.reconstruct(images.to(device))
            decoded = decoded.cpu()
            l1 = (decoded - targets).abs().flatten(1).mean(dim=1)
            ratios = torch.from_numpy(psnr(to_uint8(decoded), to_uint8(targets)))
            features = [] if network is None else features_of(decoded, large[0], network)
            found.append((indices, [captured.ids.cpu(), l1, ratios, *features]))

        rows, (ids, all_l1, all_ratios, *all_features) = of_whole_split(found)
        distance = {} if network is None else {f"r{network.frechet_name}": frechet_distance(*all_features)}
        return {
            "l1": float(all_l1.mean()),
            "PSNR": float(all_ratios.mean()),
            **distance,
            **self.codebook_monitor.update(ids, adapter.codebook, step),
            **self._retrieval(model, ids, torch.tensor(rows)),
        }

    def _retrieval(self, model: AlignTrainer, ids: Tensor, rows: Tensor) -> dict[str, float]:
        """Rank the first caption of each image among the images, and each image among all captions.

        Args:
            ids: (n, h, w) int64, of the images that can be read.
            rows: (n,) their indices in the validation split.
        """
        data = self.data
        projections = model.aligner.projections
        projected = projections(model.adapter.codebook, projections.per_code_embedding, NUM_LEVELS)
        projected = F.normalize(projected, dim=-1).cpu()
        temperature = self.run.alignment.retrieval_temperature(self.run.method)
        scores = scores_of_codes(projected, ids, data.val_captions, temperature)

        # Index in `ids` of each validation image; -1 where the image cannot be read.
        position = torch.full((len(data.val_set),), -1)
        position[rows] = torch.arange(len(rows))
        ranks = {
            "t2i": text_to_image_ranks(scores[:, data.first_caption[rows]], torch.arange(len(rows))),
            "i2t": image_to_text_ranks(scores, position[data.image_of_caption]),
        }
        return {f"{task}_R@{k}": recall_at(ranks[task], k) for k in RECALLS for task in ranks}

    def save(self, model: AlignTrainer, directory: Path, card: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        base = model.adapter.base
        if isinstance(base, TAVQTokenizer):
            # The codes stay; the projections that were learnt are a part of the tokenizer.
            base.card = card
            model.adapter.save(directory)
        elif not model.frozen:
            model.adapter.save(directory)
        with atomic_write(directory / HEADS_FILE) as path:
            save_file({name: tensor.cpu().contiguous() for name, tensor in model.heads().items()}, path)
