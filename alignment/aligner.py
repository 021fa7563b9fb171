"""Sampling-based alignment of codes with text, at three levels, for this tokenizer or any other VQ model.

Our own formulation of what the abstract and the overview figure of TA-VQ (Liang et al., CVPR 2025,
arXiv:2503.01261) state: words go with the shallow level, phrases with the middle one, sentences with the deep
one; a few codes and a few units are sampled an image, and a transport problem between them replaces the
comparison of everything with everything.

Legend: B batch, E code width, K codes, S sampled codes, U text units, D text width, n units of the bank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.base.precision import full_precision

from .projections import NUM_LEVELS, TextProjections
from .text_index import UnitIndex
from .transport import gaussian_cost, gaussian_unit_cost, single_unit_cost, transport_cost

LEVEL_NAMES = ("words", "phrases", "sentences")
MAX_LOG_SCALE = 4.6  # of the contrastive logits: a factor of 100, as in CLIP


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
    """How codes are drawn to text."""

    method: Literal["ot", "gaussian"] = "ot"
    level_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of words, phrases, sentences; 0 leaves them out. Where the whole loss is weighed by its gradient, as in
    training the tokenizer, only their ratios count."""
    pairing: tuple[int, int, int] = (1, 2, 3)
    """The encoder's level, 1 the shallowest, that words, phrases and sentences go with."""
    samples: int = 32
    """Codes drawn from an image (S)."""
    max_units: int = 16
    """Units drawn from a text, at most (U)."""
    epsilon: float = 0.05
    """Entropic regularisation relative to the mean cost of the batch."""
    relaxation: float = 0.5
    """Penalty of the image marginal, relative likewise; large values spread a text over the whole image."""
    iterations: int = 5
    lookup: Literal["soft", "straight-through"] = "soft"
    """How the gradient passes the quantiser: to codebook and encoder, or to the encoder alone (as in LG-VQ's
    code)."""
    lookup_temperature: float = 0.1
    """Of the soft look-up, relative to the mean squared distance between latents and codes."""
    bank_size: int = 1024
    """Units of other training images that each image also has to tell from its own."""
    transport_weight: float = 1.0
    """Of the matched pairs' cost beside the contrastive term."""

    def __post_init__(self) -> None:
        positive = ("samples", "max_units", "epsilon", "iterations", "lookup_temperature")
        for name in (*positive, "relaxation", "bank_size", "transport_weight"):
            value, least = getattr(self, name), "above 0" if name in positive else "0 or more"
            if value < 0 or (value == 0 and name in positive):
                raise ValueError(f"{name} is {value}, expected {least}")
        if min(self.level_weights) < 0 or not any(self.level_weights):
            raise ValueError(f"level_weights are {self.level_weights}, expected none below 0 and one above")
        if not set(self.pairing) <= set(range(1, NUM_LEVELS + 1)):
            raise ValueError(f"pairing is {self.pairing}, expected levels from 1 to {NUM_LEVELS}")


@dataclasses.dataclass(frozen=True)
class TextUnits:
    """Words, phrases or sentences of a batch of texts."""

    vectors: Tensor
    """(B, U, D), unit length."""
    mask: Tensor
    """(B, U) bool, True where a unit exists."""


@dataclasses.dataclass(frozen=True)
class TextBank:
    """Units drawn from the whole training set, as negatives."""

    vectors: Tensor
    """(n, D), unit length."""
    own: Tensor
    """(B, n) bool, True where a unit belongs to the image's own text and must not count against it."""


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Result of `TextAligner`."""

    loss: Tensor
    report: dict[str, Tensor]


def draw_texts(
    index: UnitIndex, images: Sequence[int], generator: torch.Generator, config: AlignmentConfig
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Words, phrases and sentences of a batch, and negatives for each, as plain tensors, which a data loader
    may carry; see `units_and_banks`."""
    kinds = range(1, len(LEVEL_NAMES) + 1)
    return {
        "texts": [index.batch(images, kind, generator, config.max_units) for kind in kinds],
        "banks": [index.bank(images, kind, generator, config.bank_size) for kind in kinds],
    }


