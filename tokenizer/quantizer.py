"""Quantisers: latent vectors -> ids of a codebook, behind one interface and chosen by name.

`Quantizer` finds the nearest code; subclasses change how the codebook learns. Own code where
`vector_quantize_pytorch` has the method too: alignment needs the effective codebook with its gradient and the
look-up of arbitrary latents, which that library does not expose for SimVQ, and offers for no IBQ;
`tests/test_tokenizer_quantizer.py` holds the shared ones against it.

Shapes: R latents (rows), K codes, E code width, C semantic classes.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.base.processes import agree_with_first_process, common_generator, of_all_processes

from .config import QuantizerConfig

RESTART_NOISE = 0.01  # a component, so that two codes drawn from one latent part
ROWS_AT_ONCE = 65536  # bounds the (R, K) similarity matrix when many vectors are looked up


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Result of a quantiser."""

    codes: Tensor
    """(R, E); its gradient passes to the latents."""
    ids: Tensor
    """(R,) int64 in [0, K)."""
    loss: Tensor
    """Scalar: codebook and commitment terms."""


class Quantizer(nn.Module):
    """Nearest code on the unit sphere, straight-through gradient, unused codes restarted.

    Latents and codes are scaled to unit length, so that the nearest code is the one of largest cosine (Yu et
    al. 2021, arXiv:2110.04627, sec. 3.2); the estimator is that of van den Oord et al. 2017,
    arXiv:1711.00937, sec. 3.2, or the rotation trick of Fifty et al. 2024, arXiv:2410.06424, sec. 4.
    """

    usage: Tensor
    untouched: Tensor

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(F.normalize(torch.randn(config.num_codes, config.code_dim), dim=1))
        # Running mean of how often each code is used; 1 is even use.
        self.register_buffer("usage", torch.ones(config.num_codes))
        # Until the codes are drawn from a first batch.
        self.register_buffer("untouched", torch.tensor(True))

    @property
    def codebook(self) -> Tensor:
        """(K, E), unit rows, differentiable."""
        return F.normalize(self.weight, dim=1)

    def normalise(self, latents: Tensor) -> Tensor:
        """(..., E) -> the same, as the look-up sees it."""
        return F.normalize(latents.float(), dim=-1)

    def nearest(self, latents: Tensor) -> Tensor:
        """(R, E) -> ids (R,) of the codes with the largest cosine."""
        codebook = self.codebook.detach()
        latents = self.normalise(latents.detach())
        if torch.compiler.is_exporting():  # the number of parts would fix the size of the batch
            return (latents @ codebook.T).argmax(dim=1)
        return torch.cat([(rows @ codebook.T).argmax(dim=1) for rows in latents.split(ROWS_AT_ONCE)])

    def lookup(self, ids: Tensor) -> Tensor:
        """ids (...) int64 in [0, K) -> codes (..., E)."""
        return F.embedding(ids, self.codebook)

    def assign(self, latents: Tensor, classes: Tensor | None) -> Tensor:
        """(R, E) -> ids (R,) of the codes that training takes for these latents."""
        return self.nearest(latents)

    def forward(self, latents: Tensor, classes: Tensor | None = None) -> Quantized:
        """Quantise latents (R, E); in training the codebook also adapts to them.

        Args:
            latents: of the last level.
            classes: (R,) int64, the semantic class of each latent, where the quantiser learns from it.
        """
        latents = self.normalise(latents)
        if self.training:
            # Before the codes enter the graph, since it writes them in place.
            self.adapt(latents.detach(), self.assign(latents, classes), classes)
        ids = self.assign(latents, classes)
        codes = self.lookup(ids)

        codebook_loss = F.mse_loss(codes, latents.detach())
        commitment_loss = F.mse_loss(latents, codes.detach())
        # mse_loss is a mean over E: the sum over a code's components is what the papers weigh.
        loss = (codebook_loss + self.config.commitment * commitment_loss) * latents.shape[1]
        return Quantized(self.straight_through(latents, codes), ids, loss)

    def straight_through(self, latents: Tensor, codes: Tensor) -> Tensor:
        """The value of `codes`, with a gradient to `latents` alone."""
        if self.config.gradient == "rotation":
            return rotate_to(latents, codes.detach())
        return latents + (codes - latents).detach()

    @torch.no_grad()
    def adapt(self, latents: Tensor, ids: Tensor, classes: Tensor | None = None) -> None:
        """Track the use of each code and restart the unused ones from the latents of the batch.

        The first batch gives all codes: latents start in a narrow cone, where few random codes would be
        near any.
        """
        self._track_usage(ids)
        latents = of_all_processes(latents)
        dead = self._dead_codes()
        if len(dead):
            rng = common_generator(latents.device)
            rows = torch.randint(len(latents), (len(dead),), generator=rng, device=latents.device)
            self._restart(dead, latents[rows])
        agree_with_first_process(self.weight)

    def _dead_codes(self) -> Tensor:
        """Ids of the codes that are hardly used; at the first call, of all."""
        dead = ((self.usage < self.config.restart_below) | self.untouched).nonzero().flatten()
        self.untouched.fill_(False)
        return dead

    def _restart(self, dead: Tensor, latents: Tensor) -> None:
        """Put each dead code to one of `latents`, (len(dead), E)."""
        rng = common_generator(latents.device)
        noise = RESTART_NOISE * torch.randn(latents.shape, generator=rng, device=latents.device)
        self.weight[dead] = F.normalize(latents + noise, dim=1).to(self.weight.dtype)
        self.usage[dead] = 1.0

    def _track_usage(self, ids: Tensor) -> None:
        ids = of_all_processes(ids)
        counts = torch.bincount(ids, minlength=self.config.num_codes).float()
        relative = counts * (self.config.num_codes / len(ids))
        self.usage.lerp_(relative, 1 - self.config.usage_decay)


