"""tavq train generator --tokens DIR --out DIR [--tokenizer DIR] [--preset tiny|flickr8k|base]

Train the generator on tokenised images and on the frozen text encoder's token states of their captions. The
same command resumes a stopped run.

Shapes: B batch, K codes, E code width, (h, w) token grid, N = h*w image tokens, T text tokens, M text width,
n images.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from tavq.base.processes import drawn_for_rows, own_share, shares_of_all
from tavq.base.seeding import mixed_seed
from tavq.data.config import SPLITS
from tavq.data.images import grid, to_pil
from tavq.data.text_encoder import TextEncoder, TokenStates
from tavq.data.tokens import AllTexts, TokenMeta, TokenSet, open_tokens, read_meta
from tavq.training.checkpoint import tensor_hash
from tavq.training.dry_run import dry_run
from tavq.training.loop import train
from tavq.training.provenance import TokenProvenance
from tavq.training.stream import Draws
from tavq.training.task import StepOutput, Task

from .attention import choice
from .config import RUN_PRESETS, GeneratorRun, GeneratorShape
from .model import GeneratorConfig, GeneratorModel
from .sampling import sample
from .text_states import TextStates, open_states

EVALUATION_BATCH = 100
NUM_SAMPLES = 16  # images in the sample grid

Decode = Callable[[Tensor], Tensor]
"""ids (B, h, w) -> images (B, 3, H, W)."""


def train_generator(
    run: GeneratorRun,
    decode: Decode | None = None,
    codebook: Tensor | None = None,
    *,
    task_class: type[GeneratorTask] | None = None,
) -> None:
    """Train the generator into `run.out`.

    Args:
        run: the run.
        decode: ids (B, h, w) -> images, for the sample grid; of the tokenizer that `run` names.
        codebook: (K, E) of that tokenizer, from which the token embeddings start.
        task_class: `GeneratorTask` if None, or `preference.PreferenceTask`.
    """
    if run.tokenizer is not None and (decode is None or codebook is None):
        raise ValueError(
            f"tokenizer is {run.tokenizer}, but its decoder and codebook were not handed in; "
            "use the command `tavq train generator`"
        )
    task = (task_class or GeneratorTask)(run, decode, codebook)
    if run.dry_run:
        dry_run(task, run.training, task.run)
    else:
        if os.environ.get("RANK", "0") == "0":  # as torchrun says it; the processes have not met yet
            device = "cuda" if torch.cuda.is_available() else "cpu"
            half_precision = run.training.precision != "no"
            print(f"attention: {choice(device, half_precision, task.run.model.attention)}")
        train(task, run.training, run.out, task.run)


class GeneratorTask(Task[nn.Module, GeneratorModel]):
    """The generator as the training loop sees it; the validation loss decides which weights are saved."""

    name = "generator"
    monitor: tuple[str, Literal["min", "max"]] | None = ("loss", "min")
    muon_modules = frozenset({"blocks"})

    def __init__(self, run: GeneratorRun, decode: Decode | None = None, codebook: Tensor | None = None):
        earlier = None
        if run.start is not None:
            earlier = GeneratorModel.from_pretrained(run.start)
            run = dataclasses.replace(run, model=_shape_of_start(run, earlier.config))
        self.run = run
        self.decode = decode
        self.earlier_card = "" if earlier is None else earlier.card

        train_set = open_tokens(run.tokens, "train")
        train_set = dataclasses.replace(train_set, with_long_texts=run.long_text)
        self.train_set = train_set
        self.dataset: Dataset = TokenExamples(train_set)
        all_captions = AllTexts(train_set)
        if run.more_tokens is not None:
            more = open_more_tokens(run.more_tokens, train_set.meta)
            self.dataset = MixedExamples(train_set, more, run.more_share)
            all_captions = AllTexts(train_set, more)
        self.val_set = open_tokens(run.tokens, "val")

        self.encoder = encoder = TextEncoder(run.model.text_encoder)
        max_tokens = run.model.max_text_tokens
        self.texts = open_states(encoder, all_captions, max_tokens, run.cache)
        first_captions = [captions[0] for captions in self.val_set.captions]
        self.val_texts = open_states(encoder, first_captions, max_tokens, run.cache)

        torch.manual_seed(run.training.seed)
        generator = GeneratorModel.from_config(_config_of(run, train_set.meta, encoder))
        if codebook is not None:
            generator.check_codebook(tensor_hash(codebook))
            generator.init_weights(codebook)
        if earlier is not None:
            _check_fits(run, earlier.config, generator.config)
            generator.load_state_dict(earlier.state_dict())
        self.model = GeneratorTrainer(run, generator)
        self.shipped = generator

    def collate(self, examples: list[Any], draws: Draws | None = None) -> dict[str, Tensor]:
        texts = self.texts.rows([caption for _, caption in examples])
        return {"ids": torch.stack([ids for ids, _ in examples]), "states": texts.states, "mask": texts.mask}

    @torch.inference_mode()
    def evaluate(self, model: GeneratorModel, step: int) -> dict[str, float]:
        """Measure nats per token on the validation split, with the first caption and with the null text."""
        return {
            "loss": self._nats_per_token(model, with_text=True),
            "loss_null_text": self._nats_per_token(model, with_text=False),
        }

    def _nats_per_token(self, model: GeneratorModel, *, with_text: bool) -> float:
        # A mask of False alone means the null text.
        return nats_per_token(
            model,
            self.val_set,
            self.val_texts,
            lambda ids_BN, texts: TokenStates(texts.states, texts.mask & with_text),
        )

    def sample_images(self, model: GeneratorModel) -> dict[str, Any]:
        """Make a grid of images for the first captions of the validation split, the same ones each time."""
        if self.decode is None:
            return {}
        rows = range(min(NUM_SAMPLES, len(self.val_set)))
        ids_BN = sample(model, self.val_texts.rows(rows), list(rows), self.run.sampling)
        images = self.decode(ids_BN.unflatten(1, model.config.grid_size))
        return {"samples": np.asarray(grid(to_pil(images), columns=8))}

    def save(self, model: GeneratorModel, directory: Path, card: str) -> None:
        model.card = card
        model.save_pretrained(directory)


def nats_per_token(
    model: GeneratorModel,
    tokens: TokenSet,
    texts: TextStates,
    given: Callable[[Tensor, TokenStates], TokenStates],
) -> float:
    """Measure how likely a generator finds the images of a token set. Processes share the images.

    Args:
        model: in eval mode.
        tokens: n images; variant 0 of each counts, the image as it is, not mirrored or cropped.
        texts: of the n images.
        given: ids (B, N) and texts -> what the generator is given.
    """
    device = model.bos_embedding.device
    ids_nN = tokens.ids[:, 0].flatten(1).long()
    total = 0.0
    for rows in own_share(torch.arange(len(ids_nN)).split(EVALUATION_BATCH)):
        ids_BN, packed = ids_nN[rows].to(device), texts.rows(rows.tolist())
        condition = given(ids_BN, TokenStates(packed.states.to(device), packed.mask.to(device)))
        logits_BNK = model(ids_BN, condition.states, condition.mask)
        # Summed, as the last batch may be smaller.
        total += float(F.cross_entropy(logits_BNK.flatten(0, 1), ids_BN.flatten(), reduction="sum"))
    return sum(shares_of_all([total])) / ids_nN.numel()


class TokenExamples(Dataset):
    """Token ids and captions: `self[(index, draw_seed)]` is a random variant of image `index`, (N,), and the
    number of a random one of its captions among all captions."""

    def __init__(self, tokens: TokenSet):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, draw_seed = item
        captions = self.tokens.captions_of(index)
        caption = captions[mixed_seed(draw_seed, 1) % len(captions)]
        return random_variant(self.tokens, index, draw_seed), caption


def random_variant(tokens: TokenSet, index: int, draw_seed: int) -> Tensor:
    """Read image `index` as it is, mirrored or cropped, as the seed decides: (N,) int64."""
    ids_Vhw = tokens.ids[index]
    return ids_Vhw[mixed_seed(draw_seed, 0) % len(ids_Vhw)].flatten().long()


class MixedExamples(Dataset):
    """Examples of two token sets, as `TokenExamples` gives them: a share of them comes from the second."""

    def __init__(self, tokens: TokenSet, more: TokenSet, share: float):
        self.first, self.second = TokenExamples(tokens), TokenExamples(more)
        self.share = share
        self.num_first_captions = tokens.num_captions

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        _, draw_seed = item
        rng = random.Random(draw_seed)
        if rng.random() >= self.share:
            return self.first[item]
        ids_N, caption = self.second[(rng.randrange(len(self.second)), draw_seed)]
        return ids_N, self.num_first_captions + caption


def open_more_tokens(directory: Path, meta: TokenMeta) -> TokenSet:
    """Open all splits of another token set.

    Raises:
        ValueError: another tokenizer encoded it.
    """
    if read_meta(directory).codebook_hash != meta.codebook_hash:
        raise ValueError(
            f"{directory} holds ids of another tokenizer than the other tokens; encode its images anew with "
            "tavq tokenize"
        )
    return open_tokens(directory, *(split for split in SPLITS if any(directory.glob(f"{split}-*.tar"))))


class GeneratorTrainer(nn.Module):
    """The generator with its loss: cross-entropy of the next token."""

    def __init__(self, run: GeneratorRun, generator: GeneratorModel):
        super().__init__()
        self.run = run
        self.generator = generator

    def forward(self, batch: dict[str, Tensor], step: int) -> StepOutput:
        # One model learns both with and without text, as classifier-free guidance needs both.
        ids_BN = batch["ids"]
        dropped_B1 = (
            drawn_for_rows(torch.rand, len(ids_BN), 1, device=ids_BN.device) < self.run.null_text_rate
        )
        order_BN = self._orders(ids_BN, step)
        logits_BNK = self.generator(ids_BN, batch["states"], batch["mask"] & ~dropped_B1, order_BN)

        logits, targets = logits_BNK.flatten(0, 1), ids_BN.flatten()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.run.label_smoothing)
        with torch.no_grad():
            nats_per_token = F.cross_entropy(logits, targets)
        return StepOutput(loss, {"loss": loss.detach(), "nats_per_token": nats_per_token})

    def _orders(self, ids_BN: Tensor, step: int) -> Tensor | None:
        """Draw the order of each image's tokens: random at first, raster at last (RAR, Yu et al. 2024,
        arXiv:2411.00776)."""
        share = random_order_share(step / self.run.training.steps, self.run)
        if share == 0:
            return None
        batch_size, num_tokens = ids_BN.shape
        random_BN = drawn_for_rows(torch.rand, batch_size, num_tokens, device=ids_BN.device).argsort(1)
        is_random_B1 = drawn_for_rows(torch.rand, batch_size, 1, device=ids_BN.device) < share
        return torch.where(is_random_B1, random_BN, torch.arange(num_tokens, device=ids_BN.device))


def random_order_share(progress: float, run: GeneratorRun) -> float:
    """Return the share of images whose tokens are predicted in a random order, after a part of training."""
    if progress >= run.raster_order_from:
        return 0.0
    if progress < run.random_order_until:
        return 1.0
    return (run.raster_order_from - progress) / (run.raster_order_from - run.random_order_until)


def _shape_of_start(run: GeneratorRun, config: GeneratorConfig) -> GeneratorShape:
    """Return the shape of the generator in `run.start`; a flag that asks for another one is a ValueError."""
    names = [field.name for field in dataclasses.fields(GeneratorShape)]
    default = RUN_PRESETS.get(run.preset, GeneratorRun()).model
    for name in names:
        asked, there = getattr(run.model, name), getattr(config, name)
        if asked not in (there, getattr(default, name)):
            raise ValueError(
                f"model.{name} is {asked}, but the generator in {run.start} has {there}; "
                f"leave out --model.{name.replace('_', '-')}, or train anew, without --start"
            )
    return GeneratorShape(**{name: getattr(config, name) for name in names})


def _config_of(run: GeneratorRun, meta: TokenMeta, encoder: TextEncoder) -> GeneratorConfig:
    """Return the configuration of the model with all that tokens and text encoder decide."""
    return GeneratorConfig.of(
        run.model,
        num_codes=meta.num_codes,
        grid_size=meta.grid_size,
        codebook_hash=meta.codebook_hash,
        text_dim=encoder.token_dim,
        text_encoder_hash=encoder.hash,
        provenance=TokenProvenance(meta.data, meta.tokenizer),
    )


def _check_fits(run: GeneratorRun, earlier: GeneratorConfig, wanted: GeneratorConfig) -> None:
    for name in ("num_codes", "grid_size", "text_encoder_hash"):
        if getattr(earlier, name) != getattr(wanted, name):
            raise ValueError(
                f"{run.start} has {name} {getattr(earlier, name)}, {run.tokens} needs "
                f"{getattr(wanted, name)}; train a generator anew, without --start"
            )