def units_and_banks(
    drawn: dict[str, list[tuple[Tensor, Tensor]]],
) -> tuple[list[TextUnits], list[TextBank]]:
    """What `draw_texts` drew, as `TextAligner` takes it."""
    return [TextUnits(*pair) for pair in drawn["texts"]], [TextBank(*pair) for pair in drawn["banks"]]


class TextAligner(nn.Module):
    """Draws the codes of any VQ model towards text.

    Args:
        config: method, samples, weights.
        num_codes: K of the codebook.
        code_dim: its width E.
        text_dim: width D of the text vectors.
        projections: the g_l, where the model has them already; else they are made here.
    """

    def __init__(
        self,
        config: AlignmentConfig,
        num_codes: int,
        code_dim: int,
        text_dim: int,
        *,
        projections: TextProjections | None = None,
        projection_width: int = 192,
    ):
        super().__init__()
        self.config = config
        if projections is None:
            self.own_projections = TextProjections(num_codes, code_dim, projection_width, text_dim)
        self._given = (projections,)  # in a tuple: they stay the model's, and are saved with it alone
        self.log_scale = nn.Parameter(torch.full((len(LEVEL_NAMES),), 2.66))  # 1 / 0.07, as in CLIP

    @property
    def projections(self) -> TextProjections:
        return self.own_projections if self._given[0] is None else self._given[0]

    def forward(
        self,
        features: Sequence[Tensor],
        codebook: Tensor,
        texts: Sequence[TextUnits],
        banks: Sequence[TextBank] | None = None,
    ) -> Alignment:
        """Loss that falls when each image's codes lie near its own text and far from the others'.

        Args:
            features: one map (B, E, h, w) a level before quantisation, shallow first, as the model's look-up
                sees them.
            codebook: (K, E), with its gradient.
            texts: words, phrases, sentences; text i belongs to image i.
            banks: optional further negatives, likewise.

        Returns:
            Alignment with a scalar loss and, for words, phrases and sentences, the matched cost and the
            accuracy among the batch. Computed in float32, under autocast too.

        Raises:
            ValueError: the codebook takes no gradient, though the soft look-up would send it one.
        """
        if self.config.lookup == "soft" and not codebook.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "the codebook takes no gradient (a buffer updated by moving average?), so text cannot reach "
                "it; make it a parameter, or set lookup='straight-through' to align the encoder alone"
            )
        losses, report = [], {}
        with full_precision(codebook):
            for kind, (weight, level) in enumerate(
                zip(self.config.level_weights, self.config.pairing, strict=True)
            ):
                if weight == 0:
                    continue
                codes = self._sampled_codes(features[level - 1], codebook, level)
                bank = banks[kind] if banks is not None and self.config.bank_size else None
                loss, values = self._unit_loss(codes, texts[kind], bank, kind)
                losses.append(weight * loss)
                report |= {f"align/{LEVEL_NAMES[kind]}_{name}": value for name, value in values.items()}
        return Alignment(torch.stack(losses).sum(), report)

    def _sampled_codes(self, features: Tensor, codebook: Tensor, level: int) -> Tensor:
        """(B, E, h, w) of `level` -> codes of S random positions in text space, (B, S, D), unit length."""
        latents = features.flatten(2).transpose(1, 2).float()
        samples = min(self.config.samples, latents.shape[1])
        chosen = torch.rand(latents.shape[:2], device=latents.device).topk(samples, dim=1).indices
        drawn = latents.gather(1, chosen.unsqueeze(-1).expand(-1, -1, latents.shape[-1]))
        codes, marks = differentiable_lookup(
            drawn.flatten(0, 1),
            codebook,
            self.projections.marks,
            self.config.lookup,
            self.config.lookup_temperature,
        )
        projected = self.projections(codes, marks, level)
        return F.normalize(projected, dim=-1).unflatten(0, drawn.shape[:2])

    def _unit_loss(
        self, codes: Tensor, texts: TextUnits, bank: TextBank | None, kind: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        present = texts.mask.any(dim=1)  # a text may have no phrase
        codes, units, mask = codes[present], texts.vectors[present], texts.mask[present]
        if len(units) < 2:
            return codes.sum() * 0.0, {}
        scale = self.log_scale[kind].clamp(max=MAX_LOG_SCALE).exp()
        cost, regularisation = self._pair_costs(codes, units, mask)
        labels = torch.arange(len(cost), device=cost.device)
        logits = -scale * cost
        contrastive = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        if bank is not None:
            own = bank.own[present]
            among_bank = self._bank_loss(codes, units, mask, bank.vectors, own, scale, regularisation)
            contrastive = contrastive + among_bank
        matched = cost.diagonal().mean()
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        loss = self.config.transport_weight * matched + contrastive
        return loss, {"cost": matched.detach(), "accuracy": accuracy, "nce": contrastive.detach()}

    def _pair_costs(self, codes: Tensor, units: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Cost of every image-text pair of the batch (B, B), and the regularisation in units of the cost."""
        if self.config.method == "gaussian":
            return gaussian_cost(codes, units, mask), {}
        pairwise = 1 - torch.einsum("isd,jud->ijsu", codes, units)
        mean = float(pairwise.detach().mean(dim=(0, 2))[mask].mean())  # of the units that exist
        regularisation = {"epsilon": self.config.epsilon * mean, "relaxation": self.config.relaxation * mean}
        cost = transport_cost(
            pairwise, mask.unsqueeze(0), iterations=self.config.iterations, **regularisation
        )
        return cost, regularisation

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
        """Image-to-text InfoNCE: each of an image's units against the units of the bank, each by itself."""
        if self.config.method == "gaussian":
            positive, negative = gaussian_unit_cost(codes, units), gaussian_unit_cost(codes, bank)
        else:
            # costs less 1, which cancels below
            positive = single_unit_cost(-codes @ units.transpose(1, 2), **regularisation)
            negative = single_unit_cost(-codes @ bank.T, **regularisation)
        negative_logits = (-scale * negative).masked_fill(own, -torch.inf)
        total = torch.logsumexp(negative_logits, dim=1, keepdim=True)
        surprise = torch.logaddexp(total, -scale * positive) + scale * positive
        return (surprise * mask).sum() / mask.sum()


def differentiable_lookup(
    latents: Tensor,
    codebook: Tensor,
    marks: Tensor,
    mode: Literal["soft", "straight-through"],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The nearest codes of `latents` and their marks, with a gradient that `mode` sends to the codebook or
    past it.

    "soft" is IBQ's estimator (arXiv:2412.02692, sec. 3.2): one_hot - sg(softmax) + softmax, times the
    codebook; the chosen code and its neighbours are moved, and the latents through the softmax.
    "straight-through" copies the gradient to the latents alone.

    Args:
        latents: (M, E).
        codebook: (K, E).
        marks: (K, H); they take a gradient in both modes.
        temperature: of the softmax over negative squared distances, relative to their mean.

    Returns:
        (M, E) and (M, H): in value, rows of `codebook` and `marks`.
    """
    # |z|^2 - |z - c|^2
    nearness = torch.addmm(codebook.square().sum(1), latents, codebook.T, beta=-1, alpha=2)
    ids = nearness.argmax(dim=1)
    if mode == "straight-through":
        return latents + (codebook[ids] - latents).detach(), marks[ids]
    mean_distance = (latents.square().sum(1).mean() - nearness.mean()).detach()
    soft = torch.softmax(nearness / (temperature * mean_distance), dim=1)
    table = torch.cat([codebook, marks], dim=1)
    mixed = soft @ table.detach()
    chosen = table[ids] + (mixed - mixed.detach())  # the same as with one_hot, at half the time
    return chosen[:, : codebook.shape[1]], chosen[:, codebook.shape[1] :]