class AnchoredQuantizer(Quantizer):
    """CVQ-VAE: every code moves to an anchor among the batch's latents, the less it is used the further.

    Zheng and Vedaldi 2023, arXiv:2307.15139, eqs. 4-6: e_k <- (1 - a_k) e_k + a_k z_k, with
    a_k = exp(-10 K p_k / (1 - decay) - 0.001), p_k the running share of code k and z_k drawn by nearness to
    e_k.
    """

    @torch.no_grad()
    def adapt(self, latents: Tensor, ids: Tensor, classes: Tensor | None = None) -> None:
        self._track_usage(ids)
        latents = of_all_processes(latents)
        decay = self.config.usage_decay
        pull = torch.exp(-self.usage * 10 / (1 - decay) - 1e-3).unsqueeze(1)
        rng = common_generator(latents.device)
        count = min(len(latents), 4096)
        candidates = latents[torch.randint(len(latents), (count,), generator=rng, device=latents.device)]
        nearness = self.codebook @ candidates.T / self.config.temperature
        anchors = candidates[torch.multinomial(nearness.softmax(dim=1), 1, generator=rng).flatten()]
        self.weight.copy_((1 - pull) * self.codebook + pull * anchors)
        agree_with_first_process(self.weight)


class SemanticQuantizer(Quantizer):
    """Semantic online clustering: a code is near in features and in meaning.

    After SGC-VQGAN (Ding et al. 2024, arXiv:2409.06105), whose formulas could not be read; these are ours.
    Each code keeps a running histogram h of the classes of its latents, and the code of a latent z of class c
    minimises |z - e|^2 + w (1 - h[c]). Codes are running means of their latents (van den Oord et al. 2017,
    arXiv:1711.00937, app. A.1). A dead code is drawn anew, the likelier from a class the fewer codes mean it.
    Classes are known in training alone; afterwards the nearest code is taken.
    """

    histogram: Tensor

    def __init__(self, config: QuantizerConfig):
        super().__init__(config)
        # (K, C), rows sum to 1; even, until a code has seen a latent.
        even = torch.full((config.num_codes, config.num_classes), 1 / config.num_classes)
        self.register_buffer("histogram", even)

    @torch.no_grad()
    def assign(self, latents: Tensor, classes: Tensor | None) -> Tensor:
        if classes is None:
            return self.nearest(latents)
        # |z - e|^2 = 2 - 2 cos on the unit sphere.
        nearness = 2 * latents.detach() @ self.codebook.T
        return (nearness + self.config.semantic_weight * self.histogram.T[classes]).argmax(dim=1)

    @torch.no_grad()
    def adapt(self, latents: Tensor, ids: Tensor, classes: Tensor | None = None) -> None:
        if classes is None:
            raise ValueError("the quantiser sgc learns from the class of each latent; give --classes")
        self._track_usage(ids)
        latents, ids, classes = (of_all_processes(rows) for rows in (latents, ids, classes))

        counts = torch.bincount(ids, minlength=self.config.num_codes).float()
        relative = counts * (self.config.num_codes / len(ids))
        pull = ((1 - self.config.usage_decay) * relative / self.usage.clamp_min(1e-8)).unsqueeze(1)
        mean = torch.zeros_like(self.weight).index_add_(0, ids, latents.to(self.weight.dtype))
        mean /= counts.clamp_min(1).unsqueeze(1)
        seen = F.one_hot(classes, self.config.num_classes).float()
        shares = torch.zeros_like(self.histogram).index_add_(0, ids, seen) / counts.clamp_min(1).unsqueeze(1)
        # By steps from where a code is, so that what alignment moved stays moved.
        self.weight.copy_(F.normalize(self.codebook.lerp(mean, pull), dim=1))
        self.histogram.lerp_(shares, pull)

        dead = self._dead_codes()
        if len(dead):
            codes_of_class = self.histogram.sum(dim=0)
            weights = 1 / codes_of_class[classes].clamp_min(1e-3)
            rng = common_generator(latents.device)
            rows = torch.multinomial(weights, len(dead), replacement=True, generator=rng)
            self._restart(dead, latents[rows])
            self.histogram[dead] = seen[rows]
        agree_with_first_process(self.weight)
        agree_with_first_process(self.histogram)


