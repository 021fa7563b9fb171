"""Sample image ids: temperature, top-k, top-p, noise by seed, completion, streaming.

An image depends on its prompt, its own seed and the settings alone. Its noise is keyed by seed and position,
and batches are always padded to `micro_batch`, since kernels round differently at other batch sizes.

Shapes: B images, K codes, (h, w) token grid, N = h*w image tokens, T text tokens, J tokens of a window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tavq.base.seeding import mixed_seed
from tavq.data.text_encoder import TokenStates

from .config import SamplingConfig
from .engine import Engine, autoregressive_decode, speculative_decode
from .model import GeneratorModel


@dataclasses.dataclass(frozen=True)
class Partial:
    """Images so far.

    Attributes:
        ids: (B, N) int64; 0 where they are not known yet.
        known: (B, N) bool.
    """

    ids: Tensor
    known: Tensor


def sample(
    model: GeneratorModel,
    texts: TokenStates,
    seeds: Sequence[int],
    config: SamplingConfig,
    *,
    negative: TokenStates | None = None,
    given_ids: Tensor | None = None,
    given_mask: Tensor | None = None,
) -> Tensor:
    """Sample the ids of one image per text.

    Args:
        model: in eval mode.
        texts: B texts; for results that do not depend on the other prompts, encode each by itself.
        seeds: B seeds.
        config: how to sample.
        negative: B texts that guidance leads away from; the learned null text if None.
        given_ids: (B, N) or (N,) ids to keep where `given_mask`, of the same shape, is True; the other ones
            are sampled (completion).

    Returns:
        (B, N) int64 on the device of the model.
    """
    images = stream(
        model, texts, seeds, config, negative=negative, given_ids=given_ids, given_mask=given_mask
    )
    *_, last = images
    return last.ids


@torch.inference_mode()
def stream(
    model: GeneratorModel,
    texts: TokenStates,
    seeds: Sequence[int],
    config: SamplingConfig,
    *,
    negative: TokenStates | None = None,
    given_ids: Tensor | None = None,
    given_mask: Tensor | None = None,
    every_rows: int | None = None,
) -> Iterator[Partial]:
    """Like `sample`, but yield the images so far after every `every_rows` grid rows (None: whole images).

    Nothing is checked or computed before the first iteration. Micro-batches come one after the other; stop
    iterating to cancel.

    Raises:
        ValueError: the number of seeds is not that of texts, the model is in training mode, what is given
            does not fit the model, or there are negative texts without guidance.
    """
    if len(seeds) != len(texts.mask) or not seeds:
        raise ValueError(f"got {len(texts.mask)} texts and {len(seeds)} seeds, expected one seed a text")
    if every_rows is not None and every_rows < 1:
        raise ValueError(f"every_rows is {every_rows}, expected 1 or more, or None for whole images")
    if model.training:
        raise ValueError(
            "the generator is in training mode, where dropout disturbs every token; call model.eval()"
        )
    if negative is not None and config.guidance_scale == 1:
        raise ValueError("a negative prompt needs guidance, but guidance_scale is 1; raise it, such as to 7")
    ids, known = _given(model, len(seeds), given_ids, given_mask)
    num_rows, num_columns = model.config.grid_size

    engine = _open_engine(model, config)
    # A compiled engine has one graph, that of a window, if only of one token.
    plain = config.draft_tokens == 1 and not config.compile
    decode = autoregressive_decode if plain else speculative_decode

    for images in torch.arange(len(seeds)).split(config.micro_batch):
        # The first image fills the empty places of the last batch; its copies are thrown away.
        padded = torch.cat([images, images[:1].expand(config.micro_batch - len(images))])
        engine.prefill(texts.rows(padded), None if negative is None else negative.rows(padded))
        sampler = TokenSampler(config, [int(seeds[i]) for i in padded], engine)

        batch_ids = ids[padded]
        for row in decode(engine, sampler, batch_ids, known[padded]):
            num_done = row + 1
            end = num_done * num_columns
            ids[images, :end] = batch_ids[: len(images), :end]
            known[images, :end] = True
            if num_done == num_rows or (every_rows is not None and num_done % every_rows == 0):
                yield Partial(ids.clone(), known.clone())


def _open_engine(model: GeneratorModel, config: SamplingConfig) -> Engine:
    scales = None
    if config.guidance_scale != 1:
        num_tokens = model.config.num_tokens
        scales = torch.tensor(
            [config.guidance_scale_at(position, num_tokens) for position in range(num_tokens)]
        )
    return Engine(
        model,
        config.micro_batch,
        config.precision,
        window=config.draft_tokens,
        guidance_scale_N=scales,
        compiled=config.compile,
    )


def _given(
    model: GeneratorModel, num_images: int, ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check what is given; return its ids (0 elsewhere) and mask, both (B, N). By default nothing is."""
    shape = (num_images, model.config.num_tokens)
    if (ids is None) != (mask is None):
        raise ValueError("got one of given_ids and given_mask, expected both or neither; give the other too")
    if ids is None or mask is None:
        ids = torch.zeros(shape, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.bool)
    if ids.shape not in (shape, shape[1:]) or mask.shape not in (shape, shape[1:]):
        raise ValueError(
            f"given_ids are {tuple(ids.shape)}, given_mask is {tuple(mask.shape)}; "
            f"expected {shape} or {shape[1:]} for each; reshape them"
        )

    device = model.bos_embedding.device
    known_BN = mask.to(device, torch.bool).expand(shape).clone()
    ids_BN = ids.to(device, torch.int64).expand(shape).clone().masked_fill_(~known_BN, 0)
    if ids_BN.min() < 0 or ids_BN.max() >= model.config.num_codes:
        raise ValueError(
            f"given_ids reach from {ids_BN.min()} to {ids_BN.max()}, expected 0 to "
            f"{model.config.num_codes - 1}; give ids of the tokenizer that the generator was trained with"
        )
    return ids_BN, known_BN


