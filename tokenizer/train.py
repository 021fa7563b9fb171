"""tavq train tokenizer --data DIR --out DIR [--preset tiny|flickr8k|vqgan256] [--align METHOD]

Train the TA-VQ tokenizer: reconstruction, perceptual and adversarial losses, alignment with text at three
levels, and, with --distill, the maps of a frozen vision network. The same command resumes a stopped run.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tavq.alignment.aligner import TextAligner, sample_texts
from tavq.alignment.config import NUM_LEVELS
from tavq.alignment.lgvq import CaptionMasker, LanguageGuidance, MaskedCaptions
from tavq.alignment.unit_index import UnitIndex
from tavq.base.arrays import DiskArray
from tavq.base.processes import sum_of_counts
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.image_folder import with_more_images
from tavq.data.keep import keep_only
from tavq.data.layouts import open_dataset
from tavq.data.text_encoder import TextEncoder
from tavq.training.config import TrainingConfig
from tavq.training.stream import Draws
from tavq.training.task import StepOutput, Task

from .codebook_usage import CodebookMonitor, level_costs, level_ids, perplexity, usage_chart
from .config import TokenizerRun
from .discriminator import ProjectedDiscriminator
from .distillation import BatchTeacher, DistillationHead, map_of_view, teacher_maps, teacher_pixels
from .fit_projections import fit_projections
from .losses import FrozenNetwork, ReconstructionLoss
from .model import Encoded, TAVQTokenizer, TokenizerConfig
from .provenance import TokenizerProvenance
from .retrieval import alignment_scores, recall_at, text_to_image_ranks
from .semantic_classes import SemanticClasses, open_classes
from .training_images import (
    TrainingImages,
    draws_of_texts,
    of_whole_split,
    originals,
    random_window,
    reconstruction_sheet,
    shared_image_batches,
)

HEAD_RATE = 5.0  # learning rate of the projections to text, relative to that of encoder and decoder


class TokenizerTrainer(nn.Module):
    """Tokenizer, aligner and distillation head with the losses that train them."""

    def __init__(
        self,
        run: TokenizerRun,
        tokenizer: TAVQTokenizer,
        teacher_dim: int | None = None,
        vocabulary: Tensor | None = None,
        teacher: BatchTeacher | None = None,
    ):
        super().__init__()
        self.run = run
        self.tokenizer = tokenizer
        shares = {"align": run.losses.align, "distill": run.losses.distill}
        self.loss = ReconstructionLoss(run.losses, run.perceptual, run.training.steps, shares)

        code_dim = run.model.code_dim
        self.aligner = None
        self.guidance = None
        if run.align in ("ot", "gaussian", "filip"):
            num_codes, _ = tokenizer.codebook.shape
            self.aligner = TextAligner(
                num_codes,
                code_dim,
                tokenizer.config.text_dim,
                run.alignment,
                method=run.align,
                projections=tokenizer.projections,
            )
            tokenizer.projections.per_code_embedding.requires_grad_(run.alignment.per_code_embedding)
        else:
            tokenizer.projections.requires_grad_(False)
        if vocabulary is not None:
            h, w = tokenizer.grid_size
            self.guidance = LanguageGuidance(run.lgvq, code_dim, h * w, vocabulary)
        self.head = DistillationHead(code_dim, teacher_dim) if teacher_dim else None
        self.teacher = teacher

    def forward(
        self, batch: dict[str, Any], step: int, discriminator: ProjectedDiscriminator | None = None
    ) -> StepOutput:
        run = self.run
        report: dict[str, Any] = {}
        decodes = step % run.losses.decode_every == 0
        window = random_window(self.tokenizer, run.losses.window_px) if decodes else None
        encoded = self.tokenizer(batch["image"], decode=decodes, window=window, classes=batch.get("classes"))
        report["quantizer"] = encoded.quantizer_loss
        loss = run.losses.quantizer * encoded.quantizer_loss

        reconstruction = features = None
        if decodes:
            target = batch["target"]
            if window is not None:
                target = window.of_pixels(target, self.tokenizer.decoder.pixels_per_cell)
            result = self.loss(encoded.images, target, report, step, discriminator)
            reconstruction = result.reconstruction
            features = result.features
            loss = loss + reconstruction + result.adversarial

        if self.aligner is not None:
            loss = loss + self._alignment(self.aligner, batch, encoded.latents, reconstruction, report, step)
        if self.guidance is not None:
            guidance, values = self.guidance(
                self._straight_through(encoded), MaskedCaptions(**batch["captions"])
            )
            loss = loss + guidance
            report |= values
        if self.head is not None:
            maps = batch["teacher"]
            if self.teacher is not None:
                maps = self.teacher.maps_of_views(maps, batch["boxes"], batch["flipped"])
            report["distill"] = self.head(encoded.latents[-1], maps)
            on = (encoded.latents[-1],)
            loss = loss + self.loss.balance.weigh("distill", report["distill"], reconstruction, on, step)

        report |= {name: value for name, value in self.loss.balance.report().items() if not value.isnan()}
        report["perplexity"] = perplexity(self.tokenizer.quantizer.usage)
        return StepOutput(loss, report, features)

    def _alignment(
        self,
        aligner: TextAligner,
        batch: dict[str, Any],
        latents: tuple[Tensor, ...],
        reconstruction: Tensor | None,
        report: dict[str, Tensor | float],
        step: int,
    ) -> Tensor:
        quantizer = self.tokenizer.quantizer
        features = [quantizer.normalise(level.movedim(1, -1)).movedim(-1, 1) for level in latents]
        alignment = aligner(features, quantizer.codebook, batch["texts"])
        report |= alignment.report
        return self.loss.balance.weigh("align", alignment.loss, reconstruction, latents, step)

    def _straight_through(self, encoded: Encoded) -> Tensor:
        """The quantised map (B, E, h, w) of the last level with the gradient that LG-VQ sends: to the encoder
        alone, whatever the quantiser's own estimator is."""
        quantizer = self.tokenizer.quantizer
        latents = quantizer.normalise(encoded.latents[-1].movedim(1, -1))
        codes = latents + (quantizer.lookup(encoded.ids) - latents).detach()
        return codes.movedim(-1, 1)