class ReparameterisedQuantizer(Quantizer):
    """SimVQ: the codebook is a frozen Gaussian matrix times a learned linear map, so every step moves every
    code.

    Zhu et al. 2024, arXiv:2411.02038, sec. 4.
    """

    basis: Tensor

    def __init__(self, config: QuantizerConfig):
        super().__init__(config)
        del self.weight
        self.register_buffer("basis", torch.randn(config.num_codes, config.code_dim) * config.code_dim**-0.5)
        self.transform = nn.Linear(config.code_dim, config.code_dim, bias=False)
        nn.init.orthogonal_(self.transform.weight)

    @property
    def codebook(self) -> Tensor:
        return F.normalize(self.transform(self.basis), dim=1)

    def adapt(self, latents: Tensor, ids: Tensor, classes: Tensor | None = None) -> None:
        self._track_usage(ids)


class IndexQuantizer(Quantizer):
    """IBQ: a straight-through one-hot over all codes, so that the gradient reaches every code.

    Shi et al. 2024, arXiv:2412.02692, sec. 3.2: one_hot - sg(softmax) + softmax, times the codebook; double
    quantisation loss, and an entropy term that makes single choices sharp and the mean choice even.
    """

    def forward(self, latents: Tensor, classes: Tensor | None = None) -> Quantized:
        latents = self.normalise(latents)
        codebook = self.codebook
        soft = (latents @ codebook.T / self.config.temperature).softmax(dim=1)
        ids = soft.argmax(dim=1)
        hard = F.one_hot(ids, self.config.num_codes).to(soft.dtype)
        codes = (hard - soft.detach() + soft) @ codebook
        chosen = hard @ codebook
        loss = F.mse_loss(codes, latents) + F.mse_loss(chosen, latents.detach())
        loss = loss + self.config.commitment * F.mse_loss(latents, chosen.detach())

        # Low for one position, so that its choice is sharp; high over all, so that every code is used.
        mean = soft.mean(dim=0)
        own_entropy = -(soft * soft.clamp_min(1e-9).log()).sum(dim=1).mean()
        mean_entropy = -(mean * mean.clamp_min(1e-9).log()).sum()
        entropy = own_entropy - mean_entropy
        if self.training:
            with torch.no_grad():
                self._track_usage(ids)
        return Quantized(codes, ids, loss * latents.shape[1] + self.config.entropy_weight * entropy)


