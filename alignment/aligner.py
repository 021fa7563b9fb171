"""Sampling-based alignment of codes with text, at three levels, for any VQ model.

Our own formulation of what the abstract and the overview figure of TA-VQ (Liang et al., CVPR 2025,
arXiv:2503.01261) state: words are aligned with the shallow level, phrases with the middle one, sentences
with the deep one. A few codes and a few units are sampled from an image and its text, and a transport
problem between them replaces the comparison of everything with everything.

Shapes: B batch, E code width, K codes, N positions of a level, S sampled codes, U text units, M text width,
n units of the bank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.base.precision import full_precision
from tavq.base.processes import (
    drawn_for_rows,
    num_processes,
    of_all_processes,
    of_all_processes_with_gradient,
    part_of_mean,
    weighted_mean,
)
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.text_encoder import TextEncoder

from .adapters import Adapter
from .config import LEVEL_NAMES, AlignmentConfig, Method
from .late_interaction import late_interaction_costs, late_interaction_unit_cost
from .projections import TextProjections
from .transport import gaussian_cost, gaussian_unit_cost, single_unit_cost, transport_cost
from .unit_index import ALL, NegativeBank, SampledTexts, TextUnits, UnitIndex

INITIAL_LOG_SCALE = 2.66  # a temperature of 0.07, as in CLIP
MAX_LOG_SCALE = 4.6  # the logits are multiplied by 100 at most, as in CLIP


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Result of `TextAligner`."""

    loss: Tensor
    """Scalar."""
    report: dict[str, Tensor]
    """For words, phrases and sentences: the cost of matched pairs, the accuracy among the batch, the
    InfoNCE loss."""