class TokenizerTask(Task[TokenizerTrainer, TAVQTokenizer]):
    """The tokenizer as the training loop sees it."""

    name = "tokenizer"
    monitor = None  # with a discriminator that joins late, the last weights are the best ones
    muon_modules = frozenset({"stages", "trunk", "attention"})

    def __init__(self, run: TokenizerRun):
        earlier = None if run.start is None else TAVQTokenizer.from_pretrained(run.start)
        if earlier is not None:
            run = dataclasses.replace(run, model=earlier.config.shape)
        self.run = run
        self.earlier_card = "" if earlier is None else earlier.card
        self.train_set = with_more_images(keep_only(open_dataset(run.data, "train"), run.keep), run.images)
        self.val_set = open_dataset(run.data, "val")
        self.dataset = TrainingImages(self.train_set, run.model.image_size_px, run.model.decode_size_px)
        self.codebook_monitor = CodebookMonitor(run.min_usage)
        encoder = None if run.align == "none" else TextEncoder(run.text_encoder)
        self._prepare_texts(encoder)
        teacher = None if run.distill is None else FrozenNetwork(run.distill)
        self._prepare_teacher(teacher)
        self.classes: SemanticClasses | None = None
        if run.classes is not None:
            quantizer = run.model.quantizer
            self.classes = open_classes(
                run.classes, self.train_set, run.model.grid_size, quantizer.num_classes
            )

        torch.manual_seed(run.training.seed)
        self.shipped = self._new_tokenizer(encoder, earlier)
        vocabulary = encoder.token_embeddings if encoder is not None and run.align == "lgvq" else None
        self.model = TokenizerTrainer(run, self.shipped, self.teacher_dim, vocabulary, self.teacher)
        examples = originals(self.dataset, run.losses.window_px)
        self.discriminator = self.model.loss.make_discriminator(examples)
        self.discriminator_rate = run.losses.discriminator_rate

        # What taught the earlier weights has shaped these, too.
        taught_by = () if earlier is None else earlier.config.provenance.taught_by
        provenance = self.shipped.config.provenance.taught_also_by(
            *taught_by,
            self.model.loss.network_hash,
            None if teacher is None else teacher.hash,
            None if self.classes is None else self.classes.source_hash,
        )
        self.shipped.config = dataclasses.replace(self.shipped.config, provenance=provenance)

    def _prepare_teacher(self, network: FrozenNetwork | None) -> None:
        """Open the maps that are distilled, or get ready to compute them in each batch."""
        self.maps: DiskArray | None = None
        self.teacher: BatchTeacher | None = None
        self.teacher_dim: int | None = None
        grid = self.run.model.grid_size
        if network is not None and self.run.cache == "none":
            self.teacher = BatchTeacher.measured(network, self.train_set, grid)
            self.teacher_dim = self.teacher.dim
        elif network is not None:
            self.maps = teacher_maps(network, self.train_set, grid)
            self.teacher_dim = self.maps.shape[1]

    def _prepare_texts(self, encoder: TextEncoder | None) -> None:
        """Encode what the chosen alignment compares images with."""
        run = self.run
        self.texts: UnitIndex | None = None
        self.captions: CaptionMasker | None = None
        if encoder is None:
            return
        cache = EmbeddingCache(encoder)
        self.val_captions = cache.encode([example.captions[0] for example in self.val_set.examples])
        if run.align == "lgvq":
            captions = [example.captions for example in self.train_set.examples]
            self.captions = CaptionMasker(encoder, captions, run.lgvq)
        else:
            long_text = run.alignment.long_text
            self.texts = UnitIndex.build(self.train_set, cache, long_text=long_text)
            self.val_texts = UnitIndex.build(self.val_set, cache, long_text=long_text)

    def _new_tokenizer(self, encoder: TextEncoder | None, earlier: TAVQTokenizer | None) -> TAVQTokenizer:
        """The tokenizer that training starts from: untrained, or with the weights of `earlier`."""
        run = self.run
        provenance = TokenizerProvenance(data=self.train_set.name, align=run.align)
        temperature = run.alignment.retrieval_temperature(run.align)
        decided: dict[str, Any] = {"transport_temperature": temperature}
        if encoder is not None:
            provenance = dataclasses.replace(
                provenance, text_encoder=run.text_encoder, text_encoder_hash=encoder.hash
            )
        if self.texts is not None and encoder is not None:
            provenance = dataclasses.replace(provenance, aligned_levels=run.alignment.aligned_levels)
            decided["text_dim"] = encoder.dim

        config = TokenizerConfig.of(run.model, provenance=provenance, **decided)
        tokenizer = TAVQTokenizer.from_config(config)
        if earlier is not None:
            if tokenizer.config.text_dim != earlier.config.text_dim:
                raise ValueError(
                    f"{run.start} is aligned with texts of width {earlier.config.text_dim}, and "
                    f"{run.text_encoder} gives {tokenizer.config.text_dim}; name its --text-encoder"
                )
            tokenizer.load_state_dict(earlier.state_dict())
        return tokenizer

    def collate(self, examples: list[dict[str, Any]], draws: Draws | None = None) -> dict[str, Any]:
        batch: dict[str, Any] = {
            name: torch.stack([example[name] for example in examples]) for name in ("image", "target")
        }
        indices, generator, own = draws_of_texts(examples, draws)
        if self.texts is not None:
            batch["texts"] = sample_texts(self.texts, indices, generator, self.run.alignment, own)
        if self.captions is not None:
            batch["captions"] = vars(self.captions.sample(indices, generator, own))
        if self.maps is not None:
            maps = [
                map_of_view(torch.from_numpy(self.maps[e["index"]]), e["box"], flipped=e["flipped"])
                for e in examples
            ]
            batch["teacher"] = torch.stack(maps)
        if self.teacher is not None:  # which looks at them on the device of the training
            batch["teacher"] = teacher_pixels(self.train_set, [example["index"] for example in examples])
            batch["boxes"] = [example["box"] for example in examples]
            batch["flipped"] = [example["flipped"] for example in examples]
        if self.classes is not None:
            views = [self.classes.of_view(e["index"], e["box"], flipped=e["flipped"]) for e in examples]
            batch["classes"] = torch.stack(views)
        return batch

    def parameter_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        heads, groups = set(self.model.tokenizer.projections.parameters()), []
        for group in super().parameter_groups(config):
            slow = [p for p in group["params"] if p not in heads]
            fast = [p for p in group["params"] if p in heads]
            groups += [group | {"params": slow}, group | {"params": fast, "lr_scale": HEAD_RATE}]
        return [group for group in groups if group["params"]]

    def finish(self, model: TAVQTokenizer) -> None:
        """Fit the projections once more to the codes, which no longer move."""
        if self.texts is not None and self.run.fit_steps:
            levels = model.aligned_levels
            fit_projections(
                model,
                self.train_set,
                self.texts,
                levels,
                self.run.fit_steps,
                self.run.training.seed,
                per_code_embedding=self.run.alignment.per_code_embedding,
            )

    @torch.inference_mode()
    def evaluate(self, model: TAVQTokenizer, step: int) -> dict[str, float]:
        """Reconstruction, health of the codebook, cost of the text by level, and text-to-image recall at 10,
        on the validation split."""
        device = model.codebook.device
        found: list[tuple[list[int], list[Tensor]]] = []
        sums: Counter[str] = Counter()
        for (images, targets), indices in shared_image_batches(
            self.val_set, model.image_size_px, model.decode_size_px
        ):
            encoded = model(images.to(device))
            found.append((indices, [level_ids(model, encoded.latents).cpu()]))
            sums.update(self.model.loss.distances(encoded.images, targets.to(device)))

        rows, (ids,) = of_whole_split(found)
        ids = ids.to(device)
        sums = sum_of_counts(sums)
        metrics = {name: total / len(ids) for name, total in sums.items()}
        metrics |= self.codebook_monitor.update(ids[:, -1], model.codebook, step)
        scores = self._caption_scores(model, ids[:, -1], rows)
        if scores is not None:
            ranks = text_to_image_ranks(scores, torch.arange(len(scores), device=device))
            metrics["t2i_R@10"] = recall_at(ranks, 10)
        if self.texts is not None:
            metrics |= level_costs(model, ids, self.val_texts, rows)
        return metrics

    def _caption_scores(self, model: TAVQTokenizer, ids: Tensor, rows: list[int]) -> Tensor | None:
        """Images against their first captions (n, n); None where the codes know no text."""
        guidance = self.model.guidance
        if guidance is None and NUM_LEVELS not in model.aligned_levels.values():
            return None
        captions = self.val_captions[rows].to(ids.device)
        if guidance is None:
            return alignment_scores(model, ids, captions)
        # LG-VQ reads the codes by a network of its own.
        return guidance.scores(model.quantizer.lookup(ids).movedim(-1, 1), captions)

    def memory(self) -> dict[str, Tensor]:
        previous = self.codebook_monitor.previous
        return {} if previous is None else {"codebook": previous}

    def recall(self, memory: dict[str, Tensor]) -> None:
        self.codebook_monitor.previous = memory.get("codebook")

    def sample_images(self, model: TAVQTokenizer) -> dict[str, Any]:
        images = {"reconstructions": reconstruction_sheet(model, self.val_set)}
        if self.codebook_monitor.usage is not None:
            images["codebook_usage"] = usage_chart(self.codebook_monitor.usage)
        return images

    def save(self, model: TAVQTokenizer, directory: Path, card: str) -> None:
        model.card = card
        model.save_pretrained(directory)