class TokenSampler:
    """Turns the logits of a batch of images into ids, always in the same way at the same position."""

    def __init__(self, config: SamplingConfig, seeds: Sequence[int], engine: Engine):
        self.config = config
        self.num_tokens = engine.config.num_tokens
        self.image_B1 = torch.arange(len(seeds), device=engine.device)[:, None]
        self.noise_BNK: Tensor | None = None
        if config.temperature > 0:
            noise = batch_gumbel_noise(seeds, range(self.num_tokens), engine.config.num_codes)
            self.noise_BNK = noise.to(engine.device)

    def __call__(self, logits: Tensor, position: int | Tensor) -> Tensor:
        """Sample ids (B,) from logits (B, K) at one position, or ids (B, J) at the positions (B, J).

        Positions past the end get noise, too, but their ids mean nothing.
        """
        if self.noise_BNK is None:
            return sample_next_token(logits, None, self.config)
        if isinstance(position, int):
            return sample_next_token(logits, self.noise_BNK[:, position], self.config)
        noise_BJK = self.noise_BNK[self.image_B1, position.clamp_max(self.num_tokens - 1)]
        return sample_next_token(logits, noise_BJK, self.config)


def sample_next_token(logits: Tensor, noise: Tensor | None, config: SamplingConfig) -> Tensor:
    """Sample an id for each row of logits (..., K); without noise, take the likeliest.

    argmax(logits + Gumbel noise) is a sample of softmax(logits) (Gumbel-max trick). It keeps all randomness
    apart from the logits, which is what makes speculative decoding exact.
    """
    if noise is None:
        return logits.argmax(-1)
    logits = top_k_top_p_filtering(logits / config.temperature, config.top_k, config.top_p)
    return (logits + noise).argmax(-1)


@torch.inference_mode()
def resample(model: GeneratorModel, ids_BN: Tensor, top_k: int) -> Tensor:
    """Sample every token anew, each given the true ones before it and the null text: (B, N).

    These are the mistakes that a generator makes where an image is right so far. Torch's own random numbers
    decide.
    """
    config = model.config
    states_BTM = torch.zeros(len(ids_BN), config.max_text_tokens, config.text_dim, device=ids_BN.device)
    logits_BNK = model(ids_BN, states_BTM, torch.zeros_like(states_BTM[..., 0], dtype=torch.bool))
    probabilities = top_k_top_p_filtering(logits_BNK, top_k, 1.0).softmax(-1)
    return probabilities.flatten(0, 1).multinomial(1).view_as(ids_BN)


def top_k_top_p_filtering(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all logits (..., K) to -inf but those of the likeliest codes: exactly `top_k` of them, and the
    fewest that hold a probability of `top_p`. Among equals the lower code stays.

    Args:
        logits: divided by the temperature.
        top_k: 0 means all.
        top_p: 1 means all. Applied to what `top_k` leaves.
    """
    if not top_k and top_p == 1:
        return logits
    sorted_logits, codes = logits.sort(dim=-1, descending=True, stable=True)
    remove = torch.zeros_like(sorted_logits, dtype=torch.bool)
    if top_k:
        remove[..., top_k:] = True
    if top_p < 1:
        probabilities = sorted_logits.masked_fill(remove, -math.inf).softmax(-1)
        # Held by the likelier codes alone, without this one: the code that reaches top_p stays.
        held_before = probabilities.cumsum(-1) - probabilities
        remove |= held_before >= top_p
    return logits.masked_fill(remove.scatter(-1, codes, remove), -math.inf)


def gumbel_noise(seed: int, position: int, num_codes: int) -> Tensor:
    """Make the noise (K,) of one token of the image with this seed, float32 on the CPU.

    Changing a line here changes the image of every saved recipe; a test pins the values.
    """
    rng = torch.Generator().manual_seed(mixed_seed(seed, position))
    # float64: float32 uniforms come in steps of 6e-8, which would cut the noise off at 16.6.
    uniform = torch.rand(num_codes, dtype=torch.float64, generator=rng)
    return uniform.log_().neg_().log_().neg_().float()


def batch_gumbel_noise(seeds: Sequence[int], positions: Sequence[int], num_codes: int) -> Tensor:
    """Make the noise (B, positions, K) of some positions of B images."""
    return torch.stack([torch.stack([gumbel_noise(s, p, num_codes) for p in positions]) for s in seeds])