class TextAligner(nn.Module):
    """Aligns the codes of any VQ model with text.

    Args:
        num_codes: K of the codebook.
        code_dim: its width E.
        text_dim: width M of the text vectors.
        config: samples, regularisation, weights.
        method: "ot" matches codes and units by optimal transport; "gaussian" compares their first two
            moments; "filip" contrasts them one by one, without a plan.
        projections: the g_l, where the model has them already; else they are made here.
        projection_dim: hidden width of those made here.
    """

    index: UnitIndex | None = None
    """The texts that `sample_texts` draws from; set by `from_captions`."""

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        text_dim: int,
        config: AlignmentConfig | None = None,
        *,
        method: Method = "ot",
        projections: TextProjections | None = None,
        projection_dim: int = 192,
    ):
        super().__init__()
        self.config = config or AlignmentConfig()
        self.method = method
        self.projections = projections or TextProjections(num_codes, code_dim, projection_dim, text_dim)
        self.log_scale = nn.Parameter(torch.full((len(LEVEL_NAMES),), INITIAL_LOG_SCALE))

    @classmethod
    def from_captions(
        cls,
        captions: Sequence[Sequence[str]],
        adapter: Adapter,
        config: AlignmentConfig | None = None,
        *,
        method: Method = "ot",
        text_encoder: str = "minilm",
    ) -> Self:
        """An aligner for the model behind `adapter` and the captions of n images.

        Splits and encodes all captions (minutes for 30,000, seconds once they are cached).

        Args:
            captions: some texts for each image, in the order of the images' indices.
            adapter: of the model, as `adapt` gives it.
            config: as for the class.
            method: likewise.
            text_encoder: `minilm`, or a directory or hub id of a transformers text model.
        """
        index = UnitIndex.from_captions(captions, EmbeddingCache(TextEncoder(text_encoder)))
        num_codes, code_dim = adapter.codebook.shape
        aligner = cls(num_codes, code_dim, index.vectors.shape[1], config, method=method)
        aligner.index = index
        return aligner

    def sample_texts(
        self, indices: Sequence[int] | Tensor, rng: torch.Generator | None = None
    ) -> SampledTexts:
        """Draw words, phrases and sentences of these images, and negatives, for one step.

        Args:
            indices: B integers, of the captions given to `from_captions`.
            rng: on the CPU; torch's global one if None.
        """
        if self.index is None:
            raise ValueError("this aligner has no captions; make it with TextAligner.from_captions")
        return sample_texts(self.index, indices, rng or torch.default_generator, self.config)

    def forward(self, features: Sequence[Tensor], codebook: Tensor, texts: SampledTexts) -> Alignment:
        """Loss that falls when each image's codes lie near its own text and far from the others'.

        Args:
            features: one map (B, E, h, w) a level before quantisation, shallow first, as the model's
                look-up sees them.
            codebook: (K, E), with its gradient.
            texts: words, phrases, sentences; text i belongs to image i.

        Returns:
            Alignment. Computed in float32, under autocast too.

        Raises:
            ValueError: the codebook takes no gradient, though the soft look-up would send it one.
        """
        config = self.config
        if config.lookup == "soft" and not codebook.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "the codebook takes no gradient (a buffer updated by moving average?), so text cannot "
                "reach it; make "
                "it a parameter, or set lookup='straight-through' to align the encoder alone"
            )
        losses = []
        report: dict[str, Tensor] = {}
        # Distances in half precision pick other codes.
        with full_precision(codebook):
            for kind, name in enumerate(LEVEL_NAMES):
                weight = config.level_weights[kind]
                if weight == 0:
                    continue
                level = config.pairing[kind]
                codes = self._sampled_codes(features[level - 1], codebook, level)
                bank = texts.banks[kind] if texts.banks else None
                loss, values = self._level_loss(codes, texts.units[kind], bank, kind)
                losses.append(weight * loss)
                report |= {f"align/{name}_{key}": value for key, value in values.items()}
        return Alignment(torch.stack(losses).sum(), report)

    def _sampled_codes(self, features: Tensor, codebook: Tensor, level: int) -> Tensor:
        """(B, E, h, w) of `level` -> codes of S random positions in text space, (B, S, M), unit length."""
        latents = features.flatten(2).transpose(1, 2).float()
        num_samples = min(self.config.samples, latents.shape[1])

        # The largest of random keys are a sample without replacement, for the whole batch at once.
        keys = drawn_for_rows(torch.rand, *latents.shape[:2], device=latents.device)
        positions = keys.topk(num_samples, dim=1).indices
        sampled = latents.gather(1, positions.unsqueeze(-1).expand(-1, -1, latents.shape[-1]))

        codes, embeddings = differentiable_lookup(
            sampled.flatten(0, 1),
            codebook,
            self.projections.per_code_embedding,
            self.config.lookup,
            self.config.lookup_temperature,
        )
        projected = self.projections(codes, embeddings, level)
        return F.normalize(projected, dim=-1).unflatten(0, sampled.shape[:2])

    def _level_loss(
        self, codes: Tensor, texts: TextUnits, bank: NegativeBank | None, kind: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cost of matched pairs plus InfoNCE over transport costs: codes (B, S, M) -> a scalar, and its
        parts.

        Images are contrasted with the texts of all processes. Each process computes the costs of its own
        images, and all of them the loss of all costs.
        """
        present = texts.mask.any(dim=1)  # a text may have no phrase, and an image no text
        all_present = of_all_processes(present)
        if int(all_present.sum()) < 2:
            return codes.sum() * 0.0, {}  # no pair to contrast, but a gradient for every process
        all_units = of_all_processes(texts.vectors)[all_present]
        all_masks = of_all_processes(texts.mask)[all_present]

        # A process without any text takes rows that are left out below: the others wait for its costs.
        rows = (present if present.any() else torch.ones_like(present)).nonzero().flatten()
        codes = codes[rows]
        units = texts.vectors[rows]
        mask = texts.mask[rows]
        own_costs, own_reverse, regularisation = self._pair_costs(codes, all_units, all_masks, present.sum())
        image_to_text = _costs_of_all(own_costs, rows, all_present)
        same = own_reverse is own_costs
        text_to_image = image_to_text if same else _costs_of_all(own_reverse, rows, all_present)

        scale = self.log_scale[kind].clamp(max=MAX_LOG_SCALE).exp()
        logits = -scale * image_to_text
        labels = torch.arange(len(logits), device=logits.device)
        contrastive = (
            F.cross_entropy(logits, labels) + F.cross_entropy(-scale * text_to_image.T, labels)
        ) / 2
        if bank is not None:
            own = bank.own[rows]
            contrastive = contrastive + self._bank_loss(
                codes, units, mask, bank.vectors, own, scale, regularisation
            )

        matched = (image_to_text.diagonal().mean() + text_to_image.diagonal().mean()) / 2
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        loss = self.config.transport_weight * matched + contrastive
        return loss, {"cost": matched.detach(), "accuracy": accuracy, "nce": contrastive.detach()}

    def _pair_costs(
        self, codes: Tensor, units: Tensor, mask: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Costs of B images with B' texts from image to text and from text to image (B, B'), which differ
        with filip alone, and the regularisation in units of the cost.

        `count` is the number of images that have a text, of this process.
        """
        if self.method == "filip":
            return *late_interaction_costs(codes, units, mask), {}
        if self.method == "gaussian":
            cost = gaussian_cost(codes, units, mask)
            return cost, cost, {}

        pairwise = 1 - torch.einsum("isd,jud->ijsu", codes, units)
        # Epsilon and relaxation scale with the costs, which shrink as training goes on. Padding does not
        # count.
        mean = float(weighted_mean(pairwise.detach().mean(dim=(0, 2))[mask].mean(), count))
        regularisation = {"epsilon": self.config.epsilon * mean, "relaxation": self.config.relaxation * mean}
        cost = transport_cost(
            pairwise, mask.unsqueeze(0), iterations=self.config.iterations, **regularisation
        )
        return cost, cost, regularisation

    def _bank_loss(
        self,
        codes: Tensor,
        units: Tensor,
        mask: Tensor,
        bank: Tensor,
        own: Tensor,
        scale: Tensor,
        regularisation: dict[str, float],
    ) -> Tensor:
        """Image-to-text InfoNCE: each of an image's units against the units of the bank, one by one.

        The closed form for single units costs no Sinkhorn iteration, so a thousand negatives are cheap.
        """
        if self.method == "filip":
            positive = late_interaction_unit_cost(codes, units)
            negative = late_interaction_unit_cost(codes, bank)
        elif self.method == "gaussian":
            positive = gaussian_unit_cost(codes, units)
            negative = gaussian_unit_cost(codes, bank)
        else:
            # Costs less 1, which cancels in the difference below.
            positive = single_unit_cost(-codes @ units.transpose(1, 2), **regularisation)
            negative = single_unit_cost(-codes @ bank.T, **regularisation)

        negative_logits = (-scale * negative).masked_fill(own, -torch.inf)
        positive_logits = -scale * positive
        total = torch.logsumexp(negative_logits, dim=1, keepdim=True)
        losses = torch.logaddexp(total, positive_logits) - positive_logits
        mean = (losses * mask).sum() / mask.sum().clamp_min(1)
        return part_of_mean(mean, mask.sum())


def _costs_of_all(costs: Tensor, rows: Tensor, all_present: Tensor) -> Tensor:
    """The costs of the images of all processes, from those of each: (R, B') -> (B', B').

    Args:
        costs: of this process's images.
        rows: (R,) their places in its batch.
        all_present: (P B,) bool, which images of all processes have a text; B' of them.
    """
    if num_processes() == 1:
        return costs
    batch = len(all_present) // num_processes()
    padded = costs.new_zeros(batch, costs.shape[1]).index_copy(0, rows, costs)
    return of_all_processes_with_gradient(padded)[all_present]


def sample_texts(
    index: UnitIndex,
    indices: Sequence[int] | Tensor,
    rng: torch.Generator,
    config: AlignmentConfig,
    wanted: slice = ALL,
) -> SampledTexts:
    """Draw from `index` what `config` asks for; see `UnitIndex.sample`."""
    return index.sample(indices, rng, max_units=config.max_units, bank_size=config.bank_size, wanted=wanted)


def differentiable_lookup(
    latents: Tensor,
    codebook: Tensor,
    embeddings: Tensor,
    mode: Literal["soft", "straight-through"],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The nearest codes of `latents` and their embeddings, with a gradient to the codebook or past it.

    "soft" is IBQ's estimator (arXiv:2412.02692, sec. 3.2): one_hot - sg(softmax) + softmax, times the
    codebook. The chosen code and its neighbours are moved, and the latents through the softmax.
    "straight-through" copies the gradient to the latents alone.

    Args:
        latents: (R, E).
        codebook: (K, E).
        embeddings: (K, H), one a code; they take a gradient in both modes.
        mode: see above.
        temperature: of the softmax over negative squared distances, relative to their mean.

    Returns:
        (R, E) and (R, H): in value, rows of `codebook` and `embeddings`.
    """
    # |z|^2 - |z - c|^2: the term that is the same for all codes is left out.
    nearness = torch.addmm(codebook.square().sum(1), latents, codebook.T, beta=-1, alpha=2)
    ids = nearness.argmax(dim=1)
    if mode == "straight-through":
        return latents + (codebook[ids] - latents).detach(), embeddings[ids]

    mean_distance = (latents.square().sum(1).mean() - nearness.mean()).detach()
    mean_distance = weighted_mean(mean_distance, len(latents))
    soft = torch.softmax(nearness / (temperature * mean_distance), dim=1)
    table = torch.cat([codebook, embeddings], dim=1)
    mixed = soft @ table.detach()
    # In value the chosen row; the same gradient as one_hot - sg(softmax) + softmax, at half the time.
    chosen = table[ids] + (mixed - mixed.detach())
    return chosen[:, : codebook.shape[1]], chosen[:, codebook.shape[1] :]