class FiniteScalarQuantizer(Quantizer):
    """FSQ: each of a few channels is bounded and rounded; there is no codebook to learn, hence none to align.

    Mentzer et al. 2023, arXiv:2309.15505, sec. 3. `codebook` is the fixed grid of code vectors.
    """

    levels: Tensor
    strides: Tensor

    def __init__(self, config: QuantizerConfig):
        super().__init__(dataclasses.replace(config, code_dim=len(config.fsq_levels)))
        del self.weight
        levels = torch.tensor(config.fsq_levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer(
            "strides", torch.cat([torch.ones(1, dtype=torch.long), levels.cumprod(0)[:-1]]), False
        )

    @property
    def codebook(self) -> Tensor:
        digits = (
            torch.arange(self.config.num_codes, device=self.levels.device)[:, None] // self.strides
        ) % self.levels
        return digits / (self.levels - 1) * 2 - 1

    def normalise(self, latents: Tensor) -> Tensor:
        return latents.float().tanh()

    def nearest(self, latents: Tensor) -> Tensor:
        return self._digits(self.normalise(latents.detach())).matmul(self.strides)

    def _digits(self, bounded: Tensor) -> Tensor:
        return ((bounded + 1) / 2 * (self.levels - 1)).round().long()

    def forward(self, latents: Tensor, classes: Tensor | None = None) -> Quantized:
        latents = self.normalise(latents)
        ids = (self._digits(latents) * self.strides).sum(dim=1)
        if self.training:
            with torch.no_grad():
                self._track_usage(ids)
        return Quantized(latents + (self.lookup(ids) - latents).detach(), ids, latents.new_zeros(()))


QUANTIZERS: dict[str, type[Quantizer]] = {
    "nearest": Quantizer,
    "cvq": AnchoredQuantizer,
    "sgc": SemanticQuantizer,
    "simvq": ReparameterisedQuantizer,
    "ibq": IndexQuantizer,
    "fsq": FiniteScalarQuantizer,
}


def rotate_to(latents: Tensor, codes: Tensor) -> Tensor:
    """The value of `codes` with the gradient of the rotation and scaling that takes each latent to its code.

    Fifty et al. 2024, arXiv:2410.06424, eq. 4: R e = e - 2 w (w.e) + 2 q (e.e_hat), w = (e_hat + q_hat) /
    |e_hat + q_hat|, with rotation and scale held constant.

    Args:
        latents: (R, E), the e of the equation.
        codes: (R, E), without gradient, the q.
    """
    e_hat, q_hat = F.normalize(latents.detach(), dim=1), F.normalize(codes, dim=1)
    w = F.normalize(e_hat + q_hat, dim=1)
    scale = codes.norm(dim=1, keepdim=True) / latents.detach().norm(dim=1, keepdim=True).clamp_min(1e-8)
    along_w = (latents * w).sum(dim=1, keepdim=True)
    along_e = (latents * e_hat).sum(dim=1, keepdim=True)
    return scale * (latents - 2 * along_w * w + 2 * along_e * q_hat)
